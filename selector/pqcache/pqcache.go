package pqcache

import (
	"encoding/binary"
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

type pqcache struct {
	tokenBudget  int
	sparsityRate float64
	codes        codes
}

var _ selector.Fitter = pqcache{}

func (p pqcache) Shadow() kv.Shadow { return p.codes }

// Fits implements selector.Fitter.
func (p pqcache) Fits(_ int, g *kv.Geometry) error {
	if p.codes.m > g.KDim {
		return fault.Newf(fault.Invalid, "partitions",
			"partitions is %d, but keys have %d channels: ask for fewer", p.codes.m, g.KDim)
	}
	return nil
}

// Unit implements selector.Ranker.
func (pqcache) Unit() int { return 1 }

// Select implements selector.Selector.
func (p pqcache) Select(dst []int32, row *selector.Row) []int32 {
	budget, n, dim := row.Budget(p.tokenBudget, p.sparsityRate), row.Len-row.First, row.Dim
	if budget >= n {
		return selector.All(dst, row)
	}
	head := row.Records.Head()
	book := p.codes.bookFloats(dim)
	f32 := row.Scratch.Floats(n + dim + max(p.codes.m<<p.codes.b+book, selector.ExactBlock*dim))
	scores, query := selector.Take(&f32, n), selector.Take(&f32, dim)
	row.Sum(query)
	if !trained(head) {
		selector.Exact(scores, row, query, f32)
		return selector.Top(dst, row, scores, budget)
	}
	tables := selector.Take(&f32, p.codes.m<<p.codes.b)
	p.codes.tables(tables, query, p.codes.book(f32, head, dim))
	p.score(scores, row, tables)
	return selector.Top(dst, row, scores, budget)
}

// score adds up the tables' entries for each token.
func (p pqcache) score(scores []float32, row *selector.Row, tables []float32) {
	m, size := p.codes.m, 1<<p.codes.b
	for from := row.First; from < row.Len; {
		c := from / kv.ChunkTokens
		to := min(row.Len, (c+1)*kv.ChunkTokens)
		record := row.Records.Chunk(c)
		lost := binary.LittleEndian.Uint16(record)
		for ; from < to; from++ {
			t := from % kv.ChunkTokens
			score := float32(0)
			for i, code := range record[lostBytes+t*m:][:m] {
				score += tables[i*size+int(code)]
			}
			if lost>>t&1 == 1 {
				score = float32(math.NaN())
			}
			scores[from-row.First] = score
		}
	}
}
