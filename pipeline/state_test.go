package pipeline_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/testdata"
)

// decoded is a KV head of a layer of a real text, for a pipeline that remembers.
type decoded struct {
	*capture.Capture
	layer, kvHead int
	pipeline      *pipeline.Pipeline
	scratch       pipeline.Scratch
	state         pipeline.State
	result        pipeline.Result
}

// forRows runs a test for each KV head of each layer of the capture.
func forRows(t *testing.T, config string, run func(t *testing.T, d *decoded)) {
	t.Helper()
	c, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		t.Fatal(err)
	}
	g := &kv.Geometry{
		Layers: len(c.Layers), QueryHeads: c.QueryHeads, KVHeads: c.KVHeads, KDim: c.KDim, VDim: c.VDim,
		Scale: float32(c.Scale),
	}
	p, err := pipeline.New(mustParse(t, config), g)
	if err != nil {
		t.Fatal(err)
	}
	for layer := range c.Layers {
		for kvHead := range c.KVHeads {
			run(t, &decoded{Capture: c, layer: layer, kvHead: kvHead, pipeline: p})
		}
	}
}

// row is that of a decode step.
func (d *decoded) row(step int) *pipeline.Row {
	n := d.Group() * d.KDim
	return &pipeline.Row{
		Layer: d.Layers[d.layer].Index, KVHead: d.kvHead, Len: d.N + step + 1,
		Queries: d.Layers[d.layer].Q[(step*d.KVHeads+d.kvHead)*n:][:n],
		Keys:    kvtest.Reader(kv.F16, d.Keys(d.layer, d.kvHead), d.KDim),
		Values:  kvtest.Reader(kv.F16, d.Values(d.layer, d.kvHead), d.VDim),
		State:   &d.state, Step: uint64(step + 1),
	}
}

func (d *decoded) run(step int) *pipeline.Result {
	d.pipeline.Run(&d.scratch, d.row(step), &d.result)
	return &d.result
}

// mass is what the prompt's tokens got from all of its queries, as the capture has it.
func (d *decoded) mass() []float32 {
	n := d.Group() * d.N
	return d.Layers[d.layer].Mass[d.kvHead*n:][:n]
}

// simulated is the original's cache of one list: what is evicted is gone.
type simulated struct {
	budget, recent int
	scores         []float64
	cache          []int
}

// evict takes tokens out of the cache until it fits: of those that are not recent, the lowest score first,
// the highest position among equals.
func (s *simulated) evict() {
	length := s.cache[len(s.cache)-1] + 1
	for len(s.cache) > s.budget {
		worst := -1
		for i, p := range s.cache {
			if p < length-s.recent && (worst < 0 || s.scores[p] <= s.scores[s.cache[worst]]) {
				worst = i
			}
		}
		s.cache = slices.Delete(s.cache, worst, worst+1)
	}
}

// attend adds to the scores what a query head gives to the cache.
func (s *simulated) attend(logits []float64) {
	top := math.Inf(-1)
	for _, p := range s.cache {
		top = max(top, logits[p])
	}
	sum := 0.0
	for _, p := range s.cache {
		sum += math.Exp(logits[p] - top)
	}
	for _, p := range s.cache {
		s.scores[p] += math.Exp(logits[p]-top) / sum
	}
}

