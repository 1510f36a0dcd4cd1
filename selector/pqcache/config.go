package pqcache

import (
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row become candidates.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// Partitions is m, how many codes a key has.
	Partitions int `json:"partitions"`
	// Bits is b, the width of a code.
	Bits int `json:"bits"`
}

// Default is the published m = 2 and b = 6, and the budget that Twilight selects before it prunes.
func Default() *Config { return &Config{TokenBudget: 8192, SparsityRate: -1, Partitions: 2, Bits: 6} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "pqcache", Default: func() selector.Config { return Default() }}
}

const maxPartitions = 64

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.Partitions < 1 || c.Partitions > maxPartitions {
		return fault.Newf(fault.Invalid, "partitions", "partitions is %d, expected 1..%d", c.Partitions, maxPartitions)
	}
	if c.Bits < 1 || c.Bits > 8 {
		return fault.Newf(fault.Invalid, "bits", "bits is %d, expected 1..8", c.Bits)
	}
	return selector.CheckBudget(c.TokenBudget, c.SparsityRate)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	return pqcache{c.TokenBudget, c.SparsityRate, codes{m: c.Partitions, b: c.Bits}}
}
