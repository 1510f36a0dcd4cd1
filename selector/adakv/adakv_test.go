package adakv

import (
	"cmp"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/selector/h2o"
	"github.com/twilight-sidecar/twilight/selector/oracle"
	"github.com/twilight-sidecar/twilight/selector/quest"
	"github.com/twilight-sidecar/twilight/selector/streaming"
)

// wrapping is a selector around another.
func wrapping(typ string, inner selector.Config, budget int, floor float64) selector.Allocator {
	c := Default()
	c.Selector = registry.Stage[selector.Config]{Type: typ, Config: inner}
	c.TokenBudget, c.FloorAlpha = budget, floor
	return c.New().(selector.Allocator)
}

// TestShare compares with sorting all weights of all lists.
func TestShare(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		lists, n := rapid.IntRange(1, 9).Draw(t, "lists"), rapid.IntRange(1, 300).Draw(t, "n")
		mean := rapid.IntRange(1, n+5).Draw(t, "mean")
		floor := rapid.SampledFrom([]float64{0, .2, 1}).Draw(t, "floor_alpha")
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		weights := make([]float32, lists*n)
		for i := range weights {
			weights[i] = float32(random.IntN(50)) / 50 // with ties
		}
		got := make([]int, lists)
		wrapping("oracle_topk", oracle.Default(), 1, floor).Share(got, weights, mean)

		best := make([]int, len(weights))
		for i := range best {
			best[i] = i
		}
		slices.SortStableFunc(best, func(a, b int) int { return cmp.Compare(weights[b], weights[a]) })
		counts := make([]int, lists)
		for _, i := range best[:min(len(best), mean*lists)] {
			counts[i/n]++
		}
		for i, count := range counts {
			want := max(1, int(math.Round((1-floor)*float64(count)+floor*float64(mean))))
			if mean >= n {
				want = mean
			}
			if got[i] != want {
				t.Fatalf("budgets %v, want %d for list %d, which has %d of the largest", got, want, i, count)
			}
		}
	})
}

// TestWeigh compares with a softmax in float64: of true logits, of Quest's bounds, and of nothing but H2O's
// scores. Then Select is the other selector with the row's budget.
func TestWeigh(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		budget := rapid.IntRange(1, 300).Draw(t, "token_budget")
		name := rapid.SampledFrom([]string{"oracle_topk", "quest", "h2o"}).Draw(t, "wraps")
		var inner selector.Config
		bounds := func(int) []float32 { return nil }
		switch name {
		case "oracle_topk":
			inner = oracle.Default()
		case "quest":
			inner = quest.Default()
			e.Index(inner.New().Shadow())
			alone := e.Row
			alone.TokenBudget = 1
			alone.Scratch = selector.Scratch{}
			inner.New().Select(nil, &alone)
			bounds = func(h int) []float32 {
				if len(alone.Ranking.Bounds) == 0 {
					return nil
				}
				return alone.Ranking.Bounds[h]
			}
		case "h2o":
			inner = h2o.Default()
			for range e.Len {
				e.Scores = append(e.Scores, 1+float32(len(e.Scores)%7))
			}
		}
		own, queries, n := e.TokenBudget, len(e.Queries), e.Len-e.First
		a := wrapping(name, inner, budget, .2)
		got := make([]float32, n)
		mean := a.Weigh(got, &e.Row)
		if want := e.Budget(budget, -1); mean != want || e.TokenBudget != own || len(e.Queries) != queries {
			t.Fatalf("mean %d, want %d, or the row has changed: %+v", mean, want, e.Row)
		}
		if mean < n {
			want := make([]float64, n)
			for h, query := range e.Queries {
				for i, w := range softmax(n, func(i int) float64 {
					switch name {
					case "oracle_topk":
						logit := 0.0
						for d, x := range e.Key(e.First + i) {
							logit += float64(x) * float64(query[d])
						}
						return logit
					case "h2o":
						return math.Log(float64(e.Scores[e.First+i]))
					}
					if bounds(h) == nil {
						return 0 // one chunk, in which all are alike
					}
					return float64(bounds(h)[(e.First+i)/kv.ChunkTokens-e.First/kv.ChunkTokens])
				}) {
					want[i] += w
				}
			}
			for i, w := range want {
				if math.Abs(float64(got[i])-w) > 1e-3*float64(queries) {
					t.Fatalf("weight of %d is %v, want %v", i, got[i], w)
				}
			}
		}
		e.Ranking.Reset()
		selected := a.Select([]int32{-7}, &e.Row)
		e.TokenBudget = mean
		e.Ranking.Reset()
		if want := inner.New().Select([]int32{-7}, &e.Row); !slices.Equal(selected, want) {
			t.Fatalf("selected %v, want %v", selected, want)
		}
	})
}

