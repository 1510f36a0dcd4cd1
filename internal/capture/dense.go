package capture

import (
	"fmt"
	"math"
	"slices"
)

// Scratch is the memory that Dense works in. The zero value is ready; one Scratch serves one
// goroutine.
type Scratch struct {
	query, weights, out []float64
}

// Dense computes softmax attention in float64 over everything that a decode step may see, tokens
// 0..N+step:
//
//	weights[t] = exp(Scale*q.k[t]) / sum over u of exp(Scale*q.k[u])    [N+step+1]
//	out        = sum over t of weights[t]*v[t]                          [VDim]
//
// layer counts within c.Layers, head is a query head. Both results lie in s and last until its next
// use; with a nil s they are the caller's.
func (c *Capture) Dense(layer, step, head int, s *Scratch) (out, weights []float64) {
	if s == nil {
		s = new(Scratch)
	}
	kvHead, tokens := head/c.Group(), c.N+step+1
	keys, values := c.Keys(layer, kvHead), c.Values(layer, kvHead)

	s.query = s.query[:0]
	for _, x := range c.Query(layer, step, head) {
		s.query = append(s.query, c.Scale*float64(x))
	}
	weights = slices.Grow(s.weights[:0], tokens)[:tokens]
	highest := math.Inf(-1)
	for t := range weights {
		weights[t] = dot(s.query, row(keys, t, c.KDim))
		highest = max(highest, weights[t])
	}
	sum := 0.0
	for t, logit := range weights {
		weights[t] = math.Exp(logit - highest)
		sum += weights[t]
	}
	out = slices.Grow(s.out[:0], c.VDim)[:c.VDim]
	clear(out)
	for t := range weights {
		weights[t] /= sum
		accumulate(out, weights[t], row(values, t, c.VDim))
	}
	s.weights, s.out = weights, out
	return out, weights
}

// dot keeps four sums so that an addition need not wait for the one before it.
func dot(a []float64, b []float32) float64 {
	var s0, s1, s2, s3 float64
	for ; len(a) >= 4 && len(b) >= 4; a, b = a[4:], b[4:] {
		s0 += a[0] * float64(b[0])
		s1 += a[1] * float64(b[1])
		s2 += a[2] * float64(b[2])
		s3 += a[3] * float64(b[3])
	}
	for i, x := range a {
		s0 += x * float64(b[i])
	}
	return s0 + s1 + (s2 + s3)
}

// accumulate adds w*v to out.
func accumulate(out []float64, w float64, v []float32) {
	for i, x := range v[:len(out)] {
		out[i] += w * float64(x)
	}
}

// Budget returns the fewest tokens whose weights sum to at least p, and all of them if rounding
// keeps the whole sum below p.
func Budget(weights []float64, p float64) int {
	sorted := slices.Sorted(slices.Values(weights))
	sum := 0.0
	for n := range sorted {
		if sum >= p {
			return n
		}
		sum += sorted[len(sorted)-1-n]
	}
	return len(sorted)
}

// Mass returns the sum of the weights at the given positions. The positions come from elsewhere:
// unless they are ascending and within the weights, so that none counts twice, it is an error.
func Mass(weights []float64, positions []int32) (float64, error) {
	mass, last := 0.0, int32(-1)
	for _, p := range positions {
		if p <= last || int(p) >= len(weights) {
			return 0, fmt.Errorf("capture: position %d after %d, expected ascending positions below %d",
				p, last, len(weights))
		}
		mass += weights[p]
		last = p
	}
	return mass, nil
}

// RelErr pools the relative error ||out-dense||/||dense|| over any number of outputs: the root of
// the summed squared differences over the root of the summed squares. The zero value has none.
type RelErr struct {
	diff, norm float64 // sums of squares
}

// Add counts an output, both slices of the same length. A NaN in out makes the value NaN.
func (e *RelErr) Add(out []float32, dense []float64) {
	for i, want := range dense {
		d := float64(out[i]) - want
		e.diff += d * d
		e.norm += want * want
	}
}

// Merge counts all that other counted.
func (e *RelErr) Merge(other RelErr) {
	e.diff += other.diff
	e.norm += other.norm
}

// Value returns the error: 0 if nothing differs, +Inf if all dense outputs were zero and out was
// not.
func (e RelErr) Value() float64 {
	if e.diff == 0 {
		return 0
	}
	return math.Sqrt(e.diff) / math.Sqrt(e.norm)
}
