package duo

import (
	"bytes"
	"fmt"
	"math"
	"strconv"

	"github.com/twilight-sidecar/twilight/selector"
)

// Calibration scores a model's KV heads by how much they look at tokens that a streaming head does not
// see. The original trains a gate for each head on retrieval tasks, through the whole model; this needs
// keys and queries alone, and only approximates it: a head that rarely looks far may do so where it
// matters.
type Calibration struct {
	// SinkSize and RecentSize are how many of the first and of the last tokens a streaming head sees.
	SinkSize, RecentSize int

	layers map[int]*scores
}

// scores are a layer's, summed over samples.
type scores struct {
	sums    []float64 // [KV heads]
	samples int
}

// Add takes a sample, whose logits are scale * q.k. A head's score is the softmax weight of the tokens
// behind the first SinkSize and before the last RecentSize, as its queries see them; its mean over the
// queries of all query heads that share the head. Samples of a layer weigh the same.
func (c *Calibration) Add(s *selector.Sample, scale float64) error {
	if err := s.Check(); err != nil {
		return err
	}
	for layer, others := range c.layers {
		if len(others.sums) != s.KVHeads {
			return fmt.Errorf("layer %d has %d KV heads and layer %d has %d, expected one model",
				layer, len(others.sums), s.Layer, s.KVHeads)
		}
	}
	if c.layers == nil {
		c.layers = make(map[int]*scores)
	}
	own := c.layers[s.Layer]
	if own == nil {
		own = &scores{sums: make([]float64, s.KVHeads)}
		c.layers[s.Layer] = own
	}
	for i := range s.Asking() {
		seen := (s.Tokens() - s.Asking() + i + 1) * s.Dim
		for h := range s.QueryHeads {
			kvHead := h / s.Group()
			own.sums[kvHead] += c.far(s.Head(kvHead)[:seen], s.Query(i, h), scale) / float64(s.Asking()*s.Group())
		}
	}
	own.samples++
	return nil
}

// far is the weight that a query gives to those of the keys, [tokens][dim], that a streaming head does not
// see.
func (c *Calibration) far(keys, query []float32, scale float64) float64 {
	tokens := len(keys) / len(query)
	logits, highest := make([]float64, tokens), math.Inf(-1)
	for t := range logits {
		for d, q := range query {
			logits[t] += scale * float64(q) * float64(keys[t*len(query)+d])
		}
		highest = max(highest, logits[t])
	}
	all, far := 0.0, 0.0
	for t, logit := range logits {
		weight := math.Exp(logit - highest)
		all += weight
		if t >= c.SinkSize && t < tokens-c.RecentSize {
			far += weight
		}
	}
	return far / all
}

// File returns a head file, as Inline reads it: a line for each layer up to the last one that was sampled.
// Layers in between that were not have the scores of the nearest that was, the lower of two: scores of any
// other kind would shift the ranks that sparsity cuts by.
func (c *Calibration) File() []byte {
	layers, kvHeads := 0, 0
	for layer, s := range c.layers {
		layers, kvHeads = max(layers, layer+1), len(s.sums)
	}
	var file bytes.Buffer
	for layer := range layers {
		s := c.nearest(layer)
		for h := range kvHeads {
			if h > 0 {
				file.WriteByte('\t')
			}
			file.WriteString(strconv.FormatFloat(s.sums[h]/float64(s.samples), 'e', 18, 64))
		}
		file.WriteByte('\n')
	}
	return file.Bytes()
}

// nearest returns the scores of the sampled layer nearest to a layer. There is one.
func (c *Calibration) nearest(layer int) *scores {
	for away := 0; ; away++ {
		for _, at := range []int{layer - away, layer + away} {
			if s := c.layers[at]; s != nil {
				return s
			}
		}
	}
}
