package h2o

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestSelect compares with sorting: recent tokens, and those with the largest scores.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := Config{
			TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
			SparsityRate: rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate"),
			RecentShare:  rapid.SampledFrom([]float64{0, .1, .5, 1}).Draw(t, "recent_share"),
		}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		for range e.Len {
			e.Scores = append(e.Scores, float32(random.IntN(20))/8) // with ties
		}
		scores := slices.Clone(e.Scores)
		budget := e.Budget(config.TokenBudget, config.SparsityRate)
		recent := max(1, int(math.Ceil(config.RecentShare*float64(budget))))
		got := config.New().Select(nil, &e.Row)
		e.CheckTop(t, got, budget, 0, func(p int) float64 {
			if p >= e.Len-recent {
				return math.MaxFloat32
			}
			return float64(e.Scores[p])
		})
		if !slices.Equal(scores, e.Scores) {
			t.Fatal("changed the scores")
		}
	})
}

// TestTies: the lower positions go first.
func TestTies(t *testing.T) {
	t.Parallel()
	row := &selector.Row{Dim: 1, First: 3, Len: 103, Scores: make([]float32, 103)}
	row.Scores[50] = 1
	got := (&Config{TokenBudget: 6, SparsityRate: -1, RecentShare: .5}).New().Select(nil, row)
	if want := []int32{3, 4, 50, 100, 101, 102}; !slices.Equal(got, want) {
		t.Errorf("selected %v, want %v", got, want)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"token_budget":  {{0, -1, .5}},
		"sparsity_rate": {{1, 2, .5}},
		"recent_share":  {{1, -1, -.1}, {1, -1, 1.1}, {1, -1, math.NaN()}},
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
	const length = 1000
	row := &selector.Row{Dim: 1, Len: length, TokenBudget: 300, PinFirst: true, Scores: make([]float32, length)}
	s := Default().New()
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = s.Select(dst[:0], row) })
}
