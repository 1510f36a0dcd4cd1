package quest

import (
	"math"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/simd"
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
	f32 := row.Scratch.Floats(heads*(2*dim+chunks) + max(2*2*dim, chunks))

	// With q split by sign, the bound is one dot product with the record.
	matrix := row.Ranking.Bounds[:0]
	for _, query := range row.Queries {
		signed := selector.Take(&f32, 2*dim)
		vek32.MaximumNumber_Into(signed[:dim], query, 0)
		vek32.MinimumNumber_Into(signed[dim:], query, 0)
		matrix = append(matrix, signed)
	}
	for range heads {
		matrix = append(matrix, selector.Take(&f32, chunks))
	}
	signed, bounds := matrix[:heads], matrix[heads:]
	if q.ChunkSize == kv.ChunkTokens {
		ask(bounds, signed, row.Records, first)
	} else {
		q.askMany(bounds, signed, row, first, f32)
	}
	scores := f32[:chunks]
	clear(scores)
	for _, b := range bounds {
		if !isFinite(vek32.Sum(b)) {
			for c := range b {
				if !isFinite(b[c]) {
					b[c] = float32(math.Inf(1))
				}
			}
		}
		vek32.Add_Inplace(scores, b)
	}
	vek32.MinimumNumber_Inplace(scores, math.MaxFloat32)
	row.Ranking.Bounds = append(matrix[:0], bounds...)
	return scores
}

// ask multiplies the records of chunks from first on by queries split by sign.
func ask(bounds, signed [][]float32, records kv.Records, first int) {
	const block = 256
	var some [block + simd.Ahead][]byte
	chunks := len(bounds[0])
	for at := 0; at < chunks; at += block {
		n := min(len(some), chunks-at)
		for i := range some[:n] {
			some[i] = records.Chunk(first + at + i)
		}
		simd.Dots(simd.F16, bounds, at, signed, some[:n], min(block, n))
	}
}

// askMany is ask for chunks of several records. merged is memory for two of these.
func (q quest) askMany(bounds, signed [][]float32, row *selector.Row, first int, merged []float32) {
	dim := row.Dim
	record, other := merged[:2*dim], merged[2*dim:][:2*dim]
	for c := range bounds[0] {
		from := max(row.First, (first+c)*q.ChunkSize) / kv.ChunkTokens
		to := ceilDiv(min(row.Len, (first+c+1)*q.ChunkSize), kv.ChunkTokens)
		kv.F16.Decode(record, row.Records.Chunk(from))
		for s := from + 1; s < to; s++ {
			kv.F16.Decode(other, row.Records.Chunk(s))
			vek32.Maximum_Inplace(record[:dim], other[:dim])
			vek32.Minimum_Inplace(record[dim:], other[dim:])
		}
		for h := range bounds {
			bounds[h][c] = vek32.Dot(signed[h], record)
		}
	}
}

func isFinite(f float32) bool { return f-f == 0 }

func ceilDiv(a, b int) int { return (a + b - 1) / b }
