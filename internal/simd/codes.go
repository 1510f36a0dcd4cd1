package simd

import "github.com/viterin/vek/vek32"

// CodeQueries are up to Most queries that vectors of codes are multiplied by. Codes have 2, 4 or 8 bits; a
// byte's lowest bits hold the first. What comes of a vector depends on it alone, as with Dots.
type CodeQueries struct {
	bits, dim, heads int
	queries          []float32 // [heads][dim]
	sums, constants  [Most]float32
}

// NewCodeQueries takes queries, [len(constants)][dim], which are kept but only read, and constants that belong
// to them.
func NewCodeQueries(bits int, queries, constants []float32) CodeQueries {
	q := CodeQueries{bits: bits, dim: len(queries) / len(constants), heads: len(constants), queries: queries}
	copy(q.constants[:], constants)
	for h := range constants {
		q.sums[h] = vek32.Sum(q.query(h))
	}
	return q
}

func (q *CodeQueries) query(h int) []float32 { return q.queries[h*q.dim:][:q.dim] }

// CodeBytes is the size of a vector of n codes.
func CodeBytes(bits, n int) int { return (n*bits + 7) / 8 }

// Dots writes to out[h][at+i], for the i-th of the len(params)/2 vectors that codes holds one behind the
// other,
//
//	params[2*i] * queries[h].vector + params[2*i+1] * sum(queries[h]) + constants[h]
//
// Meanwhile it asks memory for as much of next, which is to be read soon; nil is nothing.
func (q *CodeQueries) Dots(out [][]float32, at int, codes []byte, params []float32, next []byte) {
	n := len(params) / 2
	if n == 0 {
		return
	}
	codes = codes[:n*CodeBytes(q.bits, q.dim)]
	if len(next) == 0 {
		next = codes
	}
	if accelerated && q.dim%lot == 0 {
		q.dots(out, at, codes, params, next)
	} else {
		q.plain(out, at, codes, params)
	}
}

// plain is Dots.
func (q *CodeQueries) plain(out [][]float32, at int, codes []byte, params []float32) {
	var buffer [block]float32
	size := CodeBytes(q.bits, q.dim)
	for i := range len(params) / 2 {
		var dots [Most]float32
		for from := 0; from < q.dim; from += block {
			elements := buffer[:min(block, q.dim-from)]
			unpack(elements, codes[i*size+from*q.bits/8:], q.bits)
			for h := range q.heads {
				for d, x := range q.query(h)[from:][:len(elements)] {
					dots[h] += x * elements[d]
				}
			}
		}
		for h := range q.heads {
			out[h][at+i] = params[2*i]*dots[h] + (params[2*i+1]*q.sums[h] + q.constants[h])
		}
	}
}

// unpack decodes codes.
func unpack(dst []float32, src []byte, bits int) {
	for i := range dst {
		dst[i] = float32(src[i*bits/8] >> (i * bits % 8) & (1<<bits - 1))
	}
}