// TestHeavyHitters: started from the same mass, lists are those of a plain simulation that evicts, step by
// step, and what was kept does not depend on how often a step runs.
func TestHeavyHitters(t *testing.T) {
	t.Parallel()
	const budget, recent = 200, 50
	for _, group := range []string{"union", "per_query_head"} {
		config := fmt.Sprintf(`{"selector": {"type": "h2o", "token_budget": %d, "recent_share": 0.25}, "group": %q,
			"skip_first_two_layers": false, "pin_first_chunk": false, "pin_current_chunk": false}`, budget, group)
		forRows(t, config, func(t *testing.T, d *decoded) {
			mass := d.mass()
			d.pipeline.Observe(&d.scratch, d.row(0), &pipeline.Observation{Prompt: d.N, Mass: mass})
			lists, heads := 1, d.Group()
			if group == "per_query_head" {
				lists, heads = heads, 1
			}
			caches := make([]simulated, lists)
			for list := range caches {
				s := &caches[list]
				*s = simulated{budget: budget, recent: recent, scores: make([]float64, d.Tokens())}
				for p := range d.N {
					s.cache = append(s.cache, p)
					for h := list * heads; h < (list+1)*heads; h++ {
						s.scores[p] += float64(mass[h*d.N+p])
					}
				}
			}
			for step := range d.Steps {
				for range 1 + step%3 {
					d.run(step)
				}
				for list := range caches {
					s := &caches[list]
					s.cache = append(s.cache, d.N+step)
					s.evict()
					got := make([]int, 0, budget)
					for _, p := range d.result.Lists[list] {
						got = append(got, int(p))
					}
					if !slices.Equal(got, s.cache) {
						t.Fatalf("%s, layer %d, KV head %d, step %d: kept %v, the simulation %v",
							group, d.layer, d.kvHead, step, got, s.cache)
					}
					for h := list * heads; h < (list+1)*heads; h++ {
						s.attend(d.logits(step, h))
					}
				}
			}
		})
	}
}

// logits are the true ones of a query head of the group.
func (d *decoded) logits(step, h int) []float64 {
	query, keys := d.Query(d.layer, step, d.kvHead*d.Group()+h), d.Keys(d.layer, d.kvHead)
	logits := make([]float64, d.N+step+1)
	for p := range logits {
		for i, q := range query {
			logits[p] += d.Scale * float64(q) * float64(keys[p*d.KDim+i])
		}
	}
	return logits
}

