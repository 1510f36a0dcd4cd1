package selector

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// All appends every valid position of a row to dst.
func All(dst []int32, row *Row) []int32 {
	for p := row.First; p < row.Len; p++ {
		dst = append(dst, int32(p))
	}
	return dst
}

// Ends appends a row's first and last valid positions to dst, as many as said of each, each once.
func Ends(dst []int32, row *Row, first, last int) []int32 {
	recent := max(row.First, row.Len-last)
	for p := row.First; p < min(row.First+first, recent); p++ {
		dst = append(dst, int32(p))
	}
	for p := recent; p < row.Len; p++ {
		dst = append(dst, int32(p))
	}
	return dst
}

// Top appends to dst the budget positions of a row that have the largest scores, ascending; scores[i] is
// that of position First+i. Ties go to the lower position. The tokens of pinned chunks come first and
// count towards the budget, which is at least their number. A score that is not finite ranks before all
// others, so that what is wrong with a token is seen. Top overwrites scores, and makes them the row's Ranking.
func Top(dst []int32, row *Row, scores []float32, budget int) []int32 {
	if budget >= len(scores) {
		return All(dst, row)
	}
	if !isFinite(vek32.Sum(scores)) {
		for i, s := range scores {
			if !isFinite(s) {
				scores[i] = math.MaxFloat32
			}
		}
	}
	pins := row.pin(scores)
	row.Ranking = Ranking{Unit: 1, Scores: scores}
	return row.Ranking.Take(dst, row, max(budget, pins))
}

// pin gives the tokens of pinned chunks the score +Inf and counts them.
func (r *Row) pin(scores []float32) (pins int) {
	pinned := float32(math.Inf(1))
	set := func(from, to int) {
		for i := max(from, r.First) - r.First; i < min(to, r.Len)-r.First; i++ {
			if scores[i] != pinned {
				scores[i] = pinned
				pins++
			}
		}
	}
	if r.PinFirst {
		chunk := r.First / kv.ChunkTokens * kv.ChunkTokens
		set(chunk, chunk+kv.ChunkTokens)
	}
	if r.PinCurrent {
		chunk := (r.Len - 1) / kv.ChunkTokens * kv.ChunkTokens
		set(chunk, chunk+kv.ChunkTokens)
	}
	return pins
}

// Sum writes the sum of a row's queries to dst, [Dim]. Logits being linear, the sum of a token's logits
// is its logit with that.
func (r *Row) Sum(dst []float32) {
	copy(dst, r.Queries[0])
	for _, query := range r.Queries[1:] {
		vek32.Add_Inplace(dst, query)
	}
}

// ExactBlock is how many keys Exact reads at a time.
const ExactBlock = 64

// Exact writes query.key(p) for the valid positions p of a row to scores, [Len-First], from the keys
// themselves. keys is memory for ExactBlock of them.
func Exact(scores []float32, row *Row, query, keys []float32) {
	for from := row.First; from < row.Len; from += ExactBlock {
		to := min(from+ExactBlock, row.Len)
		some := keys[:(to-from)*row.Dim]
		row.Keys.Read(some, from, to)
		row.KeysRead += to - from
		vek32.MatMul_Into(scores[from-row.First:][:to-from], some, query, row.Dim)
	}
}

// Floats returns n floats of the scratch, of any content. They are the method's until the next call.
func (s *Scratch) Floats(n int) []float32 {
	s.F32 = slices.Grow(s.F32[:0], n)[:n]
	return s.F32
}

// Take cuts the first n elements off what s points to.
func Take(s *[]float32, n int) []float32 {
	taken := (*s)[:n:n]
	*s = (*s)[n:]
	return taken
}

func isFinite(f float32) bool { return f-f == 0 }
