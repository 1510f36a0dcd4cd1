package snapkv

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/attention"
	"github.com/twilight-sidecar/twilight/compressor"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/selector"
)

// Config holds the method's keys.
type Config struct {
	// WindowSize is how many of the prompt's last queries are looked at; their tokens are kept.
	WindowSize int `json:"window_size"`
	// MaxCapacityPrompt is how many tokens of a prompt are kept, the window's among them.
	MaxCapacityPrompt int `json:"max_capacity_prompt"`
	// KernelSize is over how many adjacent positions scores are pooled: an odd number.
	KernelSize int `json:"kernel_size"`
	// Pooling is how: "avgpool" or "maxpool".
	Pooling string `json:"pooling"`
}

// The ways to pool.
const (
	avgPool = "avgpool"
	maxPool = "maxpool"
)

// Default is what Twilight and the original's code default to.
func Default() *Config {
	return &Config{WindowSize: 64, MaxCapacityPrompt: 320, KernelSize: 5, Pooling: avgPool}
}

// Method is the entry for a registry.
func Method() compressor.Method {
	return compressor.Method{Type: "snap_kv", Default: func() compressor.Config { return Default() }}
}

// maxWindow is what a message can carry.
const maxWindow = 4096

// Validate implements compressor.Config.
func (c *Config) Validate() error {
	switch {
	case c.WindowSize < 1 || c.WindowSize > maxWindow:
		return fault.Newf(fault.Invalid, "window_size", "window_size is %d, expected 1..%d queries", c.WindowSize, maxWindow)
	case c.MaxCapacityPrompt <= c.WindowSize || c.MaxCapacityPrompt > math.MaxInt32:
		return fault.Newf(fault.Invalid, "max_capacity_prompt",
			"max_capacity_prompt is %d, expected more than window_size, %d, and at most %d tokens",
			c.MaxCapacityPrompt, c.WindowSize, math.MaxInt32)
	case c.KernelSize < 1 || c.KernelSize > maxWindow || c.KernelSize%2 == 0:
		return fault.Newf(fault.Invalid, "kernel_size",
			"kernel_size is %d, expected an odd number of positions in 1..%d", c.KernelSize, maxWindow)
	case c.Pooling != avgPool && c.Pooling != maxPool:
		return fault.Newf(fault.Invalid, "pooling", "pooling is %q, expected %q or %q", c.Pooling, avgPool, maxPool)
	}
	return nil
}

// New implements compressor.Config.
func (c *Config) New() compressor.Compressor { return snapKV{*c} }

type snapKV struct{ Config }

func (s snapKV) Window() int { return s.WindowSize }

func (s snapKV) KeepsAll(n int) bool { return n <= s.MaxCapacityPrompt }

// Compress implements compressor.Compressor.
func (s snapKV) Compress(dst []int32, row *compressor.Row) []int32 {
	n, window := row.Len-row.First, s.WindowSize
	before := n - window
	row.Scratch = slices.Grow(row.Scratch[:0], (window+2)*n+selector.ExactBlock*row.Dim)
	f32 := row.Scratch[:cap(row.Scratch)]
	logits, scores, pooled := selector.Take(&f32, window*n), selector.Take(&f32, before), selector.Take(&f32, before)
	clear(scores)
	for _, queries := range row.Queries {
		s.logits(logits, row, queries, f32)
		for w := range window {
			weights := logits[w*n:][:before+w+1]
			attention.Softcap(weights, row.Softcap)
			attention.Exp(weights, vek32.Max(weights))
			vek32.MulNumber_Inplace(weights, 1/vek32.Sum(weights))
			vek32.Add_Inplace(scores, weights[:before])
		}
	}
	s.pool(pooled, scores)
	cut, ties := selector.Cut(pooled, s.MaxCapacityPrompt-window)
	for i, score := range pooled {
		if score < cut || score == cut && ties == 0 {
			continue
		}
		if score == cut {
			ties--
		}
		dst = append(dst, int32(row.First+i))
	}
	for p := row.Len - window; p < row.Len; p++ {
		dst = append(dst, int32(p))
	}
	return dst
}

// logits writes the logits of a query head's window, [window][n], reading keys a block at a time.
func (s snapKV) logits(logits []float32, row *compressor.Row, queries, keys []float32) {
	n := row.Len - row.First
	for from := 0; from < n; from += selector.ExactBlock {
		to := min(from+selector.ExactBlock, n)
		some := keys[:(to-from)*row.Dim]
		row.Keys.Read(some, row.First+from, row.First+to)
		for w := range s.WindowSize {
			vek32.MatMul_Into(logits[w*n+from:][:to-from], some, queries[w*row.Dim:][:row.Dim], row.Dim)
		}
	}
}

// pool pools scores over kernel_size positions. One that is not finite counts as the largest there is, so
// that as many tokens are kept as ever.
func (s snapKV) pool(dst, scores []float32) {
	half := s.KernelSize / 2
	for i := range scores {
		some := scores[max(0, i-half):min(len(scores), i+half+1)]
		if s.Pooling == maxPool {
			dst[i] = vek32.Max(some)
		} else {
			dst[i] = vek32.Sum(some) / float32(s.KernelSize)
		}
		if dst[i]-dst[i] != 0 {
			dst[i] = math.MaxFloat32
		}
	}
}
