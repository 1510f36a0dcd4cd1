package ds

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/selector"
)

// Calibration finds the heavy channels of a model's heads. The zero value is ready.
type Calibration struct {
	sizes map[string][][]float64 // by name in a channel file: [heads][dim], summed over samples
}

// Add takes a sample. The size of a channel is
//
//	q   the mean of |q[d]|    k   the mean of |k[d]|    qk   the mean of |q[d] * k[d]| of one token
//
// as in the original project, which however takes q and k before RoPE. Samples of a layer weigh the
// same, whatever their length.
func (c *Calibration) Add(s *selector.Sample) error {
	if err := s.Check(); err != nil {
		return err
	}
	q, k, qk := zeros(s.QueryHeads, s.Dim), zeros(s.KVHeads, s.Dim), zeros(s.QueryHeads, s.Dim)
	tokens, asking := s.Tokens(), s.Asking()
	for h := range s.QueryHeads {
		keys := s.Head(h / s.Group())
		for i := range asking {
			key := keys[(tokens-asking+i)*s.Dim:]
			for d, x := range s.Query(i, h) {
				q[h][d] += math.Abs(float64(x)) / float64(asking)
				qk[h][d] += math.Abs(float64(x)*float64(key[d])) / float64(asking)
			}
		}
	}
	for h := range s.KVHeads {
		for i, x := range s.Head(h) {
			k[h][i%s.Dim] += math.Abs(float64(x)) / float64(tokens)
		}
	}
	for kind, sizes := range map[string][][]float64{"q": q, "k": k, "qk": qk} {
		if err := c.add(fmt.Sprintf("model.layers.%d.self_attn.%s_proj", s.Layer, kind), sizes); err != nil {
			return err
		}
	}
	return nil
}

func zeros(rows, columns int) [][]float64 {
	m := make([][]float64, rows)
	for r := range m {
		m[r] = make([]float64, columns)
	}
	return m
}

func (c *Calibration) add(name string, sizes [][]float64) error {
	if c.sizes == nil {
		c.sizes = make(map[string][][]float64)
	}
	sums, has := c.sizes[name]
	if !has {
		c.sizes[name] = sizes
		return nil
	}
	if len(sums) != len(sizes) || len(sums[0]) != len(sizes[0]) {
		return fmt.Errorf("%s has %d heads of %d channels in one sample and %d of %d in another, expected one model",
			name, len(sums), len(sums[0]), len(sizes), len(sizes[0]))
	}
	for h := range sums {
		for d, x := range sizes[h] {
			sums[h][d] += x
		}
	}
	return nil
}

// File returns what a channel file holds, as Inline reads it: for each layer and kind a list for each
// head of its channels, the heaviest first, the lower first among equals.
func (c *Calibration) File() map[string][][]int {
	file := make(map[string][][]int, len(c.sizes))
	for name, heads := range c.sizes {
		for _, sizes := range heads {
			order := make([]int, len(sizes))
			for d := range order {
				order[d] = d
			}
			slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(sizes[b], sizes[a]) })
			file[name] = append(file[name], order)
		}
	}
	return file
}
