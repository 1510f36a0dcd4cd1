package simd

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

var types = []Type{F32, F16, BF16, F8}

func (t Type) String() string {
	return [...]string{"F32", "F16", "BF16", "F8"}[t]
}

// element is an element by the definition of its type.
func (t Type) element(vector []byte, i int) float64 {
	float := func(code, exponentBits, mantissaBits int, finiteOnly bool) float64 {
		mantissa, exponent := code&(1<<mantissaBits-1), code>>mantissaBits&(1<<exponentBits-1)
		sign := 1 - 2*float64(code>>(mantissaBits+exponentBits)&1)
		bias, top := 1<<(exponentBits-1)-1, exponent == 1<<exponentBits-1
		switch {
		case top && finiteOnly && mantissa == 1<<mantissaBits-1, top && !finiteOnly && mantissa != 0:
			return math.NaN()
		case top && !finiteOnly:
			return math.Inf(int(sign))
		case exponent == 0:
			return sign * math.Ldexp(float64(mantissa), 1-bias-mantissaBits)
		}
		return sign * math.Ldexp(float64(mantissa|1<<mantissaBits), exponent-bias-mantissaBits)
	}
	switch t {
	case F32:
		return float(int(binary.LittleEndian.Uint32(vector[4*i:])), 8, 23, false)
	case F16:
		return float(int(binary.LittleEndian.Uint16(vector[2*i:])), 5, 10, false)
	case BF16:
		return float(int(binary.LittleEndian.Uint16(vector[2*i:])), 8, 7, false)
	default:
		return float(int(vector[i]), 4, 3, true)
	}
}

// vector makes a vector of n elements between -8 and 8 at an odd place.
func (t Type) vector(random *rand.Rand, n int) []byte {
	size := t.Bytes(n)
	v := make([]byte, size+8)[random.IntN(8):][:size:size]
	for i := range n {
		bits := math.Float32bits(float32(random.NormFloat64()))
		switch t {
		case F32:
			binary.LittleEndian.PutUint32(v[4*i:], bits)
		case BF16:
			binary.LittleEndian.PutUint16(v[2*i:], uint16(bits>>16))
		case F16:
			binary.LittleEndian.PutUint16(v[2*i:], uint16(random.IntN(0x4800)|random.IntN(2)<<15))
		case F8:
			v[i] = byte(random.IntN(0x50) | random.IntN(2)<<7)
		}
	}
	return v
}

func normal(random *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(random.NormFloat64())
	}
	return x
}

// example is what Dots and Add take.
type example struct {
	t              Type
	dim, n, at     int
	vectors        [][]byte
	heads, weights [][]float32
}

func examples(t *rapid.T) *example {
	e := &example{
		t:   rapid.SampledFrom(types).Draw(t, "type"),
		dim: rapid.OneOf(rapid.IntRange(1, 40), rapid.SampledFrom([]int{64, 80, 96, 128, 256, 300})).Draw(t, "dim"),
		n:   rapid.IntRange(0, 30).Draw(t, "vectors"),
		at:  rapid.IntRange(0, 3).Draw(t, "at"),
	}
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	for range e.n + rapid.IntRange(0, 60).Draw(t, "more vectors") {
		e.vectors = append(e.vectors, e.t.vector(random, e.dim))
	}
	for range rapid.IntRange(1, 9).Draw(t, "heads") {
		e.heads = append(e.heads, normal(random, e.dim))
		e.weights = append(e.weights, normal(random, e.at+e.n))
	}
	return e
}

func sevens(rows, columns int) [][]float32 {
	m := make([][]float32, rows)
	for i := range m {
		m[i] = slices.Repeat([]float32{7}, columns)
	}
	return m
}

