package lowbit

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

func formats(t *rapid.T) Format {
	return Format{
		Bits:      rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "bits"),
		Symmetric: rapid.Bool().Draw(t, "symmetric"),
	}
}

// records are chunk records of vectors [n][dim].
type records [][]byte

func (records) Head() []byte         { return nil }
func (r records) Chunk(c int) []byte { return r[c] }

func store(f Format, vectors []float32, dim int) (r records) {
	for i := 0; i*dim < len(vectors); i++ {
		c, t := i/kv.ChunkTokens, i%kv.ChunkTokens
		if t == 0 {
			r = append(r, make([]byte, f.ChunkBytes(dim)))
		}
		f.Put(r[c], t, slices.Clone(vectors[i*dim:][:dim]))
	}
	return r
}

func half(x float32) float32 {
	var b [2]byte
	var y [1]float32
	kv.F16.Encode(b[:], []float32{x})
	kv.F16.Decode(y[:], b[:])
	return y[0]
}

// plain is a vector as it is kept, restored by the formula.
func plain(f Format, vector []float32) []float64 {
	low, high := slices.Min(vector), slices.Max(vector)
	top, zero := math.Pow(2, float64(f.Bits))-1, float64(half(low))
	if f.Symmetric {
		top--
		low, high = -max(high, -low), max(high, -low)
	}
	scale := float64(half((high - low) / float32(top)))
	if f.Symmetric {
		zero = -scale * top / 2
	}
	restored := make([]float64, len(vector))
	for d, x := range vector {
		code := 0.0
		if scale > 0 {
			code = max(0, min(top, math.Floor(float64((x-float32(zero))*(1/float32(scale))+.5))))
		}
		restored[d] = scale*code + zero
	}
	return restored
}

func normal(seed uint64, n int) []float32 {
	random := rand.New(rand.NewPCG(seed, 0))
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(random.NormFloat64())
	}
	return x
}

func TestDots(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := formats(t)
		dim := rapid.SampledFrom([]int{1, 3, 8, 50, 64, 128}).Draw(t, "dim")
		n, heads := rapid.IntRange(1, 200).Draw(t, "vectors"), rapid.IntRange(1, 4).Draw(t, "queries")
		seed := rapid.Uint64().Draw(t, "seed")
		vectors, queries, constants := normal(seed, n*dim), normal(seed+1, heads*dim), normal(seed+2, heads)
		r := store(f, vectors, dim)

		var positions []int32
		for p := range n {
			if p%3 != 1 || p == n-1 {
				positions = append(positions, int32(p))
			}
		}
		out := make([][]float32, heads)
		for h := range out {
			out[h] = make([]float32, len(positions))
		}
		f.Dots(out, queries, constants, r, positions)
		for i, p := range positions {
			vector := plain(f, vectors[int(p)*dim:][:dim])
			for h := range out {
				want, size := float64(constants[h]), 1.0
				for d, q := range queries[h*dim:][:dim] {
					want += float64(q) * vector[d]
					size += math.Abs(float64(q)) * 8
				}
				if got := float64(out[h][i]); !(math.Abs(got-want) <= 1e-6*size) {
					t.Fatalf("query %d, position %d: %v, want %v", h, p, got, want)
				}
			}
		}
	})
}

// TestStaysWithinHalfAStep: no element is off by more than half a code and what fp16 costs.
func TestStaysWithinHalfAStep(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := formats(t)
		vector := rapid.SliceOfN(rapid.Float32Range(-1000, 1000), 1, 40).Draw(t, "vector")
		low, high := float64(slices.Min(vector)), float64(slices.Max(vector))
		steps := math.Pow(2, float64(f.Bits)) - 1
		if f.Symmetric {
			steps--
			high = max(high, -low)
			low = -high
		}
		slack := (high-low)/steps/2 + (high-low+max(math.Abs(low), math.Abs(high)))/1024
		slack += steps * 3e-8 // what fp16 cannot tell from 0 is half of 6e-8
		dim := len(vector)
		r := store(f, vector, dim)
		for d, want := range vector {
			query, out := make([]float32, dim), [][]float32{{0}}
			query[d] = 1
			f.Dots(out, query, []float32{0}, r, []int32{0})
			if got := float64(out[0][0]); !(math.Abs(got-float64(want)) <= slack) {
				t.Fatalf("element %d: %v, want %v +- %v", d, got, want, slack)
			}
		}
	})
}

