package threshold

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pruner"
)

// Config holds the method's key.
type Config struct {
	// Threshold is t, in units of logits. It may be negative. There is no default.
	Threshold float64 `json:"threshold"`
}

// Method is the entry for a registry.
func Method() pruner.Method {
	return pruner.Method{
		Type:    "threshold",
		Default: func() pruner.Config { return &Config{Threshold: math.NaN()} },
	}
}

// Validate implements pruner.Config.
func (c *Config) Validate() error {
	if math.IsNaN(c.Threshold) {
		return fault.Newf(fault.Invalid, "threshold",
			"threshold is missing and has no default: say how far below the first token's logit is kept")
	}
	if math.Abs(c.Threshold) > math.MaxFloat32 {
		return fault.Newf(fault.Invalid, "threshold", "threshold is %v, expected a float32", c.Threshold)
	}
	return nil
}

// New implements pruner.Config.
func (c *Config) New() pruner.Pruner { return threshold{float32(c.Threshold)} }

type threshold struct{ t float32 }

func (p threshold) Prune(dst []int32, c *pruner.Candidates) []int32 {
	least, kept, best := c.FirstLogit-p.t, len(dst), 0
	for i, l := range c.Logits {
		if l > least {
			dst = append(dst, int32(i))
		}
		if l > c.Logits[best] {
			best = i
		}
	}
	if len(dst) == kept {
		dst = append(dst, int32(best))
	}
	return dst
}
