package oracle

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestSelect: the largest sums of true logits, in float64.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := Config{
			TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
			SparsityRate: rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate"),
		}
		got := config.New().Select(nil, &e.Row)
		budget := e.Budget(config.TokenBudget, config.SparsityRate)
		e.CheckTop(t, got, budget, 1e-5*float64(1+e.Dim*len(e.Queries)), func(p int) float64 {
			sum := 0.0
			for _, q := range e.Queries {
				for d, x := range e.Key(p) {
					sum += float64(q[d]) * float64(x)
				}
			}
			return sum
		})
	})
}

// TestHoldsMost: of real rows asked by one query head, no set of the size holds more weight.
func TestHoldsMost(t *testing.T) {
	t.Parallel()
	const budget = 200
	c := selectortest.Capture(t)
	s := (&Config{TokenBudget: budget, SparsityRate: -1}).New()
	for l := range c.Layers {
		keys := kvtest.Reader(kv.F16, c.Keys(l, 0), c.KDim)
		row := &selector.Row{Queries: [][]float32{c.Query(l, 0, 0)}, Dim: c.KDim, Len: c.N + 1, Keys: keys}
		_, weights := c.Dense(l, 0, 0, nil)
		got, err := capture.Mass(weights, s.Select(nil, row))
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(weights)
		want := 0.0
		for _, w := range weights[len(weights)-budget:] {
			want += w
		}
		if math.Abs(got-want) > 1e-6 {
			t.Errorf("layer %d: candidates hold %v, the best hold %v", c.Layers[l].Index, got, want)
		}
	}
}

// TestSeesBadKeys: a key that is not finite is a candidate.
func TestSeesBadKeys(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 300
	for name, bad := range map[string]float32{"NaN": float32(math.NaN()), "-Inf": float32(math.Inf(-1))} {
		keys := make([]float32, length*dim)
		keys[150*dim+3] = bad
		query := slices.Repeat([]float32{1}, dim)
		row := &selector.Row{
			Queries: [][]float32{query}, Dim: dim, Len: length, TokenBudget: 3, Keys: kvtest.Reader(kv.F32, keys, dim),
		}
		if got := Default().New().Select(nil, row); len(got) != 3 || !slices.Contains(got, 150) {
			t.Errorf("%s: selected %v, want 150 among 3", name, got)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, c := range map[string]Config{"token_budget": {0, -1}, "sparsity_rate": {1, 2}} {
		var f *fault.Error
		if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
			t.Errorf("%+v: error %v, want one about %s", c, err, field)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 1000
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length, TokenBudget: 300,
		Keys: kvtest.Reader(kv.F16, keys, dim), PinFirst: true,
	}
	s := Default().New()
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = s.Select(dst[:0], row) })
}