func softmax(n int, logit func(i int) float64) []float64 {
	weights, top, sum := make([]float64, n), math.Inf(-1), 0.0
	for i := range weights {
		weights[i] = logit(i)
		top = max(top, weights[i])
	}
	for i := range weights {
		weights[i] = math.Exp(weights[i] - top)
		sum += weights[i]
	}
	for i := range weights {
		weights[i] /= sum
	}
	return weights
}

// TestHoldsMore: by true weights, without a floor, the real layers' query heads hold more together than
// with equal budgets of as many tokens.
func TestHoldsMore(t *testing.T) {
	t.Parallel()
	const budget = 200
	c := selectortest.Capture(t)
	a := wrapping("oracle_topk", oracle.Default(), budget, 0)
	for l := range c.Layers {
		n := c.N + 1
		weights, rows := make([]float32, c.QueryHeads*n), make([]selector.Row, c.QueryHeads)
		for h := range rows {
			query := slices.Clone(c.Query(l, 0, h))
			for d := range query {
				query[d] *= float32(c.Scale)
			}
			rows[h] = selector.Row{
				Dim: c.KDim, Len: n, Queries: [][]float32{query},
				Keys: kvtest.Reader(kv.F16, c.Keys(l, h/c.Group()), c.KDim),
			}
			a.Weigh(weights[h*n:(h+1)*n], &rows[h])
		}
		budgets := make([]int, c.QueryHeads)
		a.Share(budgets, weights, budget)
		var masses [2]float64 // with own budgets, and equal ones
		kept := 0
		for h := range rows {
			_, dense := c.Dense(l, 0, h, nil)
			for i, tokens := range []int{budgets[h], budget} {
				rows[h].TokenBudget = tokens
				mass, err := capture.Mass(dense, a.Select(nil, &rows[h]))
				if err != nil {
					t.Fatal(err)
				}
				masses[i] += mass
			}
			kept += budgets[h]
		}
		if kept != budget*c.QueryHeads || masses[0] <= masses[1] {
			t.Errorf("layer %d: budgets %v hold %v in all, equal ones %v", c.Layers[l].Index, budgets, masses[0], masses[1])
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	stage := func(typ string, c selector.Config) registry.Stage[selector.Config] {
		return registry.Stage[selector.Config]{Type: typ, Config: c}
	}
	good := Default()
	good.Selector = stage("quest", quest.Default())
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, test := range map[string]struct {
		field  string
		change func(c *Config)
	}{
		"default":      {"selector", func(c *Config) { *c = *Default() }},
		"floor":        {"floor_alpha", func(c *Config) { c.FloorAlpha = 1.1 }},
		"NaN":          {"floor_alpha", func(c *Config) { c.FloorAlpha = math.NaN() }},
		"budget":       {"token_budget", func(c *Config) { c.TokenBudget = 0 }},
		"rate":         {"sparsity_rate", func(c *Config) { c.SparsityRate = 2 }},
		"bad within":   {"selector.chunk_size", func(c *Config) { c.Selector = stage("quest", &quest.Config{TokenBudget: 1, SparsityRate: -1}) }},
		"no ranking":   {"selector.type", func(c *Config) { c.Selector = stage("streaming", streaming.Default()) }},
		"shares twice": {"selector.type", func(c *Config) { c.Selector = stage("adakv", good) }},
	} {
		c := *good
		test.change(&c)
		var f *fault.Error
		if err := c.Validate(); !errors.As(err, &f) || f.Field != test.field {
			t.Errorf("%s: error %v, want one about %s", name, err, test.field)
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
	a := wrapping("oracle_topk", oracle.Default(), 1, .2)
	weights, budgets := make([]float32, length), make([]int, 1)
	var dst []int32
	kvtest.NoAllocation(t, func() {
		a.Share(budgets, weights, a.Weigh(weights, row))
		dst = a.Select(dst[:0], row)
	})
}
