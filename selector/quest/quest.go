package quest

import (
	"math"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

type quest struct{ Config }

var _ selector.Ranker = quest{}

func (quest) Shadow() kv.Shadow { return extremes{} }

// Unit implements selector.Ranker.
func (q quest) Unit() int { return q.ChunkSize }

// Select implements selector.Selector.
func (q quest) Select(dst []int32, row *selector.Row) []int32 {
	first, end := row.First/q.ChunkSize, ceilDiv(row.Len, q.ChunkSize) // chunks of ChunkSize
	keep := max(1, ceilDiv(row.Budget(q.TokenBudget, q.SparsityRate), q.ChunkSize))
	if keep >= end-first {
		return selector.All(dst, row)
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
	row.Ranking.Unit, row.Ranking.Scores = q.ChunkSize, scores
	return row.Ranking.Take(dst, row, max(keep, pins))
}

// score returns what the chunks first..end of ChunkSize are ranked by: finite, or MaxFloat32 for those
// without a finite bound. It sets the Ranking's bounds.
func (q quest) score(row *selector.Row, first, end int) []float32 {
	heads, dim, chunks := len(row.Queries), row.Dim, end-first
	f32 := row.Scratch.Floats(heads*(2*dim+chunks) + 2*2*dim + chunks)

	// With q split by sign, the bound is one dot product with the record.
	signed := selector.Take(&f32, heads*2*dim)
	for h, query := range row.Queries {
		positive, negative := signed[2*h*dim:][:dim], signed[(2*h+1)*dim:][:dim]
		vek32.MaximumNumber_Into(positive, query, 0)
		vek32.MinimumNumber_Into(negative, query, 0)
		row.Ranking.Bounds = append(row.Ranking.Bounds, selector.Take(&f32, chunks))
	}
	record, other, scores := selector.Take(&f32, 2*dim), selector.Take(&f32, 2*dim), selector.Take(&f32, chunks)
	for c := range chunks {
		from := max(row.First, (first+c)*q.ChunkSize) / kv.ChunkTokens
		to := ceilDiv(min(row.Len, (first+c+1)*q.ChunkSize), kv.ChunkTokens)
		kv.F16.Decode(record, row.Records.Chunk(from))
		for s := from + 1; s < to; s++ {
			kv.F16.Decode(other, row.Records.Chunk(s))
			vek32.Maximum_Inplace(record[:dim], other[:dim])
			vek32.Minimum_Inplace(record[dim:], other[dim:])
		}
		sum := float32(0)
		for h, bounds := range row.Ranking.Bounds {
			bounds[c] = vek32.Dot(signed[2*h*dim:][:2*dim], record)
			if !isFinite(bounds[c]) {
				bounds[c] = float32(math.Inf(1))
			}
			sum += bounds[c]
		}
		if !isFinite(sum) {
			sum = math.MaxFloat32
		}
		scores[c] = sum
	}
	return scores
}

func isFinite(f float32) bool { return f-f == 0 }

func ceilDiv(a, b int) int { return (a + b - 1) / b }
