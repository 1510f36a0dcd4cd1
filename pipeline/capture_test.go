package pipeline_test

import (
	"fmt"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/testdata"
)

// replay runs every row of a capture from an fp16 cache and hands each query head's outcome to check.
func replay(t *testing.T, c *capture.Capture, config string, check func(layer, step, head int, list []int32, out []float32)) {
	t.Helper()
	g := &kv.Geometry{
		Layers: len(c.Layers), QueryHeads: c.QueryHeads, KVHeads: c.KVHeads, KDim: c.KDim, VDim: c.VDim,
		Scale: float32(c.Scale),
	}
	p, err := pipeline.New(mustParse(t, config), g)
	if err != nil {
		t.Fatal(err)
	}
	selector, estimator := p.Shadows()
	var s pipeline.Scratch
	var res pipeline.Result
	for layer := range c.Layers {
		for kvHead := range c.KVHeads {
			keys := kvtest.Reader(kv.F16, c.Keys(layer, kvHead), c.KDim)
			values := kvtest.Reader(kv.F16, c.Values(layer, kvHead), c.VDim)
			for step := range c.Steps {
				row := &pipeline.Row{Layer: c.Layers[layer].Index, KVHead: kvHead, Keys: keys, Values: values, Len: c.N + step + 1}
				indexed := c.Keys(layer, kvHead)[:row.Len*c.KDim]
				if selector != nil {
					row.SelectorRecords = kvtest.Index(selector, indexed, c.KDim, 0)
				}
				if estimator != nil {
					row.EstimatorRecords = kvtest.Index(estimator, indexed, c.KDim, 0)
				}
				first := kvHead * c.Group()
				for g := range c.Group() {
					row.Queries = append(row.Queries, c.Query(layer, step, first+g)...)
				}
				p.Run(&s, row, &res)
				for g := range c.Group() {
					var list []int32
					if res.Lists != nil {
						list = res.Lists[min(g, len(res.Lists)-1)]
					}
					check(layer, step, first+g, list, res.Output[g*c.VDim:(g+1)*c.VDim])
				}
			}
		}
	}
}

// TestCapture runs real tensors against figures of another program and float64 attention.
func TestCapture(t *testing.T) {
	t.Parallel()
	c, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		t.Fatal(err)
	}
	oracle, err := capture.DecodeOracle(testdata.SmolLM2Oracle)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("dense", func(t *testing.T) {
		t.Parallel()
		var scratch capture.Scratch
		replay(t, c, `{"skip_first_two_layers": false}`, func(layer, step, head int, _ []int32, out []float32) {
			var e capture.RelErr
			dense, _ := c.Dense(layer, step, head, &scratch)
			if e.Add(out, dense); e.Value() > 1e-5 {
				t.Errorf("layer %d, step %d, head %d: error %v", layer, step, head, e.Value())
			}
		})
	})
	for _, p := range []string{"0.85", "0.95"} {
		t.Run("exact weights, p="+p, func(t *testing.T) {
			t.Parallel()
			config := fmt.Sprintf(`{"weight_pruner": {"type": "top_p", "threshold": %s}, "group": "per_query_head"}`, p)
			replay(t, c, config, func(layer, step, head int, list []int32, _ []float32) {
				want := oracle.Layers[c.Layers[layer].Index][step][head].Budget[p]
				if got := len(list); got < want-1 || got > want+1 {
					t.Errorf("layer %d, step %d, head %d: %d kept, want %d", layer, step, head, got, want)
				}
			})
		})
	}
	for _, test := range []struct {
		name, config string
		mass         float64 // true mass of the kept, at least, in the mean
	}{
		{"full", fullINT4, .85},
		{"quest", questINT4, .82},
	} {
		t.Run(test.name+", INT4, p=0.85", func(t *testing.T) {
			t.Parallel()
			var scratch capture.Scratch
			sum, n := 0.0, 0
			replay(t, c, test.config, func(layer, step, head int, list []int32, _ []float32) {
				_, weights := c.Dense(layer, step, head, &scratch)
				mass, err := capture.Mass(weights, list)
				if err != nil {
					t.Fatal(err)
				}
				sum, n = sum+mass, n+1
			})
			if mean := sum / float64(n); !(mean >= test.mass) {
				t.Errorf("mean true mass %v of %d rows, want %v", mean, n, test.mass)
			}
		})
	}
	for name, shift := range map[string]map[int]float32{"as they are": nil, "outlier channels": {3: 16, 60: -32}} {
		t.Run("coverage of keys "+name, func(t *testing.T) {
			t.Parallel()
			c, err := capture.Decode(testdata.SmolLM2)
			if err != nil {
				t.Fatal(err)
			}
			if err := capture.ShiftKeys(c, shift); err != nil {
				t.Fatal(err)
			}
			var scratch capture.Scratch
			const config = `{"selector": {"type": "quest"}, "weight_estimator": {"type": "min_max_quant"},
				"coverage": 0.97, "group": "per_query_head", "skip_first_two_layers": false}`
			sum, worst, candidates, n := 0.0, 1.0, 0, 0
			replay(t, c, config, func(layer, step, head int, list []int32, _ []float32) {
				_, weights := c.Dense(layer, step, head, &scratch)
				mass, err := capture.Mass(weights, list)
				if err != nil {
					t.Fatal(err)
				}
				sum, worst, candidates, n = sum+mass, min(worst, mass), candidates+len(list), n+1
			})
			// A fixed budget of as many has a worst row of .64.
			if mean := sum / float64(n); !(mean >= .96 && mean <= .99 && worst >= .8 && candidates <= 1500*n) {
				t.Errorf("mean true coverage %v, worst %v, %d candidates of %d rows", mean, worst, candidates, n)
			}
		})
	}
}
