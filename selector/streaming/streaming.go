package streaming

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// TokenBudget is how many of the last tokens are candidates.
	TokenBudget int `json:"token_budget"`
	// NumSinks is how many of the first tokens are.
	NumSinks int `json:"num_sinks"`
}

// Default is what the original's example runs with: 2000 recent tokens and 4 sinks.
func Default() *Config { return &Config{TokenBudget: 2000, NumSinks: 4} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "streaming", Default: func() selector.Config { return Default() }}
}

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.NumSinks < 0 || c.NumSinks > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "num_sinks",
			"num_sinks is %d, expected 0..%d tokens", c.NumSinks, math.MaxInt32)
	}
	return selector.CheckBudget(c.TokenBudget, -1)
}

// New implements selector.Config.
func (c *Config) New() selector.Selector { return streaming{*c} }

type streaming struct{ Config }

func (streaming) Shadow() kv.Shadow { return nil }

// Select implements selector.Selector.
func (s streaming) Select(dst []int32, row *selector.Row) []int32 {
	return selector.Ends(dst, row, s.NumSinks, row.Budget(s.TokenBudget, -1))
}
