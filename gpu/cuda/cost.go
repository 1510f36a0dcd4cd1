//go:build linux && cgo && cuda

package cuda

import (
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/kv"
)

// cost is what it takes to run rows in one way: microseconds to run any, and bytes at a share of the
// bandwidth.
type cost struct{ fixed, share float64 }

// The ways, as an H100 runs them; what other devices take for a byte scales with their bandwidth. dense and
// fused are the kernels on the tensor cores.
var (
	denseCost  = cost{5, .92}
	plainCost  = cost{15, .5} // dense rows by the chain
	fusedCost  = cost{31, .72}
	chainCost  = cost{70, .3}
	keptByTopP = .012 // of all tokens, what top-p leaves a head, about
)

func (c cost) micros(bytes, bandwidth float64) float64 {
	return c.fixed + bytes/(c.share*bandwidth)*1e6
}

// crossover returns the number of valid tokens from which the current step's rows are to run sparsely: those
// below are as fast by dense attention, all things taken together.
func (c *cache) crossover() int {
	l, bandwidth := c.lease, c.lease.device.bandwidth
	lengths := make([]int, 0, len(c.tracker.Rows()))
	for _, row := range c.tracker.Rows() {
		if row.Len > 0 {
			lengths = append(lengths, row.Len-row.First)
		}
	}
	slices.Sort(lengths)
	dense, sparse := plainCost, chainCost
	if _, ok := l.dense[c.spec.DType]; ok {
		dense = denseCost
	}
	if l.fused.serves(c.spec.DType) {
		sparse = fusedCost
	}
	rest := 0.0 // bytes of the rows that are sparse
	for _, n := range lengths {
		rest += c.sparseBytes(n)
	}
	below := 0.0 // and of those that are dense
	from, best := 0, sparse.micros(rest, bandwidth)
	for i, n := range lengths {
		below += c.denseBytes(n)
		rest -= c.sparseBytes(n)
		took := dense.micros(below, bandwidth)
		if i+1 < len(lengths) {
			if lengths[i+1] == n {
				continue
			}
			took += sparse.micros(rest, bandwidth)
		}
		if took <= best {
			from, best = n+1, took
		}
	}
	return from
}

// denseBytes and sparseBytes are what a sequence of n valid tokens has to read, over all of a layer's heads.
func (c *cache) denseBytes(n int) float64 {
	g := &c.lease.geometry
	return float64(c.lease.lists()*n) * float64((g.KDim+g.VDim)*c.spec.DType.Size())
}

func (c *cache) sparseBytes(n int) float64 {
	l := c.lease
	g, m := &l.geometry, &l.method
	selector, estimator := m.pipeline.Shadows()
	candidates := float64(min(m.tokens(n, 0), n))
	kept := candidates
	if m.prunes != kernels.PruneNone {
		kept = min(kept, keptByTopP*math.Sqrt(float64(l.asking()))*float64(n))
	}
	element := float64(c.spec.DType.Size())
	bytes := kept * float64(g.KDim+g.VDim) * element
	if selector != nil {
		bytes += float64(n) * float64(selector.ChunkBytes(g.KDim)) / kv.ChunkTokens
	} else if m.ranksTokens() {
		bytes += float64(n*g.KDim) * element
	}
	if estimator != nil {
		bytes += candidates * float64(estimator.ChunkBytes(g.KDim)) / kv.ChunkTokens
	} else {
		bytes += candidates * float64(g.KDim) * element
	}
	return float64(l.lists()) * bytes
}

// lists is how many list rows a sequence has.
func (l *lease) lists() int { return l.geometry.QueryHeads / l.asking() }
