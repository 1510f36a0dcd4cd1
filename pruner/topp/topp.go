package topp

import (
	"cmp"
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pruner"
)

// Config holds the method's keys. Threshold is Twilight's.
type Config struct {
	// Threshold is p, the share of softmax weight to keep, in (0, 1].
	Threshold float64 `json:"threshold"`
	pruner.Limits
}

// Default is the p of every config that Twilight ships. The paper uses 0.95 for LLaMA-2 and LLaMA-3,
// 0.85 for Longchat (section 5.1).
func Default() *Config { return &Config{Threshold: 0.85, Limits: pruner.NoLimits()} }

// Method is the entry for a registry.
func Method() pruner.Method {
	return pruner.Method{Type: "top_p", Default: func() pruner.Config { return Default() }}
}

// Validate implements pruner.Config.
func (c *Config) Validate() error {
	const expected = "p, the share of softmax weight to keep, in (0, 1]"
	if !isShare(c.Threshold) {
		return fault.Newf(fault.Invalid, "threshold", "threshold is %v, expected %s", c.Threshold, expected)
	}
	return c.Limits.Validate(isShare, expected)
}

func isShare(p float64) bool { return p > 0 && p <= 1 }

// New implements pruner.Config.
func (c *Config) New() pruner.Pruner { return &topP{c.Limits.New(c.Threshold)} }

type topP struct{ pruner.Limited }

var _ pruner.Limiter = &topP{}

func (t *topP) Prune(dst []int32, c *pruner.Candidates) []int32 {
	p := t.Threshold(c)
	if c.P > 0 {
		p = float64(c.P)
	}
	var sums [bins]float64
	for _, w := range c.Weights {
		sums[bin(w)] += float64(w)
	}
	total := 0.0
	for _, s := range sums {
		total += s
	}
	need := p * total * (1 + c.Outside)
	if need >= total { // with p = 1, also candidates too light to show in a sum
		for i := range c.Weights {
			dst = append(dst, int32(i))
		}
		return dst
	}

	sum, edge := 0.0, 0
	for ; sum+sums[edge] < need; edge++ {
		sum += sums[edge]
	}
	c.Scratch = c.Scratch[:0]
	for i, w := range c.Weights {
		if bin(w) == edge {
			c.Scratch = append(c.Scratch, int32(i))
		}
	}
	slices.SortFunc(c.Scratch, func(a, b int32) int {
		return cmp.Or(cmp.Compare(c.Weights[b], c.Weights[a]), cmp.Compare(a, b))
	})
	var last int32 // kept of the edge bin
	for _, last = range c.Scratch {
		if sum += float64(c.Weights[last]); sum >= need {
			break
		}
	}
	least := c.Weights[last]
	for i, w := range c.Weights {
		if w > least || w == least && int32(i) <= last {
			dst = append(dst, int32(i))
		}
	}
	return dst
}

const (
	octaves   = 32
	perOctave = 32
	bins      = octaves * perOctave
)

// bin places a weight, 0 for the largest; those below 2^-octaves share the last bin. A larger weight is
// never in a later bin.
func bin(w float32) int {
	const drop = 23 - 5 // mantissa bits beyond those that number the bins of an octave
	return min(max(0, (int(math.Float32bits(1))-int(math.Float32bits(w)))>>drop), bins-1)
}
