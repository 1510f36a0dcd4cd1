package attention

import (
	"math"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// Row is what attention looks at: one KV head of one sequence and the query heads that share it. It is
// only read.
type Row struct {
	// Queries holds the query heads, [G][KDim], each multiplied by the softmax scale.
	Queries      [][]float32
	Keys, Values kv.Reader
	Softcap      float32   // 0: none
	Sinks        []float32 // nil, or one logit for each query
}

// Scratch is memory that is reused from call to call. The zero value is ready; one Scratch serves one
// goroutine.
type Scratch struct {
	vectors kv.Vectors
	logits  matrix    // [G][n]
	sums    matrix    // [G][VDim], of a block
	shifts  []float32 // [G]
	totals  []float64 // [G]
}

// Dense attends over the positions [first, end), at least one, and writes out [G][VDim].
func Dense(out []float32, s *Scratch, row *Row, first, end int) {
	attend(out, s, row, tokens{first: first, n: end - first})
}

// Sparse attends over the listed positions, at least one, and writes out [G][VDim]. Over all positions,
// ascending, it gives the bits that Dense gives.
func Sparse(out []float32, s *Scratch, row *Row, positions []int32) {
	attend(out, s, row, tokens{list: positions, n: len(positions)})
}

// Weighted is Sparse with logits [G][len(positions)] that are already known, scaled and softcapped. It
// reads no keys. logits is overwritten.
func Weighted(out []float32, s *Scratch, row *Row, positions []int32, logits [][]float32) {
	combine(out, s, row, tokens{list: positions, n: len(positions)}, logits)
}

// tokens are n positions: a list or, if that is nil, those from first on.
type tokens struct {
	list     []int32
	first, n int
}

// locate finds the vectors of the i-th to j-th token, and those that come next.
func (t tokens) locate(v *kv.Vectors, r kv.Reader, i, j int) {
	j = min(j+kv.Ahead, t.n)
	if t.list != nil {
		r.LocateAt(v, t.list[i:j])
		return
	}
	r.Locate(v, t.first+i, t.first+j)
}

// block is how many tokens are worked on at a time: their weights stay in the first cache, and sums of sums
// of so many lose little.
const block = 256

func attend(out []float32, s *Scratch, row *Row, t tokens) {
	logits := s.logits.shape(len(row.Queries), t.n)
	for i := 0; i < t.n; i += block {
		j := min(i+block, t.n)
		t.locate(&s.vectors, row.Keys, i, j)
		s.vectors.Dots(logits, i, row.Queries, j-i)
	}
	for _, l := range logits {
		Softcap(l, row.Softcap)
	}
	combine(out, s, row, t, logits)
}

// combine sums values by the softmax of the logits, which it overwrites.
func combine(out []float32, s *Scratch, row *Row, t tokens, logits [][]float32) {
	heads, dim := len(logits), row.Values.Dim()
	s.shifts, s.totals = slices.Grow(s.shifts[:0], heads)[:heads], slices.Grow(s.totals[:0], heads)[:heads]
	for h, l := range logits {
		sink := float32(math.Inf(-1))
		if row.Sinks != nil {
			sink = row.Sinks[h]
		}
		s.shifts[h], s.totals[h] = shift(l, sink)
	}
	out = out[:heads*dim]
	clear(out)
	sums := s.sums.shape(heads, dim)
	for i := 0; i < t.n; i += block {
		j := min(i+block, t.n)
		for h, l := range logits {
			weights := l[i:j]
			Exp(weights, s.shifts[h])
			s.totals[h] += float64(vek32.Sum(weights))
		}
		t.locate(&s.vectors, row.Values, i, j)
		s.vectors.Sum(sums, logits, i, j-i)
		vek32.Add_Inplace(out, s.sums.flat)
	}
	for h, total := range s.totals {
		vek32.MulNumber_Inplace(out[h*dim:][:dim], float32(1/total))
	}
}

// matrix is rows of equal length in one piece of memory.
type matrix struct {
	flat []float32
	rows [][]float32
}

func (m *matrix) shape(rows, columns int) [][]float32 {
	m.flat = slices.Grow(m.flat[:0], rows*columns)[:rows*columns]
	m.rows = m.rows[:0]
	for r := range rows {
		m.rows = append(m.rows, m.flat[r*columns:][:columns:columns])
	}
	return m.rows
}
