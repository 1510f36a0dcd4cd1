package magicpig

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// K is the number of bits of a hash, L that of hash tables.
	K int `json:"K"`
	L int `json:"L"`
	// NumSinks and Window are how many of the first and of the last tokens are always candidates.
	NumSinks int `json:"num_sinks"`
	Window   int `json:"window"`
	// Seed draws the projections.
	Seed int `json:"seed"`
}

// Default is the published K10 L150 with 4 sinks and a window of 64.
func Default() *Config { return &Config{K: 10, L: 150, NumSinks: 4, Window: 64} }

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "magicpig", Default: func() selector.Config { return Default() }}
}

const (
	maxK = 15 // a hash and a spare bit in 16
	maxL = 1024
)

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.K < 1 || c.K > maxK {
		return fault.Newf(fault.Invalid, "K", "K is %d, expected 1..%d bits", c.K, maxK)
	}
	if c.L < 2 || c.L > maxL {
		return fault.Newf(fault.Invalid, "L", "L is %d, expected 2..%d tables: a candidate is found in two", c.L, maxL)
	}
	if c.NumSinks < 0 || c.NumSinks > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "num_sinks",
			"num_sinks is %d, expected 0..%d tokens", c.NumSinks, math.MaxInt32)
	}
	if c.Window < 1 || c.Window > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "window", "window is %d, expected 1..%d tokens", c.Window, math.MaxInt32)
	}
	return nil
}

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	return magicpig{sinks: c.NumSinks, window: c.Window, hashes: hashes{newProjector(c.K, c.L, uint64(c.Seed))}}
}