// TestDots compares with float64, and each vector with what it gives alone and with one head.
func TestDots(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		out, plain := sevens(len(e.heads), e.at+e.n+1), sevens(len(e.heads), e.at+e.n+1)
		Dots(e.t, out, e.at, e.heads, e.vectors, e.n)
		plainDots(e.t, plain, e.at, e.heads, e.vectors[:e.n], 0)
		for h, head := range e.heads {
			for _, o := range [][]float32{out[h][:e.at], out[h][e.at+e.n:], plain[h][:e.at], plain[h][e.at+e.n:]} {
				if slices.ContainsFunc(o, func(x float32) bool { return x != 7 }) {
					t.Fatal("written beside the dots")
				}
			}
			for i, v := range e.vectors[:e.n] {
				want, size := 0.0, 0.0
				for d, q := range head {
					want += float64(q) * e.t.element(v, d)
					size += math.Abs(float64(q) * e.t.element(v, d))
				}
				for way, got := range []float32{out[h][e.at+i], plain[h][e.at+i]} {
					if !(math.Abs(float64(got)-want) <= 2e-6*size) {
						t.Fatalf("way %d, head %d, vector %d: %v, want %v", way, h, i, got, want)
					}
				}
				alone := sevens(1, 1)
				Dots(e.t, alone, 0, e.heads[h:h+1], e.vectors[i:i+1], 1)
				if alone[0][0] != out[h][e.at+i] {
					t.Fatalf("head %d, vector %d: %v, alone %v", h, i, out[h][e.at+i], alone[0][0])
				}
			}
		}
	})
}

// TestAdd compares with float64, and each head with what it gives alone.
func TestAdd(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		out, plain := sevens(len(e.heads), e.dim), sevens(len(e.heads), e.dim)
		Add(e.t, out, e.weights, e.at, e.vectors, e.n)
		plainAdd(e.t, plain, e.weights, e.at, e.vectors[:e.n], 0, e.dim)
		for h := range out {
			for d := range e.dim {
				want, size := 7.0, 7.0
				for i, v := range e.vectors[:e.n] {
					x := float64(e.weights[h][e.at+i]) * e.t.element(v, d)
					want += x
					size += math.Abs(x)
				}
				for way, got := range []float32{out[h][d], plain[h][d]} {
					if !(math.Abs(float64(got)-want) <= 2e-6*size) {
						t.Fatalf("way %d, head %d, element %d: %v, want %v", way, h, d, got, want)
					}
				}
			}
			alone := sevens(1, e.dim)
			Add(e.t, alone, e.weights[h:h+1], e.at, e.vectors, e.n)
			if !slices.Equal(alone[0], out[h]) {
				t.Fatalf("head %d: %v, alone %v", h, out[h], alone[0])
			}
		}
	})
}

// TestEveryCode decodes all codes by each way there is: in bulk, plainly, and within a product.
func TestEveryCode(t *testing.T) {
	t.Parallel()
	for _, typ := range []Type{F16, BF16, F8} {
		var codes []byte
		for code := range 1 << 16 {
			codes = binary.LittleEndian.AppendUint16(codes, uint16(code))
		}
		n := len(codes) / sizes[typ]
		decoded, plain := make([]float32, n), make([]float32, n)
		Decode(typ, decoded, codes)
		decode(typ, plain, codes)
		dot, query, vector := sevens(1, 1), sevens(1, 8), make([]byte, typ.Bytes(8))
		sum, one := sevens(1, 8), [][]float32{{1, 1, 1, 1}}
		for i := range n {
			if i%8 != 0 {
				continue
			}
			copy(vector, codes[typ.Bytes(i):])
			for d := range 8 {
				want := typ.element(vector, d)
				// The query is 0 elsewhere, which only finite numbers leave alone.
				clear(query[0])
				query[0][d] = 1
				Dots(typ, dot, 0, query, [][]byte{vector}, 1)
				got := []float32{decoded[i+d], plain[i+d]}
				if typ.finite(vector) {
					got = append(got, dot[0][0])
				}
				clear(sum[0])
				zero := make([]byte, len(vector))
				Add(typ, sum, one, 0, [][]byte{vector, zero, zero, zero}, 4)
				got = append(got, sum[0][d])
				for way, x := range got {
					if float64(x) != want && !(math.IsNaN(float64(x)) && math.IsNaN(want)) {
						t.Fatalf("%v, way %d: element %d of % x is %v, want %v", typ, way, d, vector, x, want)
					}
					if way < 2 && math.Signbit(float64(x)) != typ.negative(vector, d) {
						t.Fatalf("%v, way %d: element %d of % x has another sign", typ, way, d, vector)
					}
				}
			}
		}
	}
}

// negative tells whether the sign of an element is set, which is its last bit.
func (t Type) negative(vector []byte, i int) bool { return vector[t.Bytes(i+1)-1]>>7 == 1 }

func (t Type) finite(vector []byte) bool {
	for d := range len(vector) / sizes[t] {
		if x := t.element(vector, d); x-x != 0 {
			return false
		}
	}
	return true
}

