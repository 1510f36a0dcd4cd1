package topp

import (
	"cmp"
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/simd"
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
	total := weight(c.Weights)
	need := p * total * (1 + c.Outside)
	if need >= total { // with p = 1, also candidates too light to show in a sum
		for i := range c.Weights {
			dst = append(dst, int32(i))
		}
		return dst
	}

	// Weights below this are set aside: together they are less than what may be left out.
	least := float32((total - need) / float64(len(c.Weights)) * (1 - 1e-6))
	c.Scratch = simd.AtLeast(c.Scratch[:0], c.Weights, least)
	heavy := c.Scratch
	var sums [bins]float64
	for _, i := range heavy {
		w := c.Weights[i]
		sums[bin(w)] += float64(w)
	}
	sum, edge := 0.0, 0
	for ; edge < bins-1 && sum+sums[edge] < need; edge++ {
		sum += sums[edge]
	}
	for _, i := range heavy {
		if bin(c.Weights[i]) == edge {
			c.Scratch = append(c.Scratch, i)
		}
	}
	atEdge := c.Scratch[len(heavy):]
	slices.SortFunc(atEdge, func(a, b int32) int {
		return cmp.Or(cmp.Compare(c.Weights[b], c.Weights[a]), cmp.Compare(a, b))
	})
	var last int32 // kept of the edge bin
	for _, last = range atEdge {
		if sum += float64(c.Weights[last]); sum >= need {
			break
		}
	}
	least = c.Weights[last]
	for _, i := range heavy {
		if w := c.Weights[i]; w > least || w == least && i <= last {
			dst = append(dst, i)
		}
	}
	return dst
}

// weight adds up weights, blocks of which are few enough to lose nothing in float32 that matters.
func weight(weights []float32) (total float64) {
	for some := range slices.Chunk(weights, 256) {
		total += float64(vek32.Sum(some))
	}
	return total
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
