package snapkv

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/compressor"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
)

// plain is the listing's arithmetic in float64: the pooled scores of the positions before the window.
func plain(c *Config, row *compressor.Row, keys []float32) []float64 {
	before := row.Len - row.First - c.WindowSize
	scores := make([]float64, before)
	for _, queries := range row.Queries {
		for w := range c.WindowSize {
			weights := make([]float64, before+w+1)
			sum := 0.0
			for i := range weights {
				logit := 0.0
				for d, q := range queries[w*row.Dim:][:row.Dim] {
					logit += float64(q) * float64(keys[(row.First+i)*row.Dim+d])
				}
				if row.Softcap > 0 {
					logit = float64(row.Softcap) * math.Tanh(logit/float64(row.Softcap))
				}
				weights[i] = math.Exp(logit)
				sum += weights[i]
			}
			for i := range scores {
				scores[i] += weights[i] / sum
			}
		}
	}
	pooled := make([]float64, before)
	for i := range pooled {
		most := math.Inf(-1)
		for j := i - c.KernelSize/2; j <= i+c.KernelSize/2; j++ {
			if j >= 0 && j < before {
				pooled[i] += scores[j] / float64(c.KernelSize)
				most = max(most, scores[j])
			}
		}
		if c.Pooling == maxPool {
			pooled[i] = most
		}
	}
	return pooled
}

// check fails the test unless the kept are the window and the best by the plain scores, up to rounding.
func check(t rapid.TB, c *Config, row *compressor.Row, keys []float32, kept []int32) {
	t.Helper()
	pooled := plain(c, row, keys)
	if len(kept) != c.MaxCapacityPrompt || !slices.IsSorted(kept) || len(slices.Compact(slices.Clone(kept))) != len(kept) {
		t.Fatalf("kept %v, want %d ascending positions", kept, c.MaxCapacityPrompt)
	}
	for i, p := range kept[c.MaxCapacityPrompt-c.WindowSize:] {
		if int(p) != row.Len-c.WindowSize+i {
			t.Fatalf("kept %v, want the window's last %d too", kept, c.WindowSize)
		}
	}
	least, most := math.Inf(1), math.Inf(-1)
	for i, score := range pooled {
		if _, found := slices.BinarySearch(kept, int32(row.First+i)); found {
			least = min(least, score)
		} else {
			most = max(most, score)
		}
	}
	if most > least*(1+1e-4) {
		t.Fatalf("kept a score of %v, but not one of %v", least, most)
	}
}

func TestCompress(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := &Config{
			WindowSize: rapid.IntRange(1, 20).Draw(t, "window_size"),
			KernelSize: 2*rapid.IntRange(0, 6).Draw(t, "kernel_size/2") + 1,
			Pooling:    rapid.SampledFrom([]string{avgPool, maxPool}).Draw(t, "pooling"),
		}
		c.MaxCapacityPrompt = c.WindowSize + rapid.IntRange(1, 200).Draw(t, "capacity")
		row := &compressor.Row{
			Dim:     rapid.SampledFrom([]int{1, 3, 64, 96}).Draw(t, "dim"),
			Softcap: rapid.SampledFrom([]float32{0, 5}).Draw(t, "softcap"),
			First:   rapid.IntRange(0, 40).Draw(t, "first"),
		}
		row.Len = row.First + c.MaxCapacityPrompt + rapid.IntRange(1, 300).Draw(t, "more")
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		normal := func(n int) []float32 {
			x := make([]float32, n)
			for i := range x {
				x[i] = float32(random.NormFloat64())
			}
			return x
		}
		keys := normal(row.Len * row.Dim)
		row.Keys = kvtest.Reader(kv.F32, keys, row.Dim)
		for range rapid.SampledFrom([]int{1, 3}).Draw(t, "heads") {
			row.Queries = append(row.Queries, normal(c.WindowSize*row.Dim))
		}
		got := c.New().Compress([]int32{-7}, row)
		if got[0] != -7 {
			t.Fatal("overwrote what was there")
		}
		check(t, c, row, keys, got[1:])
	})
}

// TestRealPrompt: of a real text, by the queries of its last 64 tokens, it keeps what the plain version keeps.
func TestRealPrompt(t *testing.T) {
	t.Parallel()
	real := selectortest.Capture(t)
	c := Default()
	for l := range real.Layers {
		for kvHead := range real.KVHeads {
			keys := real.Keys(l, kvHead)
			row := &compressor.Row{Dim: real.KDim, Len: real.N, Keys: kvtest.Reader(kv.F16, keys, real.KDim)}
			for h := range real.Group() {
				var queries []float32
				for w := range real.Window {
					at := (w*real.QueryHeads + kvHead*real.Group() + h) * real.KDim
					for _, q := range real.Layers[l].QWindow[at:][:real.KDim] {
						queries = append(queries, q*float32(real.Scale))
					}
				}
				row.Queries = append(row.Queries, queries)
			}
			check(t, c, row, keys, c.New().Compress(nil, row))
		}
	}
}

// TestBadKeys: where a key is not a number, as many tokens are kept as ever.
func TestBadKeys(t *testing.T) {
	t.Parallel()
	c := &Config{WindowSize: 2, MaxCapacityPrompt: 10, KernelSize: 1, Pooling: maxPool}
	keys := make([]float32, 100)
	keys[50] = float32(math.NaN())
	row := &compressor.Row{
		Dim: 1, Len: 100, Keys: kvtest.Reader(kv.F32, keys, 1), Queries: [][]float32{{1, 1}},
	}
	if got := c.New().Compress(nil, row); len(got) != 10 {
		t.Errorf("kept %v, want 10", got)
	}
}

func TestKeepsAll(t *testing.T) {
	t.Parallel()
	s := Default().New()
	if s.Window() != 64 || !s.KeepsAll(320) || s.KeepsAll(321) {
		t.Errorf("window %d, keeps all of 320: %v, of 321: %v", s.Window(), s.KeepsAll(320), s.KeepsAll(321))
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"window_size":         {{0, 320, 5, avgPool}, {maxWindow + 1, 1 << 20, 5, avgPool}},
		"max_capacity_prompt": {{64, 64, 5, avgPool}, {64, math.MaxInt32 + 1, 5, avgPool}},
		"kernel_size":         {{64, 320, 0, avgPool}, {64, 320, 4, avgPool}, {64, 320, maxWindow + 1, avgPool}},
		"pooling":             {{64, 320, 5, "sum"}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}
