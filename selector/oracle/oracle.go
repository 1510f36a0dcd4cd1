package oracle

import (
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row become candidates.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
}

// Default is the budget of 8192 tokens that Twilight selects before it prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "oracle_topk", Default: func() selector.Config { return Default() }}
}

// Validate implements selector.Config.
func (c *Config) Validate() error { return selector.CheckBudget(c.TokenBudget, c.SparsityRate) }

// New implements selector.Config.
func (c *Config) New() selector.Selector { return oracle{*c} }

type oracle struct{ Config }

func (oracle) Shadow() kv.Shadow { return nil }

// Unit implements selector.Ranker.
func (oracle) Unit() int { return 1 }

// Select implements selector.Selector.
func (o oracle) Select(dst []int32, row *selector.Row) []int32 {
	budget, n := row.Budget(o.TokenBudget, o.SparsityRate), row.Len-row.First
	if budget >= n {
		return selector.All(dst, row)
	}
	f32 := row.Scratch.Floats(n + (1+selector.ExactBlock)*row.Dim)
	scores, query := selector.Take(&f32, n), selector.Take(&f32, row.Dim)
	row.Sum(query)
	selector.Exact(scores, row, query, f32)
	return selector.Top(dst, row, scores, budget)
}
