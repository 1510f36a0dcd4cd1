package h2o

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row become candidates.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// RecentShare is the share of the budget that goes to the last tokens, rounded up; at least one does.
	RecentShare float64 `json:"recent_share"`
}

// Default is one half for each, as published, of the budget that Twilight selects before it prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1, RecentShare: .5} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "h2o", Default: func() selector.Config { return Default() }}
}

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if !(c.RecentShare >= 0 && c.RecentShare <= 1) {
		return fault.Newf(fault.Invalid, "recent_share",
			"recent_share is %v, expected a share of the budget in [0, 1]", c.RecentShare)
	}
	return selector.CheckBudget(c.TokenBudget, c.SparsityRate)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector { return h2o{*c} }

type h2o struct{ Config }

var (
	_ selector.Stateful = h2o{}
	_ selector.Weigher  = h2o{}
)

func (h2o) Shadow() kv.Shadow { return nil }

// Needs implements selector.Stateful.
func (h2o) Needs() selector.Needs { return selector.Needs{Scores: true} }

// Weights implements selector.Weigher.
func (h2o) Weights(weights []float32, row *selector.Row) {
	copy(weights, row.Scores[row.First:row.Len])
}

// Select implements selector.Selector.
func (h h2o) Select(dst []int32, row *selector.Row) []int32 {
	budget, n := row.Budget(h.TokenBudget, h.SparsityRate), row.Len-row.First
	if budget >= n {
		return selector.All(dst, row)
	}
	scores := row.Scratch.Floats(n)
	copy(scores, row.Scores[row.First:row.Len])
	recent := max(1, int(math.Ceil(h.RecentShare*float64(budget))))
	for i := n - recent; i < n; i++ {
		scores[i] = math.MaxFloat32
	}
	dst = selector.Top(dst, row, scores, budget)
	row.Ranking.Reset() // which is not by this step's attention
	return dst
}
