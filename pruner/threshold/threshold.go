package threshold

import (
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pruner"
)

// Config holds the method's keys. Threshold is Twilight's.
type Config struct {
	// Threshold is t, how far below the first token's logit is kept. It may be negative. There is no
	// default.
	Threshold float64 `json:"threshold"`
	pruner.Limits
}

// Method is the entry for a registry.
func Method() pruner.Method {
	return pruner.Method{
		Type:    "threshold",
		Default: func() pruner.Config { return &Config{Threshold: math.NaN(), Limits: pruner.NoLimits()} },
	}
}

// Validate implements pruner.Config.
func (c *Config) Validate() error {
	const expected = "a number that float32 can hold"
	if err := c.Limits.Validate(isFloat32, expected); err != nil {
		return err
	}
	if math.IsNaN(c.Threshold) {
		return fault.Newf(fault.Invalid, "threshold",
			"threshold is missing and has no default: say how far below the first token's logit is kept")
	}
	if !isFloat32(c.Threshold) {
		return fault.Newf(fault.Invalid, "threshold", "threshold is %v, expected %s", c.Threshold, expected)
	}
	return nil
}

func isFloat32(t float64) bool { return math.Abs(t) <= math.MaxFloat32 }

// New implements pruner.Config.
func (c *Config) New() pruner.Pruner { return &threshold{c.Limits.New(c.Threshold)} }

type threshold struct{ pruner.Limited }

var _ pruner.Limiter = &threshold{}

func (t *threshold) Prune(dst []int32, c *pruner.Candidates) []int32 {
	least, kept, best := c.FirstLogit-float32(t.Threshold(c)), len(dst), 0
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
