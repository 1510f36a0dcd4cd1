package selector_test

import (
	"errors"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestTop compares with a stable sort: pins before all, then what is not finite, then by score.
func TestTop(t *testing.T) {
	t.Parallel()
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	score := rapid.OneOf(
		rapid.Float32Range(-1, 1),
		rapid.SampledFrom([]float32{0, 1, -1, math.MaxFloat32}),
		rapid.SampledFrom([]float32{0, 0, 0, 0, 0, 0, 0, 0, nan, inf, -inf}),
	)
	rapid.Check(t, func(t *rapid.T) {
		row := &selector.Row{
			First:    rapid.IntRange(0, 40).Draw(t, "first"),
			PinFirst: rapid.Bool().Draw(t, "pin first"), PinCurrent: rapid.Bool().Draw(t, "pin current"),
		}
		scores := rapid.SliceOfN(score, 1, 100).Draw(t, "scores")
		row.Len = row.First + len(scores)
		budget := rapid.IntRange(1, 110).Draw(t, "budget")

		rank := func(p int32) float64 {
			chunk := int(p) / kv.ChunkTokens
			switch s := float64(scores[int(p)-row.First]); {
			case row.PinFirst && chunk == row.First/kv.ChunkTokens, row.PinCurrent && chunk == (row.Len-1)/kv.ChunkTokens:
				return math.Inf(1)
			case math.IsNaN(s) || math.IsInf(s, 0):
				return math.MaxFloat32
			default:
				return s
			}
		}
		want := selector.All(nil, row)
		pins := 0
		for _, p := range want {
			if math.IsInf(rank(p), 1) {
				pins++
			}
		}
		slices.SortStableFunc(want, func(a, b int32) int {
			switch x, y := rank(a), rank(b); {
			case x > y:
				return -1
			case x < y:
				return 1
			}
			return 0
		})
		want = want[:min(len(want), max(budget, pins))]
		slices.Sort(want)

		got := selector.Top([]int32{-7}, row, slices.Clone(scores), budget)
		if got[0] != -7 || !slices.Equal(got[1:], want) {
			t.Fatalf("selected %v, want %v after what was there", got, want)
		}
	})
}

func TestEnds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		row := &selector.Row{First: rapid.IntRange(0, 20).Draw(t, "first")}
		row.Len = row.First + rapid.IntRange(1, 60).Draw(t, "tokens")
		first, last := rapid.IntRange(0, 70).Draw(t, "from the front"), rapid.IntRange(0, 70).Draw(t, "from the back")
		var want []int32
		for p := row.First; p < row.Len; p++ {
			if p < row.First+first || p >= row.Len-last {
				want = append(want, int32(p))
			}
		}
		if got := selector.Ends(nil, row, first, last); !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}

// TestExact: the keys' dot products with the sum of the queries are the sums of their logits.
func TestExact(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		query, keys := make([]float32, e.Dim), make([]float32, selector.ExactBlock*e.Dim)
		scores := make([]float32, e.Len-e.First)
		e.Sum(query)
		selector.Exact(scores, &e.Row, query, keys)
		for i, got := range scores {
			want := 0.0
			for _, q := range e.Queries {
				for d, x := range e.Key(e.First + i) {
					want += float64(q[d]) * float64(x)
				}
			}
			if math.Abs(float64(got)-want) > 1e-5*float64(1+e.Dim*len(e.Queries)) {
				t.Fatalf("position %d: %v, want %v", e.First+i, got, want)
			}
		}
	})
}

func TestBudget(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		own, configured int
		rate            float64
		want            int
	}{
		{0, 100, -1, 100}, {7, 100, -1, 7}, {7, 100, .5, 7}, {0, 100, .5, 11}, {0, 100, .1, 3}, {0, 100, 1, 21}, {0, 5, 1e-9, 1},
	} {
		row := &selector.Row{First: 9, Len: 30, TokenBudget: test.own}
		if got := row.Budget(test.configured, test.rate); got != test.want {
			t.Errorf("%+v: %d", test, got)
		}
	}
}

func TestCheckBudget(t *testing.T) {
	t.Parallel()
	for field, bad := range map[string][]struct {
		tokens int
		rate   float64
	}{
		"":              {{1, -1}, {math.MaxInt32, 1}, {1, 1e-9}},
		"token_budget":  {{0, -1}, {-5, -1}, {math.MaxInt32 + 1, -1}},
		"sparsity_rate": {{1, 0}, {1, -.5}, {1, 1.1}, {1, math.NaN()}, {1, math.Inf(1)}},
	} {
		for _, c := range bad {
			var f *fault.Error
			switch err := selector.CheckBudget(c.tokens, c.rate); {
			case field == "" && err != nil:
				t.Errorf("%+v: %v", c, err)
			case field != "" && (!errors.As(err, &f) || f.Field != field || f.Kind != fault.Invalid):
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}
