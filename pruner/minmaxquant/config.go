package minmaxquant

import (
	"github.com/twilight-sidecar/twilight/internal/lowbit"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/pruner/internal/smooth"
)

// Config holds the method's keys.
type Config struct {
	// QuantBit is the width of a code: 2, 4 or 8.
	QuantBit int `json:"quant_bit"`
	// Equalize evens out the channels before keys are quantised.
	Equalize bool `json:"equalize"`
}

// Default is the paper's 4 bits, with equalised channels.
func Default() *Config { return &Config{QuantBit: 4, Equalize: true} }

// Method is the entry for a registry.
func Method() pruner.EstimatorMethod {
	return pruner.EstimatorMethod{
		Type:    "min_max_quant",
		Default: func() pruner.EstimatorConfig { return Default() },
	}
}

// Validate implements pruner.EstimatorConfig.
func (c *Config) Validate() error { return lowbit.CheckBits(c.QuantBit) }

// New implements pruner.EstimatorConfig.
func (c *Config) New() pruner.Estimator {
	e := smooth.Estimator{Format: lowbit.Format{Bits: c.QuantBit}}
	if c.Equalize {
		e.Smoothing = smooth.Equalise
	}
	return e
}
