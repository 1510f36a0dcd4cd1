package quest

import (
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
	// ChunkSize is how many adjacent tokens share a bound: a multiple of 16.
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
	if err := selector.CheckBudget(c.TokenBudget, c.SparsityRate); err != nil {
		return err
	}
	if c.ChunkSize < kv.ChunkTokens || c.ChunkSize > maxChunkSize || c.ChunkSize%kv.ChunkTokens != 0 {
		return fault.Newf(fault.Invalid, "chunk_size",
			"chunk_size is %d, expected a multiple of %d up to %d", c.ChunkSize, kv.ChunkTokens, maxChunkSize)
	}
	return nil
}

// New implements selector.Config.
func (c *Config) New() selector.Selector { return quest{*c} }
