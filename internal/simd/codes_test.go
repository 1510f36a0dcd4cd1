package simd

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// codes are vectors of codes, and queries for them.
type codes struct {
	bits, dim, n       int
	data               []byte
	params             []float32
	queries, constants []float32
}

func someCodes(random *rand.Rand, bits, dim, n, heads int) *codes {
	c := &codes{bits: bits, dim: dim, n: n, params: normal(random, 2*n), queries: normal(random, heads*dim), constants: normal(random, heads)}
	c.data = make([]byte, n*CodeBytes(bits, dim))
	for i := range c.data {
		c.data[i] = byte(random.Uint32())
	}
	return c
}

func (c *codes) asked() *CodeQueries {
	q := NewCodeQueries(c.bits, c.queries, c.constants)
	return &q
}

// code is element d of vector i.
func (c *codes) code(i, d int) float64 {
	vector := c.data[i*CodeBytes(c.bits, c.dim):]
	return float64(vector[d*c.bits/8] >> (d * c.bits % 8) & (1<<c.bits - 1))
}

// TestCodes compares with float64, and the ways there are with each other.
func TestCodes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		heads := rapid.IntRange(1, Most).Draw(t, "heads")
		c := someCodes(random, rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "bits"),
			rapid.OneOf(rapid.IntRange(1, 300), rapid.SampledFrom([]int{64, 80, 96, 128, 256})).Draw(t, "dim"),
			rapid.IntRange(0, 20).Draw(t, "vectors"), heads)
		at := rapid.IntRange(0, 3).Draw(t, "at")
		q := c.asked()
		out, plain := sevens(heads, at+c.n+1), sevens(heads, at+c.n+1)
		q.Dots(out, at, c.data, c.params, nil)
		q.plain(plain, at, c.data, c.params)
		for h := range heads {
			if out[h][at+c.n] != 7 || at > 0 && out[h][at-1] != 7 {
				t.Fatal("written beside the dots")
			}
			for i := range c.n {
				scale, zero := float64(c.params[2*i]), float64(c.params[2*i+1])
				want, size := float64(c.constants[h]), 1.0
				for d, x := range c.queries[h*c.dim:][:c.dim] {
					element := scale*c.code(i, d) + zero
					want += float64(x) * element
					size += math.Abs(float64(x)) * (math.Abs(scale)*c.code(i, d) + math.Abs(zero))
				}
				for way, got := range []float32{out[h][at+i], plain[h][at+i]} {
					if !(math.Abs(float64(got)-want) <= 1e-6*size) {
						t.Fatalf("way %d, head %d, vector %d: %v, want %v", way, h, i, got, want)
					}
				}
			}
		}
	})
}

func BenchmarkCodes(b *testing.B) {
	const dim, n = 128, 64
	for _, bits := range []int{2, 4, 8} {
		for _, heads := range []int{1, Most} {
			b.Run(fmt.Sprintf("%d/heads=%d", bits, heads), func(b *testing.B) {
				c := someCodes(rand.New(rand.NewPCG(1, 2)), bits, dim, n, heads)
				q, out := c.asked(), sevens(heads, n)
				for b.Loop() {
					q.Dots(out, 0, c.data, c.params, nil)
				}
				b.ReportMetric(2*dim*n*float64(heads)*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gflop/s")
			})
		}
	}
}