// TestDecodeLengths decodes vectors of all lengths, and no more.
func TestDecodeLengths(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	for _, typ := range types {
		for n := range 40 {
			v, got := typ.vector(random, n), slices.Repeat([]float32{7}, n+1)
			Decode(typ, got[:n], v)
			for i, x := range got[:n] {
				if float64(x) != typ.element(v, i) {
					t.Fatalf("%v, %d elements: element %d is %v, want %v", typ, n, i, x, typ.element(v, i))
				}
			}
			if got[n] != 7 {
				t.Fatalf("%v: decoded more than %d elements", typ, n)
			}
		}
	}
}

func TestRefusesShortSlices(t *testing.T) {
	t.Parallel()
	row := func(n int) [][]float32 { return sevens(5, n) }
	for _, typ := range types {
		whole, short := make([]byte, typ.Bytes(16)), make([]byte, typ.Bytes(16)-1)
		for name, f := range map[string]func(){
			"a vector of dots":  func() { Dots(typ, row(2), 0, row(16), [][]byte{whole, slices.Clip(short)}, 2) },
			"out of dots":       func() { Dots(typ, row(2), 1, row(16), [][]byte{whole, whole}, 2) },
			"a query":           func() { Dots(typ, row(2), 0, append(row(16), make([]float32, 15)), [][]byte{whole, whole}, 2) },
			"vectors of dots":   func() { Dots(typ, row(2), 0, row(16), [][]byte{whole}, 2) },
			"a decoded vector":  func() { Decode(typ, make([]float32, 16), slices.Clip(short)) },
			"vectors of a sum":  func() { Add(F32, row(16), row(4), 0, slices.Repeat([][]byte{make([]byte, 64)}, 3), 4) },
			"weights":           func() { Add(F32, row(16), row(4), 1, slices.Repeat([][]byte{make([]byte, 64)}, 4), 4) },
			"a vector of a sum": func() { Add(F32, row(16), row(4), 0, slices.Repeat([][]byte{make([]byte, 63)}, 4), 4) },
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%v: a slice too short for %s does not panic", typ, name)
					}
				}()
				f()
			}()
		}
	}
}

func TestNoAllocation(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	out, queries, sums := sevens(5, 4), sevens(5, 50), sevens(5, 50)
	for _, typ := range types {
		vectors := [][]byte{typ.vector(random, 50), typ.vector(random, 50), typ.vector(random, 50), typ.vector(random, 50)}
		if n := testing.AllocsPerRun(10, func() {
			Dots(typ, out, 0, queries, vectors, 4)
			Decode(typ, sums[0], vectors[0])
			Add(typ, sums, out, 0, vectors, 4)
		}); n != 0 {
			t.Errorf("%v: %v allocations", typ, n)
		}
	}
	for _, bits := range []int{2, 4, 8} {
		c := someCodes(random, bits, 50, 4, Most)
		var indices []int32
		if n := testing.AllocsPerRun(10, func() {
			q := NewCodeQueries(bits, c.queries, c.constants)
			q.Dots(out[:Most], 0, c.data, c.params, nil)
			indices = AtLeast(indices[:0], out[0], 0)
		}); n != 0 {
			t.Errorf("codes of %d bits: %v allocations", bits, n)
		}
	}
}

// benchmark runs f over vectors in the first cache.
func benchmark(b *testing.B, f func(typ Type, m, n [][]float32, vectors [][]byte)) {
	const dim, n = 128, 64
	random := rand.New(rand.NewPCG(1, 2))
	for _, typ := range types {
		for _, heads := range []int{1, 4} {
			b.Run(fmt.Sprintf("%v/heads=%d", typ, heads), func(b *testing.B) {
				vectors := make([][]byte, n)
				for i := range vectors {
					vectors[i] = typ.vector(random, dim)
				}
				m, w := sevens(heads, dim), sevens(heads, n)
				for b.Loop() {
					f(typ, m, w, vectors)
				}
				b.ReportMetric(2*dim*n*float64(heads)*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gflop/s")
			})
		}
	}
}

func BenchmarkDots(b *testing.B) {
	benchmark(b, func(typ Type, queries, out [][]float32, vectors [][]byte) {
		Dots(typ, out, 0, queries, vectors, len(vectors))
	})
}

func BenchmarkAdd(b *testing.B) {
	benchmark(b, func(typ Type, out, weights [][]float32, vectors [][]byte) {
		Add(typ, out, weights, 0, vectors, len(vectors))
	})
}