// TestCompressed: of what the selector picks, what the compressor kept and all that follows the prompt.
func TestCompressed(t *testing.T) {
	t.Parallel()
	const window, prompt = 4, 4000 // of 4096, so that tokens follow it
	stages := `"weight_estimator": {"type": "none"}, "skip_first_two_layers": false, "group": "per_query_head"`
	compressor := fmt.Sprintf(`"compressor": {"type": "snap_kv", "window_size": %d, "max_capacity_prompt": 300}`, window)
	for _, selector := range []string{
		`{"type": "quest", "token_budget": 512}`, `{"type": "streaming", "token_budget": 5, "num_sinks": 0}`,
	} {
		kept := make(map[[3]int][]int32) // by layer, KV head and list, of all tokens
		forRows(t, fmt.Sprintf(`{%s, %s}`, compressor, stages), func(_ *testing.T, d *decoded) {
			d.observe(window, prompt)
			for list, positions := range d.run(0).Lists {
				kept[[3]int{d.layer, d.kvHead, list}] = slices.Clone(positions)
			}
		})
		selected := make(map[[3]int][]int32)
		forRows(t, fmt.Sprintf(`{"selector": %s, %s}`, selector, stages), func(_ *testing.T, d *decoded) {
			row := d.row(0)
			d.indexFor(row)
			d.pipeline.Run(&d.scratch, row, &d.result)
			for list, positions := range d.result.Lists {
				selected[[3]int{d.layer, d.kvHead, list}] = slices.Clone(positions)
			}
		})
		forRows(t, fmt.Sprintf(`{%s, "selector": %s, %s}`, compressor, selector, stages), func(t *testing.T, d *decoded) {
			d.observe(window, prompt)
			row := d.row(0)
			d.indexFor(row)
			d.pipeline.Run(&d.scratch, row, &d.result)
			for list, got := range d.result.Lists {
				at := [3]int{d.layer, d.kvHead, list}
				if n := len(kept[at]); n != 300+d.N+1-prompt {
					t.Errorf("%v: the compressor keeps %d tokens", at, n)
				}
				var want []int32
				for _, p := range selected[at] {
					if _, found := slices.BinarySearch(kept[at], p); found {
						want = append(want, p)
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("%s, %v: kept %v, want %v", selector, at, got, want)
				}
				if len(want) < len(selected[at]) && d.result.Coverage[list] == d.result.Coverage[list] {
					t.Errorf("%s, %v: coverage %v from bounds of chunks that lost tokens", selector, at, d.result.Coverage[list])
				}
			}
		})
	}
}

// observe lets the compressor see decode queries as if they were a prompt's last.
func (d *decoded) observe(window, prompt int) {
	o := &pipeline.Observation{Prompt: prompt, Window: window}
	for h := range d.Group() {
		for w := range window {
			o.Queries = append(o.Queries, d.Query(d.layer, w, d.kvHead*d.Group()+h)...)
		}
	}
	d.pipeline.Observe(&d.scratch, d.row(0), o)
}

// indexFor gives the row the records that the selector wants.
func (d *decoded) indexFor(row *pipeline.Row) {
	if shadow, _ := d.pipeline.Shadows(); shadow != nil {
		row.SelectorRecords = kvtest.Index(shadow, d.Keys(d.layer, d.kvHead), d.KDim, 0)
	}
}

// TestNothingLeft: where the compressor dropped all that the selector picks, the last token is attended to.
func TestNothingLeft(t *testing.T) {
	t.Parallel()
	const (
		stages     = `"selector": {"type": "oracle_topk", "token_budget": 1}, "skip_first_two_layers": false, "pin_first_chunk": false, "pin_current_chunk": false`
		compressor = `"compressor": {"type": "snap_kv", "window_size": 1, "max_capacity_prompt": 2}`
	)
	var best []int32
	forRows(t, `{`+stages+`}`, func(_ *testing.T, d *decoded) { best = append(best, d.run(0).Lists[0]...) })
	dropped := 0
	forRows(t, `{`+stages+`, `+compressor+`}`, func(t *testing.T, d *decoded) {
		d.observe(1, d.N)
		got := d.run(0).Lists[0]
		if len(got) != 1 || got[0] != best[0] && got[0] != int32(d.N) {
			t.Errorf("kept %v, want %d or the last token", got, best[0])
		}
		if got[0] != best[0] {
			dropped++
		}
		best = best[1:]
	})
	if dropped == 0 {
		t.Error("no pick was dropped")
	}
}

// TestCheckObserved: a long prompt must have been seen, a short one need not, and a sequence that began
// short never.
func TestCheckObserved(t *testing.T) {
	t.Parallel()
	config := `{"compressor": {"type": "snap_kv", "window_size": 8, "max_capacity_prompt": 100}, "dense_below": 50}`
	forRows(t, config, func(t *testing.T, d *decoded) {
		check := func(length int, o *pipeline.Observation, kind fault.Kind, field string) {
			t.Helper()
			row := d.row(0)
			row.Len = length
			err := d.pipeline.CheckObserved(row, o)
			var f *fault.Error
			if field == "" && err != nil || field != "" && (!errors.As(err, &f) || f.Kind != kind || f.Field != field) {
				t.Errorf("%d tokens: error %v, want %v at %q", length, err, kind, field)
			}
		}
		check(101, nil, 0, "")
		check(102, nil, fault.Precondition, "observation")
		check(102, &pipeline.Observation{Prompt: 101, Window: 8}, 0, "")
		check(102, &pipeline.Observation{Prompt: 101, Window: 7}, fault.Invalid, "observation.window")
		check(102, &pipeline.Observation{Prompt: 101}, fault.Invalid, "observation.window_queries_inline")
		check(101, &pipeline.Observation{Prompt: 100}, 0, "")
		row := d.row(0)
		row.Len = 30 // dense
		d.pipeline.Run(&d.scratch, row, &d.result)
		check(4000, nil, 0, "")
		d.state.Truncate(20)
		check(4000, nil, 0, "")
		d.state.Truncate(0)
		check(4000, nil, fault.Precondition, "observation")
	})
}
