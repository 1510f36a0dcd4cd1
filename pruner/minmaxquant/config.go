package minmaxquant

import (
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
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
func (c *Config) Validate() error {
	switch c.QuantBit {
	case 2, 4, 8:
		return nil
	}
	return fault.Newf(fault.Invalid, "quant_bit", "quant_bit is %d, expected 2, 4 or 8", c.QuantBit)
}

// New implements pruner.EstimatorConfig.
func (c *Config) New() pruner.Estimator {
	return estimator{shadow{bits: c.QuantBit, equalize: c.Equalize}}
}

type estimator struct{ shadow shadow }

func (e estimator) Shadow() kv.Shadow { return e.shadow }
func (estimator) Exact() bool         { return false }