// TestKeepsZero: what is 0 stays 0 in a symmetric format.
func TestKeepsZero(t *testing.T) {
	t.Parallel()
	for _, bits := range []int{2, 4, 8} {
		f := Format{Bits: bits, Symmetric: true}
		r, out := store(f, []float32{0, 1.7, -3.1}, 3), [][]float32{{9}}
		f.Dots(out, []float32{1, 0, 0}, []float32{0}, r, []int32{0})
		if out[0][0] != 0 {
			t.Errorf("%d bits: 0 became %v", bits, out[0][0])
		}
	}
}

// TestPutLeavesOthers: storing a vector again changes nothing but its own bytes.
func TestPutLeavesOthers(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := formats(t)
		dim := rapid.IntRange(1, 20).Draw(t, "dim")
		vectors := normal(rapid.Uint64().Draw(t, "seed"), kv.ChunkTokens*dim)
		want := store(f, vectors, dim)[0]
		got := make([]byte, len(want))
		for i := range got {
			got[i] = 0xff
		}
		for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}).Draw(t, "order") {
			f.Put(got, i, slices.Clone(vectors[i*dim:][:dim]))
		}
		if !slices.Equal(got, want) {
			t.Fatal("the record depends on the order of its vectors")
		}
	})
}

func TestUnusualVectors(t *testing.T) {
	t.Parallel()
	const dim = 66
	inf := float32(math.Inf(1))
	ones := slices.Repeat([]float32{1}, dim)
	for name, test := range map[string]struct {
		first, second float32 // element 0, all others
		want          float64 // of the sum; NaN: not finite
	}{
		"constant":        {2.5, 2.5, 2.5 * dim},
		"zero":            {0, 0, 0},
		"nearly constant": {1, 1 + 1e-7, dim},
		"tiny":            {-1e-9, 1e-9, 0},
		"NaN":             {inf - inf, 1, math.NaN()},
		"Inf":             {inf, 1, math.NaN()},
		"-Inf":            {1, -inf, math.NaN()},
		"far beyond fp16": {1e10, -1e10, math.NaN()},
		"beyond float32":  {3e38, -3e38, math.NaN()},
	} {
		for _, bits := range []int{2, 4, 8} {
			for _, symmetric := range []bool{false, true} {
				f := Format{bits, symmetric}
				vector := slices.Repeat([]float32{test.second}, dim)
				vector[0] = test.first
				r, out := store(f, vector, dim), [][]float32{{0}}
				f.Dots(out, ones, []float32{0}, r, []int32{0})
				// fp16 keeps 11 bits of a scale.
				slack := 1e-5
				if symmetric {
					slack += math.Abs(test.want) / 1000
				}
				if x := float64(out[0][0]); math.IsNaN(test.want) != (x-x != 0) || math.Abs(x-test.want) > slack {
					t.Errorf("%s, %+v: %v, want %v", name, f, x, test.want)
				}
			}
		}
	}
}

func TestPack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "bits")
		values := rapid.SliceOfN(rapid.Map(rapid.IntRange(0, 1<<bits-1), func(i int) float32 { return float32(i) }), 1, 70).Draw(t, "values")
		packed := make([]byte, Format{Bits: bits}.codeBytes(len(values)))
		fractions := slices.Clone(values)
		for i := range fractions {
			fractions[i] += .4
		}
		pack(packed, fractions, bits)
		got := make([]float32, len(values))
		for i := range got {
			got[i] = float32(packed[i*bits/8] >> (i * bits % 8) & (1<<bits - 1))
		}
		if !slices.Equal(got, values) {
			t.Fatalf("%d bits: %v, want %v", bits, got, values)
		}
	})
}

func TestCheckBits(t *testing.T) {
	t.Parallel()
	for _, bits := range []int{2, 4, 8} {
		if err := CheckBits(bits); err != nil {
			t.Errorf("%d bits: %v", bits, err)
		}
	}
	for _, bits := range []int{-4, 0, 1, 3, 5, 16} {
		var f *fault.Error
		if err := CheckBits(bits); !errors.As(err, &f) || f.Field != "quant_bit" {
			t.Errorf("%d bits: error %v, want one about quant_bit", bits, err)
		}
	}
}

func BenchmarkDots(b *testing.B) {
	const dim, length = 128, 8192
	f := Format{Bits: 4}
	r := store(f, normal(1, length*dim), dim)
	positions, out := make([]int32, length), [][]float32{make([]float32, length)}
	for p := range positions {
		positions[p] = int32(p)
	}
	query := normal(2, dim)
	for b.Loop() {
		f.Dots(out, query, []float32{0}, r, positions)
	}
}

func BenchmarkPut(b *testing.B) {
	const dim = 128
	f := Format{Bits: 4}
	chunk, vector, key := make([]byte, f.ChunkBytes(dim)), normal(1, dim), make([]float32, dim)
	for b.Loop() {
		copy(key, vector)
		f.Put(chunk, 5, key)
	}
}
