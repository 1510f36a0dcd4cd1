package kv

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestVectors compares with vectors that were read, and checks that a vector's product does not depend on
// the others.
func TestVectors(t *testing.T) {
	t.Parallel()
	var v Vectors // reused, as it will be
	rapid.Check(t, func(t *rapid.T) {
		p, pages, heads := drawPlane(t)
		finite(t, p, pages, heads)
		table := rapid.SliceOfN(rapid.Int32Range(0, int32(pages)-1), 1, 6).Draw(t, "table")
		r := p.Reader(table, rapid.IntRange(0, heads-1).Draw(t, "head"))
		tokens := len(table) * p.PageSize

		var positions []int32
		if rapid.Bool().Draw(t, "list") {
			positions = rapid.SliceOfN(rapid.Int32Range(0, int32(tokens)-1), 0, 20).Draw(t, "positions")
			r.LocateAt(&v, positions)
		} else {
			to := rapid.IntRange(0, tokens).Draw(t, "to")
			from := rapid.IntRange(0, to).Draw(t, "from")
			for pos := from; pos < to; pos++ {
				positions = append(positions, int32(pos))
			}
			r.Locate(&v, from, to)
		}
		n := rapid.IntRange(0, len(positions)).Draw(t, "n")
		read := make([]float32, n*p.Dim)
		r.Gather(read, positions[:n])

		const at = 1
		queries, weights, dots, sums := rows(3, p.Dim), rows(3, at+n), rows(3, at+n+1), rows(3, p.Dim)
		v.Dots(dots, at, queries, n)
		v.Sum(sums, weights, at, n)
		for h := range queries {
			if dots[h][0] != 1 || dots[h][at+n] != float32(at+n+1) {
				t.Fatal("written beside the dots")
			}
			for i := range n {
				want, size := 0.0, 0.0
				for d, q := range queries[h] {
					want += float64(q) * float64(read[i*p.Dim+d])
					size += math.Abs(float64(q) * float64(read[i*p.Dim+d]))
				}
				near(t, "dot", dots[h][at+i], want, size)
				var alone Vectors
				r.LocateAt(&alone, positions[i:i+1])
				dot := rows(1, 1)
				alone.Dots(dot, 0, queries[h:h+1], 1)
				if dot[0][0] != dots[h][at+i] {
					t.Fatalf("dot %d is %v, alone %v", i, dots[h][at+i], dot[0][0])
				}
			}
			for d := range p.Dim {
				want, size := 0.0, 0.0
				for i := range n {
					want += float64(weights[h][at+i]) * float64(read[i*p.Dim+d])
					size += math.Abs(float64(weights[h][at+i]) * float64(read[i*p.Dim+d]))
				}
				near(t, "sum", sums[h][d], want, size)
			}
		}
	})
}

// finite replaces a plane's elements by small ones.
func finite(t *rapid.T, p *Plane, pages, heads int) {
	some := rapid.SliceOfN(rapid.Float32Range(-9, 9), 13, 13).Draw(t, "elements")
	i := 0
	for page := range pages {
		for head := range heads {
			for token := range p.PageSize {
				for d := range p.Dim {
					at := page*p.PageStride + head*p.HeadStride + token*p.TokenStride + d*p.DType.Size()
					p.DType.Encode(p.Data[at:], some[i%13:][:1])
					i++
				}
			}
		}
	}
}

func near(t *rapid.T, what string, got float32, want, size float64) {
	t.Helper()
	if !(math.Abs(float64(got)-want) <= 2e-6*size) {
		t.Fatalf("%s is %v, want %v", what, got, want)
	}
}

// rows are [n][columns] of 1, 2, 3 and so on.
func rows(n, columns int) [][]float32 {
	m := make([][]float32, n)
	for h := range m {
		for c := range columns {
			m[h] = append(m[h], float32(c+1))
		}
	}
	return m
}

func TestVectorsAllocateNothing(t *testing.T) {
	p, table := benchmarkPlane(F16, 16, 64)
	p.Scales = []float32{2}
	var v Vectors
	positions, queries, weights, sums := []int32{3, 40, 41}, rows(4, p.Dim), rows(4, 64), rows(4, p.Dim)
	if n := testing.AllocsPerRun(20, func() {
		r := p.Reader(table, 2)
		r.Locate(&v, 0, 64)
		v.Dots(weights, 0, queries, 64)
		r.LocateAt(&v, positions)
		v.Sum(sums, weights, 0, 3)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestVectorsStayInside(t *testing.T) {
	t.Parallel()
	p, table := benchmarkPlane(F16, 16, 64)
	p.Data = slices.Clip(p.Data[:len(p.Data)-1])
	last := int32(slices.Index(table, slices.Max(table))*16 + 15)
	r := p.Reader(table, 7)
	for name, f := range map[string]func(*Vectors){
		"a range beyond the table":    func(v *Vectors) { r.Locate(v, 60, 65) },
		"a position beyond the table": func(v *Vectors) { r.LocateAt(v, []int32{64}) },
		"a negative position":         func(v *Vectors) { r.LocateAt(v, []int32{-1}) },
		"a range beyond the data":     func(v *Vectors) { r.Locate(v, int(last), int(last)+1) },
		"a position beyond the data":  func(v *Vectors) { r.LocateAt(v, []int32{last}) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s does not panic", name)
				}
			}()
			f(new(Vectors))
		}()
	}
}
