package kv

import (
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/simd"
)

// Vectors are the places of some of a sequence's vectors, which are multiplied and added up where they
// lie. The zero value holds none; memory is reused from call to call. One Vectors serves one goroutine, and
// only as long as the reader it was filled from.
//
// What comes of a vector depends on it alone: not on pages, layout, or the vectors beside it.
type Vectors struct {
	at      [][]byte
	storage simd.Type
	scale   float32
}

// Ahead is how many vectors behind those in work memory is asked for: put as many of the next ones into a
// Vectors, beyond the n that a call takes, for speed.
const Ahead = simd.Ahead

// Locate fills v with the vectors of positions [from, to).
func (r Reader) Locate(v *Vectors, from, to int) {
	p := r.plane
	places := v.fill(r, to-from)
	row := p.Dim * p.DType.Size()
	page, token := from/p.PageSize, from%p.PageSize
	for len(places) > 0 {
		n := min(p.PageSize-token, len(places))
		data := p.Data[r.base+int(r.table[page])*p.PageStride+token*p.TokenStride:]
		for i := range places[:n] {
			places[i] = data[i*p.TokenStride:][:row:row]
		}
		places = places[n:]
		page, token = page+1, 0
	}
}

// LocateAt fills v with the vectors of the positions.
func (r Reader) LocateAt(v *Vectors, positions []int32) {
	p := r.plane
	places := v.fill(r, len(positions))
	size, row := uint32(p.PageSize), p.Dim*p.DType.Size()
	for i, pos := range positions {
		page := int(r.table[uint32(pos)/size])
		places[i] = p.Data[r.base+page*p.PageStride+int(uint32(pos)%size)*p.TokenStride:][:row:row]
	}
}

// fill makes room for n places.
func (v *Vectors) fill(r Reader, n int) [][]byte {
	v.at = slices.Grow(v.at[:0], n)[:n]
	v.storage, v.scale = dtypes[r.plane.DType].simd, r.scale
	return v.at
}

// Dots writes the product of queries[h], [Dim], and the i-th of the first n vectors to out[h][at+i].
func (v *Vectors) Dots(out [][]float32, at int, queries [][]float32, n int) {
	simd.Dots(v.storage, out, at, queries, v.at, n)
	if v.scale == 1 {
		return
	}
	for _, dots := range out {
		vek32.MulNumber_Inplace(dots[at:at+n], v.scale)
	}
}

// Sum writes to out[h], [Dim], the sum of the first n vectors, the i-th times weights[h][at+i].
func (v *Vectors) Sum(out, weights [][]float32, at, n int) {
	for _, sum := range out {
		clear(sum)
	}
	simd.Add(v.storage, out, weights, at, v.at, n)
	if v.scale == 1 {
		return
	}
	for _, sum := range out {
		vek32.MulNumber_Inplace(sum, v.scale)
	}
}
