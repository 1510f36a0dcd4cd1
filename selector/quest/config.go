package quest

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many tokens of a row become candidates, rounded up to chunks.
	TokenBudget int `json:"token_budget"`
	// SparsityRate, if not -1, replaces TokenBudget by this share of the row's valid tokens, rounded up.
	SparsityRate float64 `json:"sparsity_rate"`
	// ChunkSize is how many adjacent tokens share a bound: a multiple of kv.ChunkTokens.
	ChunkSize int `json:"chunk_size"`
}

// Default is what Twilight's config_quest_twi.json ships: 8192 tokens in chunks of 16.
func Default() *Config {
	return &Config{TokenBudget: 8192, SparsityRate: -1, ChunkSize: kv.ChunkTokens}
}

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "quest", Default: func() selector.Config { return Default() }}
}

const maxChunkSize = 1 << 20

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.TokenBudget < 1 || c.TokenBudget > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "token_budget",
			"token_budget is %d, expected 1..%d tokens", c.TokenBudget, math.MaxInt32)
	}
	if c.SparsityRate != -1 && !(c.SparsityRate > 0 && c.SparsityRate <= 1) {
		return fault.Newf(fault.Invalid, "sparsity_rate",
			"sparsity_rate is %v, expected a share of the length in (0, 1], or -1 to use token_budget", c.SparsityRate)
	}
	if c.ChunkSize < kv.ChunkTokens || c.ChunkSize > maxChunkSize || c.ChunkSize%kv.ChunkTokens != 0 {
		return fault.Newf(fault.Invalid, "chunk_size",
			"chunk_size is %d, expected a multiple of %d up to %d", c.ChunkSize, kv.ChunkTokens, maxChunkSize)
	}
	return nil
}

// New implements selector.Config.
func (c *Config) New() selector.Selector { return quest{*c} }
