package duo

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// SinkSize and RecentSize are how many of the first and of the last tokens a streaming head sees.
	SinkSize   int `json:"sink_size"`
	RecentSize int `json:"recent_size"`
	// Threshold is the least score of a retrieval head.
	Threshold float64 `json:"threshold"`
	// Sparsity, if not -1, replaces Threshold by the share of heads that stream.
	Sparsity float64 `json:"sparsity"`
	// HeadsPath names a head file on the client, which is to put its scores under Heads: see Inline.
	HeadsPath string `json:"heads_path"`
	// Heads is a score in [0, 1] for each layer of the model and KV head.
	Heads [][]float64 `json:"heads"`
}

// Default is what the original's evaluations run with. Heads have no default.
func Default() *Config {
	return &Config{SinkSize: 64, RecentSize: 256, Threshold: .5, Sparsity: -1, Heads: [][]float64{}}
}

// Method is the entry for a registry.
func Method() selector.Method {
	return selector.Method{Type: "duo", Default: func() selector.Config { return Default() }}
}

// Validate implements selector.Config.
func (c *Config) Validate() error {
	if c.SinkSize < 0 || c.SinkSize > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "sink_size",
			"sink_size is %d, expected 0..%d tokens", c.SinkSize, math.MaxInt32)
	}
	if c.RecentSize < 1 || c.RecentSize > math.MaxInt32 {
		return fault.Newf(fault.Invalid, "recent_size",
			"recent_size is %d, expected 1..%d tokens", c.RecentSize, math.MaxInt32)
	}
	if !isShare(c.Threshold) {
		return fault.Newf(fault.Invalid, "threshold", "threshold is %v, expected a score in [0, 1]", c.Threshold)
	}
	if c.Sparsity != -1 && !isShare(c.Sparsity) {
		return fault.Newf(fault.Invalid, "sparsity",
			"sparsity is %v, expected a share of the heads in [0, 1], or -1 to use threshold", c.Sparsity)
	}
	switch {
	case len(c.Heads) > 0:
	case c.HeadsPath != "":
		return fault.Newf(fault.Invalid, "heads",
			"heads is missing, and heads_path names a file, which only a client opens: have it send the file's scores")
	default:
		return fault.Newf(fault.Invalid, "heads",
			"heads is missing: give a score for each layer and KV head, as training or calibration finds them")
	}
	for layer, scores := range c.Heads {
		field := fmt.Sprintf("heads[%d]", layer)
		if len(scores) == 0 || len(scores) != len(c.Heads[0]) {
			return fault.Newf(fault.Invalid, field,
				"layer %d has %d scores, layer 0 has %d: expected one for each KV head", layer, len(scores), len(c.Heads[0]))
		}
		for h, score := range scores {
			if !isShare(score) {
				return fault.Newf(fault.Invalid, fmt.Sprintf("%s[%d]", field, h), "score is %v, expected [0, 1]", score)
			}
		}
	}
	return nil
}

func isShare(x float64) bool { return x >= 0 && x <= 1 }

// New implements selector.Config.
func (c *Config) New() selector.Selector {
	return duo{sinks: c.SinkSize, recent: c.RecentSize, streams: c.streams()}
}

// streams tells the streaming heads, [layers][KV heads].
func (c *Config) streams() [][]bool {
	streams := make([][]bool, len(c.Heads))
	type head struct {
		layer, index int
		score        float64
	}
	var heads []head
	for layer, scores := range c.Heads {
		streams[layer] = make([]bool, len(scores))
		for h, score := range scores {
			streams[layer][h] = score < c.Threshold
			heads = append(heads, head{layer, h, score})
		}
	}
	if c.Sparsity == -1 {
		return streams
	}
	slices.SortStableFunc(heads, func(a, b head) int { return cmp.Compare(a.score, b.score) })
	n := len(heads)
	if c.Sparsity < 1 {
		n = int(math.Ceil(c.Sparsity * float64(n-1)))
	}
	for i, h := range heads {
		streams[h.layer][h.index] = i < n
	}
	return streams
}

type duo struct {
	sinks, recent int
	streams       [][]bool // [layers][KV heads]
}

var _ selector.Fitter = duo{}

func (duo) Shadow() kv.Shadow { return nil }

// Fits implements selector.Fitter.
func (d duo) Fits(layer int, g *kv.Geometry) error {
	if layer >= len(d.streams) {
		return fault.Newf(fault.Invalid, "heads",
			"layer %d has no scores, heads ends at layer %d: the scores are another model's", layer, len(d.streams)-1)
	}
	if n := len(d.streams[layer]); n != g.KVHeads {
		return fault.Newf(fault.Invalid, fmt.Sprintf("heads[%d]", layer),
			"layer %d has %d scores, expected one for each of its %d KV heads", layer, n, g.KVHeads)
	}
	return nil
}

// Select implements selector.Selector.
func (d duo) Select(dst []int32, row *selector.Row) []int32 {
	if row.Layer >= len(d.streams) || row.Head >= len(d.streams[row.Layer]) || !d.streams[row.Layer][row.Head] {
		return selector.All(dst, row)
	}
	return selector.Ends(dst, row, d.sinks, row.Budget(d.recent, -1))
}
