package pyramidkv

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/selector/ds"
	"github.com/twilight-sidecar/twilight/selector/h2o"
	"github.com/twilight-sidecar/twilight/selector/none"
	"github.com/twilight-sidecar/twilight/selector/oracle"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

// TestBudgets: they fall by equal steps from layer to layer, their mean is the budget, the last one is a
// beta-th of it, and none is beyond the row while the mean is within.
func TestBudgets(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := &Config{
			Beta:      rapid.Float64Range(1, 50).Draw(t, "beta"),
			NumLayers: rapid.IntRange(1, 80).Draw(t, "num_layers"),
		}
		n := rapid.IntRange(1, 100_000).Draw(t, "n")
		mean := rapid.IntRange(1, n).Draw(t, "mean")
		var budgets []int
		sum := 0
		for layer := range c.NumLayers {
			budgets = append(budgets, c.budget(mean, n, layer))
			sum += budgets[layer]
		}
		rounding := 1 + float64(c.NumLayers) // half for each, and those raised to 1
		if math.Abs(float64(sum-mean*c.NumLayers)) > rounding {
			t.Fatalf("budgets %v sum to %d, want %d layers of %d", budgets, sum, c.NumLayers, mean)
		}
		last := budgets[c.NumLayers-1]
		if c.NumLayers > 1 && 2*mean <= n && math.Abs(float64(last)-float64(mean)/c.Beta) > 1 {
			t.Fatalf("budgets %v end with %d, want %d/%v", budgets, last, mean, c.Beta)
		}
		for layer := 1; layer < c.NumLayers; layer++ {
			step := float64(budgets[0]-last) / float64(c.NumLayers-1)
			if off := float64(budgets[0]-budgets[layer]) - step*float64(layer); math.Abs(off) > 2 || budgets[layer] > n {
				t.Fatalf("budgets %v of %d tokens do not fall by equal steps", budgets, n)
			}
		}
	})
}

// wrapping is a config around another.
func wrapping(typ string, inner selector.Config, budget int) *Config {
	c := Default()
	c.Selector = registry.Stage[selector.Config]{Type: typ, Config: inner}
	c.TokenBudget, c.NumLayers = budget, 3
	return c
}

// TestSelect: it is the other selector with the layer's budget, also where the row brings the mean.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		c := wrapping("oracle_topk", oracle.Default(), rapid.IntRange(1, 500).Draw(t, "token_budget"))
		own := e.TokenBudget
		got := c.New().Select([]int32{-7}, &e.Row)
		if e.TokenBudget != own {
			t.Fatal("changed the row's budget")
		}
		e.TokenBudget = c.budget(e.Budget(c.TokenBudget, -1), e.Len-e.First, e.Layer)
		if want := oracle.Default().New().Select([]int32{-7}, &e.Row); !slices.Equal(got, want) {
			t.Fatalf("selected %v, want %v", got, want)
		}
	})
}

// TestWraps: what the other keeps, needs and does not fit is the wrapper's too.
func TestWraps(t *testing.T) {
	t.Parallel()
	if shadow := wrapping("quest", quest.Default(), 1).New().Shadow(); shadow == nil || shadow.ChunkBytes(64) != 256 {
		t.Errorf("shadow %v, want Quest's", shadow)
	}
	if needs := selector.NeedsOf(wrapping("h2o", h2o.Default(), 1).New()); !needs.Scores || needs.Carry {
		t.Errorf("needs %+v, want H2O's", needs)
	}
	for layer, want := range map[int]string{2: `selector.channels["2"]`, 3: "num_layers"} {
		s := wrapping("ds", ds.Default(), 1).New().(selector.Fitter)
		var f *fault.Error
		if err := s.Fits(layer, &kv.Geometry{KVHeads: 1, KDim: 1}); !errors.As(err, &f) || f.Field != want {
			t.Errorf("layer %d: error %v, want one about %s", layer, err, want)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := wrapping("oracle_topk", oracle.Default(), 9)
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, test := range map[string]struct {
		field  string
		change func(c *Config)
	}{
		"default":        {"num_layers", func(c *Config) { *c = *Default() }},
		"layers":         {"num_layers", func(c *Config) { c.NumLayers = -1 }},
		"beta":           {"beta", func(c *Config) { c.Beta = .5 }},
		"NaN":            {"beta", func(c *Config) { c.Beta = math.NaN() }},
		"budget":         {"token_budget", func(c *Config) { c.TokenBudget = 0 }},
		"rate":           {"sparsity_rate", func(c *Config) { c.SparsityRate = 2 }},
		"nothing":        {"selector", func(c *Config) { c.Selector = registry.Stage[selector.Config]{} }},
		"without budget": {"selector.type", func(c *Config) { c.Selector.Config = &none.Config{} }},
		"bad within":     {"selector.token_budget", func(c *Config) { c.Selector.Config = &oracle.Config{SparsityRate: -1} }},
	} {
		c := *good
		test.change(&c)
		var f *fault.Error
		if err := c.Validate(); !errors.As(err, &f) || f.Field != test.field {
			t.Errorf("%s: error %v, want one about %s", name, err, test.field)
		}
	}
}
