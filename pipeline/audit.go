package pipeline

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/attention"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/pruner/exact"
)

// audit is what Audit works with.
type audit struct {
	estimator       pruner.Row
	positions       []int32
	logits, weights matrix // [G][valid tokens]
	dense           []float32
}

// Audits says whether a row, of the sequence-th sequence of a step, is among those that Config.Audit
// picks. What it says depends on nothing else: the same step is audited alike each time.
func (c *Config) Audits(row *Row, sequence int) bool {
	if c.Audit <= 0 {
		return false
	}
	x := uint64(row.Layer)<<48 ^ uint64(row.KVHead)<<32 ^ uint64(sequence)<<24 ^ uint64(row.Len)
	// SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), on the golden ratio's multiple.
	x *= 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	x ^= x >> 31
	return float64(x>>11)*0x1p-53 < c.Audit
}

// Audit computes densely, too, the row that s has just run, and sets TrueMass and OutputError of its
// result. A row that was dense holds all the attention without error.
func (p *Pipeline) Audit(s *Scratch, row *Row, res *Result) {
	heads, n := len(res.Mass), row.Len-row.First
	res.TrueMass = slices.Grow(res.TrueMass[:0], heads)[:heads]
	res.OutputError = slices.Grow(res.OutputError[:0], heads)[:heads]
	if res.Path == Dense {
		for h := range heads {
			res.TrueMass[h], res.OutputError[h] = 1, 0
		}
		return
	}
	a := &s.audit
	a.positions = slices.Grow(a.positions[:0], n)[:n]
	for i := range a.positions {
		a.positions[i] = int32(row.First + i)
	}
	a.estimator = pruner.Row{
		Dim: p.geometry.KDim, Queries: s.scaled.rows, Keys: row.Keys, Vectors: a.estimator.Vectors,
	}
	logits, weights := a.logits.shape(heads, n), a.weights.shape(heads, n)
	new(exact.Config).New().Logits(logits, &a.estimator, a.positions)
	attention.Softcap(a.logits.flat, p.geometry.Softcap)
	copy(a.weights.flat, a.logits.flat)
	for h := range heads {
		attention.Exp(weights[h], vek32.Max(logits[h]))
		kept := 0.0
		for _, position := range res.Lists[h*len(res.Lists)/heads] {
			kept += float64(weights[h][int(position)-row.First])
		}
		res.TrueMass[h] = float32(kept / float64(vek32.Sum(weights[h])))
		res.OutputError[h] = float32(math.NaN())
	}
	if row.ListsOnly {
		return
	}
	a.dense = slices.Grow(a.dense[:0], len(res.Output))[:len(res.Output)]
	attention.Weighted(a.dense, &s.attention, &s.attended, a.positions, logits)
	for h := range heads {
		from, to := h*p.geometry.VDim, (h+1)*p.geometry.VDim
		res.OutputError[h] = relativeError(res.Output[from:to], a.dense[from:to])
	}
}

// relativeError is ||x-want|| / ||want||; 0 where both are 0.
func relativeError(x, want []float32) float32 {
	var off, norm float64
	for i := range x {
		d := float64(x[i]) - float64(want[i])
		off += d * d
		norm += float64(want[i]) * float64(want[i])
	}
	if off == 0 {
		return 0
	}
	return float32(math.Sqrt(off / norm))
}
