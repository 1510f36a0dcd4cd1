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
	logits  []float32   // [G][n]
	heads   [][]float32 // views of logits
	vectors []float32   // [block][KDim or VDim]
	weights []float32   // [G][block]
	sum     []float32   // [G][VDim]
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

// read writes the vectors of the i-th to j-th token to dst.
func (t tokens) read(dst []float32, r kv.Reader, i, j int) {
	if t.list != nil {
		r.Gather(dst, t.list[i:j])
		return
	}
	r.Read(dst, t.first+i, t.first+j)
}

// block is how many tokens are worked on at a time: they stay in a near cache for all query heads.
const block = 64

func attend(out []float32, s *Scratch, row *Row, t tokens) {
	heads, dim := len(row.Queries), row.Keys.Dim()
	s.logits = slices.Grow(s.logits[:0], heads*t.n)[:heads*t.n]
	s.vectors = slices.Grow(s.vectors[:0], block*dim)
	s.heads = s.heads[:0]
	for h := range heads {
		s.heads = append(s.heads, s.logits[h*t.n:(h+1)*t.n])
	}
	for i := 0; i < t.n; i += block {
		j := min(i+block, t.n)
		keys := s.vectors[:(j-i)*dim]
		t.read(keys, row.Keys, i, j)
		for h, query := range row.Queries {
			vek32.MatMul_Into(s.heads[h][i:j], keys, query, dim)
		}
	}
	for _, logits := range s.heads {
		Softcap(logits, row.Softcap)
	}
	combine(out, s, row, t, s.heads)
}

// combine sums values by the softmax of the logits, which it overwrites.
func combine(out []float32, s *Scratch, row *Row, t tokens, logits [][]float32) {
	heads, dim := len(logits), row.Values.Dim()
	out = out[:heads*dim]
	clear(out)
	for h := range heads {
		sink := float32(math.Inf(-1))
		if row.Sinks != nil {
			sink = row.Sinks[h]
		}
		total := softmax(logits[h], sink)
		vek32.MulNumber_Inplace(logits[h], float32(1/total))
	}
	s.vectors = slices.Grow(s.vectors[:0], block*dim)
	s.weights = slices.Grow(s.weights[:0], heads*block)
	s.sum = slices.Grow(s.sum[:0], heads*dim)
	for i := 0; i < t.n; i += block {
		j := min(i+block, t.n)
		values := s.vectors[:(j-i)*dim]
		t.read(values, row.Values, i, j)
		weights := s.weights[:0]
		for h := range heads {
			weights = append(weights, logits[h][i:j]...)
		}
		multiplyAdd(out, s.sum[:heads*dim], weights, values, j-i, dim)
	}
}

// multiplyAdd adds weights [heads][n] times values [n][dim] to out [heads][dim]. Heads are multiplied a
// few at a time: vek32 would start goroutines for products of 100,000 terms and more.
func multiplyAdd(out, product, weights, values []float32, n, dim int) {
	const most = 100_000
	few := max(1, (most-1)/(n*dim))
	for len(out) > 0 {
		heads := min(few, len(out)/dim)
		some := vek32.MatMul_Into(product[:heads*dim], weights[:heads*n], values, n)
		vek32.Add_Inplace(out[:heads*dim], some)
		out, weights = out[heads*dim:], weights[heads*n:]
	}
}
