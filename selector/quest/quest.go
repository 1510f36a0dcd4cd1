package quest

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

type quest struct{ Config }

func (quest) Shadow() kv.Shadow { return extremes{} }

// Ranks implements selector.Ranker.
func (quest) Ranks() selector.Scale { return selector.Logits }

// Select implements selector.Selector. It sets row.Bounds unless every token is a candidate.
func (q quest) Select(dst []int32, row *selector.Row) []int32 {
	row.Bounds = row.Bounds[:0]
	first, end := row.First/q.ChunkSize, ceilDiv(row.Len, q.ChunkSize) // chunks of ChunkSize
	keep := max(1, ceilDiv(q.budget(row), q.ChunkSize))
	if keep >= end-first {
		return q.positions(dst, row, first, end)
	}
	scores := q.score(row, first, end)
	pinned := float32(math.Inf(1))
	pins := 0
	if row.PinFirst {
		scores[0] = pinned
		pins++
	}
	if last := &scores[len(scores)-1]; row.PinCurrent && *last != pinned {
		*last = pinned
		pins++
	}
	cut, ties := selector.Cut(scores, max(keep, pins))
	for i, s := range scores {
		if s < cut || s == cut && ties == 0 {
			continue
		}
		if s == cut {
			ties--
		}
		dst = q.positions(dst, row, first+i, first+i+1)
	}
	return dst
}

func (q quest) budget(row *selector.Row) int {
	switch {
	case row.TokenBudget > 0:
		return row.TokenBudget
	case q.SparsityRate > 0:
		return int(math.Ceil(q.SparsityRate * float64(row.Len-row.First)))
	}
	return q.TokenBudget
}

// positions appends the row's valid positions in the chunks from..to.
func (q quest) positions(dst []int32, row *selector.Row, from, to int) []int32 {
	for p := max(row.First, from*q.ChunkSize); p < min(row.Len, to*q.ChunkSize); p++ {
		dst = append(dst, int32(p))
	}
	return dst
}

// score returns what the chunks first..end of ChunkSize are ranked by: finite, or MaxFloat32 for those
// without a finite bound. It sets row.Bounds, in which the shadow chunks within one of ours all have
// its bound.
func (q quest) score(row *selector.Row, first, end int) []float32 {
	firstShadow := row.First / kv.ChunkTokens
	shadows := ceilDiv(row.Len, kv.ChunkTokens) - firstShadow
	heads, dim := len(row.Queries), row.Dim

	f32 := slices.Grow(row.Scratch.F32[:0], heads*(2*dim+shadows)+2*2*dim+end-first)
	row.Scratch.F32 = f32
	take := func(n int) []float32 {
		f32 = f32[:n]
		taken := f32[:n:n]
		f32 = f32[n:]
		return taken
	}

	// With q split by sign, the bound is one dot product with the record.
	signed := take(heads * 2 * dim)
	for h, query := range row.Queries {
		positive, negative := signed[2*h*dim:][:dim], signed[(2*h+1)*dim:][:dim]
		vek32.MaximumNumber_Into(positive, query, 0)
		vek32.MinimumNumber_Into(negative, query, 0)
		row.Bounds = append(row.Bounds, take(shadows))
	}
	record, other, scores := take(2*dim), take(2*dim), take(end-first)
	for c := first; c < end; c++ {
		from := max(row.First, c*q.ChunkSize)/kv.ChunkTokens - firstShadow
		to := ceilDiv(min(row.Len, (c+1)*q.ChunkSize), kv.ChunkTokens) - firstShadow
		kv.F16.Decode(record, row.Records.Chunk(firstShadow+from))
		for s := from + 1; s < to; s++ {
			kv.F16.Decode(other, row.Records.Chunk(firstShadow+s))
			vek32.Maximum_Inplace(record[:dim], other[:dim])
			vek32.Minimum_Inplace(record[dim:], other[dim:])
		}
		sum := float32(0)
		for h, bounds := range row.Bounds {
			bound := vek32.Dot(signed[2*h*dim:][:2*dim], record)
			if !isFinite(bound) {
				bound = float32(math.Inf(1))
			}
			sum += bound
			for s := from; s < to; s++ {
				bounds[s] = bound
			}
		}
		if !isFinite(sum) {
			sum = math.MaxFloat32
		}
		scores[c-first] = sum
	}
	return scores
}

func isFinite(f float32) bool { return f-f == 0 }

func ceilDiv(a, b int) int { return (a + b - 1) / b }
