package sparq

import (
	"github.com/viterin/vek/vek32"

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
	// R is how many channels are looked at: 0 for an eighth of them, rounded, and at least one.
	R int `json:"r"`
}

// Default is an eighth of the channels, as published, and the budget that Twilight selects before it
// prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "sparq", Default: func() selector.Config { return Default() }}
}

const maxR = 1 << 16

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.R < 0 || c.R > maxR {
		return fault.Newf(fault.Invalid, "r",
			"r is %d, expected 1..%d channels, or 0 for an eighth of them", c.R, maxR)
	}
	return selector.CheckBudget(c.TokenBudget, c.SparsityRate)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector { return sparq{*c} }

type sparq struct{ Config }

var _ selector.Fitter = sparq{}

func (sparq) Shadow() kv.Shadow { return nil }

// Fits implements selector.Fitter.
func (s sparq) Fits(_ int, g *kv.Geometry) error {
	if s.R > g.KDim {
		return fault.Newf(fault.Invalid, "r", "r is %d, but keys have %d channels: look at fewer", s.R, g.KDim)
	}
	return nil
}

// Unit implements selector.Ranker.
func (sparq) Unit() int { return 1 }

// Select implements selector.Selector.
func (s sparq) Select(dst []int32, row *selector.Row) []int32 {
	budget, n, dim := row.Budget(s.TokenBudget, s.SparsityRate), row.Len-row.First, row.Dim
	if budget >= n {
		return selector.All(dst, row)
	}
	f32 := row.Scratch.Floats(n + (3+selector.ExactBlock)*dim)
	scores := selector.Take(&f32, n)
	query, size, absolute := selector.Take(&f32, dim), selector.Take(&f32, dim), selector.Take(&f32, dim)
	row.Sum(query)
	vek32.Abs_Into(size, row.Queries[0])
	for _, q := range row.Queries[1:] {
		vek32.Abs_Into(absolute, q)
		vek32.Add_Inplace(size, absolute)
	}
	keep(query, size, s.channels(dim))
	selector.Exact(scores, row, query, f32)
	return selector.Top(dst, row, scores, budget)
}

// channels is how many of dim channels are looked at.
func (s sparq) channels(dim int) int {
	if s.R > 0 {
		return min(s.R, dim)
	}
	return max(1, (dim+4)/8)
}

// keep leaves the r elements of query with the largest size and clears all others.
func keep(query, size []float32, r int) {
	cut, ties := selector.Cut(size, r)
	for d, s := range size {
		switch {
		case s > cut:
		case s == cut && ties > 0:
			ties--
		default:
			query[d] = 0
		}
	}
}
