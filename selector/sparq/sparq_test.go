package sparq

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestSelect compares with the formula: sort channels by the sum of |q|, add up what they say.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := Config{
			TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
			SparsityRate: rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate"),
			R:            rapid.IntRange(0, e.Dim).Draw(t, "r"),
		}
		r := config.R
		if r == 0 {
			r = max(1, int(math.Round(float64(e.Dim)/8)))
		}
		channels := make([]int, e.Dim)
		size := make([]float32, e.Dim)
		for d := range channels {
			channels[d] = d
			for _, q := range e.Queries {
				size[d] += float32(math.Abs(float64(q[d])))
			}
		}
		slices.SortStableFunc(channels, func(a, b int) int {
			switch {
			case size[a] > size[b]:
				return -1
			case size[a] < size[b]:
				return 1
			}
			return 0
		})
		got := config.New().Select(nil, &e.Row)
		budget := e.Budget(config.TokenBudget, config.SparsityRate)
		e.CheckTop(t, got, budget, 1e-5*float64(1+e.Dim*len(e.Queries)), func(p int) float64 {
			sum := 0.0
			for _, q := range e.Queries {
				for _, d := range channels[:r] {
					sum += float64(q[d]) * float64(e.Key(p)[d])
				}
			}
			return sum
		})
	})
}

func TestChannels(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ r, dim, want int }{
		{0, 128, 16}, {0, 100, 13}, {0, 80, 10}, {0, 3, 1}, {5, 128, 5}, {128, 128, 128}, {129, 128, 128},
	} {
		if got := (sparq{Config{R: test.r}}).channels(test.dim); got != test.want {
			t.Errorf("%+v: %d", test, got)
		}
	}
}

// TestCoverage: 8 of 64 channels find nearly all that there is to find in a quarter of real rows
// (oracle_topk: .981, at worst .85).
func TestCoverage(t *testing.T) {
	t.Parallel()
	got := selectortest.Cover(t, &Config{TokenBudget: 1024, SparsityRate: -1}, 0)
	if got.Mean < .97 || got.Worst < .7 || got.Candidates != 1024 {
		t.Errorf("%+v, want a mean of .97, at worst .7, with 1024 candidates", got)
	}
}

func TestFits(t *testing.T) {
	t.Parallel()
	for r, want := range map[int]bool{0: true, 8: true, 64: true, 65: false} {
		err := (&Config{TokenBudget: 1, SparsityRate: -1, R: r}).New().(selector.Fitter).Fits(0, &kv.Geometry{KDim: 64})
		var f *fault.Error
		if (err == nil) != want || err != nil && (!errors.As(err, &f) || f.Field != "r") {
			t.Errorf("r %d of 64 channels: error %v", r, err)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"token_budget": {{0, -1, 0}}, "sparsity_rate": {{1, 2, 0}}, "r": {{1, -1, -1}, {1, -1, maxR + 1}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
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
