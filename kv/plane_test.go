package kv

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// randomElements returns n encoded elements, normally distributed as keys are.
func randomElements(t DType, n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	f := make([]float32, n)
	for i := range f {
		f[i] = float32(r.NormFloat64())
	}
	b := make([]byte, n*t.Size())
	t.Encode(b, f)
	return b
}

// drawPlane draws a plane whose axes lie in any order, padded or not, and that ends with its data.
func drawPlane(t *rapid.T) (p *Plane, pages, heads int) {
	p = &Plane{
		DType:    rapid.SampledFrom([]DType{F32, F16, BF16, F8E4M3}).Draw(t, "dtype"),
		PageSize: rapid.SampledFrom([]int{1, 2, 7, 16}).Draw(t, "page size"),
		Dim:      rapid.IntRange(1, 19).Draw(t, "dim"),
	}
	pages, heads = rapid.IntRange(1, 5).Draw(t, "pages"), rapid.IntRange(1, 3).Draw(t, "heads")
	size := p.Dim * p.DType.Size()
	for _, axis := range rapid.Permutation([]int{0, 1, 2}).Draw(t, "axes") {
		size += rapid.IntRange(0, 1).Draw(t, "padding") * 3
		*[]*int{&p.PageStride, &p.HeadStride, &p.TokenStride}[axis] = size
		size *= []int{pages, heads, p.PageSize}[axis]
	}
	if n := rapid.SampledFrom([]int{0, 1, heads}).Draw(t, "scales"); n > 0 {
		p.Scales = rapid.SliceOfN(rapid.Float32Range(0.5, 2), n, n).Draw(t, "scale")
	}
	bytes, ok := p.Bytes(pages, heads)
	if !ok || bytes > uint64(size) {
		t.Fatalf("the plane spans %d bytes (%v) of %d", bytes, ok, size)
	}
	p.Data = rapid.SliceOfN(rapid.Byte(), int(bytes), int(bytes)).Draw(t, "data")
	return p, pages, heads
}

func TestReader(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		p, pages, heads := drawPlane(t)
		table := rapid.SliceOfN(rapid.Int32Range(0, int32(pages)-1), 1, 6).Draw(t, "table")
		head := rapid.IntRange(0, heads-1).Draw(t, "head")
		r := p.Reader(table, head)
		if r.Dim() != p.Dim {
			t.Fatalf("dim is %d, want %d", r.Dim(), p.Dim)
		}
		check := func(got []float32, positions []int32) {
			for i, pos := range positions {
				for d := range p.Dim {
					at := int(table[int(pos)/p.PageSize])*p.PageStride + head*p.HeadStride +
						int(pos)%p.PageSize*p.TokenStride + d*p.DType.Size()
					var want [1]float32
					p.DType.Decode(want[:], p.Data[at:])
					switch len(p.Scales) {
					case 1:
						want[0] *= p.Scales[0]
					case heads:
						want[0] *= p.Scales[head]
					}
					if x := got[i*p.Dim+d]; !sameFloat(x, float64(want[0])) {
						t.Fatalf("position %d, dimension %d is %v, want %v", pos, d, x, want[0])
					}
				}
			}
			if tail := got[len(positions)*p.Dim:]; len(tail) != 1 || tail[0] != 42 {
				t.Fatalf("behind the last position: %v", tail)
			}
		}
		positions := rapid.SliceOfN(rapid.Int32Range(0, int32(len(table)*p.PageSize)-1), 0, 9).Draw(t, "positions")
		got := make([]float32, len(positions)*p.Dim+1)
		got[len(got)-1] = 42
		r.Gather(got, positions)
		check(got, positions)

		to := rapid.IntRange(0, len(table)*p.PageSize).Draw(t, "to")
		from := rapid.IntRange(0, to).Draw(t, "from")
		positions = positions[:0]
		for pos := from; pos < to; pos++ {
			positions = append(positions, int32(pos))
		}
		got = make([]float32, len(positions)*p.Dim+1)
		got[len(got)-1] = 42
		r.Read(got, from, to)
		check(got, positions)
	})
}

func TestPlaneBytes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name         string
		p            Plane
		pages, heads int
		bytes        uint64
		ok           bool
	}{
		{"dense", Plane{PageStride: 256, HeadStride: 8, TokenStride: 16, PageSize: 16, DType: F16, Dim: 4}, 3, 2, 768, true},
		{"the last page is cut short", Plane{PageStride: 1000, HeadStride: 8, TokenStride: 16, PageSize: 16, DType: F16, Dim: 4}, 3, 2, 2256, true},
		{"one token", Plane{PageSize: 1, DType: F8E4M3, Dim: 5}, 1, 1, 5, true},
		{"no page", Plane{PageSize: 1, DType: F8E4M3, Dim: 5}, 0, 1, 0, false},
		{"negative stride", Plane{PageStride: -1, PageSize: 1, DType: F8E4M3, Dim: 5}, 2, 1, 0, false},
		{"product overflows", Plane{PageStride: 1 << 40, PageSize: 1, DType: F8E4M3, Dim: 5}, 1 << 30, 1, 0, false},
		{"sum overflows", Plane{PageStride: 1 << 62, HeadStride: 1 << 62, PageSize: 1, DType: F8E4M3, Dim: 5}, 3, 3, 0, false},
		{"int overflows", Plane{PageStride: 1 << 62, HeadStride: 1 << 62, PageSize: 1, DType: F8E4M3, Dim: 5}, 2, 2, 0, false},
		{"int just fits", Plane{PageStride: math.MaxInt64 - 5, PageSize: 1, DType: F8E4M3, Dim: 5}, 2, 1, math.MaxInt64, true},
	} {
		bytes, ok := c.p.Bytes(c.pages, c.heads)
		if ok != c.ok || ok && bytes != c.bytes {
			t.Errorf("%s: %d, %v, want %d, %v", c.name, bytes, ok, c.bytes, c.ok)
		}
	}
}

// benchmarkPlane is a cache of one head and its table, pages shuffled.
func benchmarkPlane(dtype DType, pageSize, tokens int) (*Plane, []int32) {
	const dim, heads = 128, 8
	row := dim * dtype.Size()
	p := &Plane{
		Data: randomElements(dtype, tokens*dim*heads), PageStride: pageSize * heads * row, HeadStride: pageSize * row,
		TokenStride: row, PageSize: pageSize, DType: dtype, Dim: dim,
	}
	table := make([]int32, tokens/pageSize)
	for i, page := range rand.New(rand.NewPCG(3, 4)).Perm(len(table)) {
		table[i] = int32(page)
	}
	return p, table
}

func BenchmarkRead(b *testing.B) {
	const tokens = 4096
	for _, dtype := range []DType{F32, F16, BF16, F8E4M3} {
		for _, layout := range []string{"hnd", "nhd", "slots", "scaled"} {
			b.Run(fmt.Sprintf("%v/%s", dtype, layout), func(b *testing.B) {
				pageSize := 16
				if layout == "slots" {
					pageSize = 1
				}
				p, table := benchmarkPlane(dtype, pageSize, tokens)
				switch layout {
				case "nhd":
					p.HeadStride, p.TokenStride = p.TokenStride, 8*p.TokenStride
				case "scaled":
					p.Scales = []float32{1.5}
				}
				r, dst := p.Reader(table, 1), make([]float32, ChunkTokens*p.Dim)
				at := 0
				for b.Loop() {
					r.Read(dst, at, at+ChunkTokens)
					at = (at + ChunkTokens) % tokens
				}
				b.ReportMetric(float64(len(dst))*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gelem/s")
			})
		}
	}
}

func BenchmarkGather(b *testing.B) {
	const tokens = 4096
	for _, dtype := range []DType{F32, F16, BF16, F8E4M3} {
		b.Run(dtype.String(), func(b *testing.B) {
			p, table := benchmarkPlane(dtype, 16, tokens)
			positions := make([]int32, 256)
			for i := range positions {
				positions[i] = int32(i * tokens / len(positions))
			}
			r, dst := p.Reader(table, 1), make([]float32, len(positions)*p.Dim)
			for b.Loop() {
				r.Gather(dst, positions)
			}
			b.ReportMetric(float64(len(dst))*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gelem/s")
		})
	}
}

func TestReadAllocatesNothing(t *testing.T) {
	p, table := benchmarkPlane(F16, 16, 64)
	dst, positions := make([]float32, 64*p.Dim), []int32{3, 40, 41}
	if n := testing.AllocsPerRun(20, func() {
		r := p.Reader(table, 2)
		r.Read(dst, 0, 64)
		r.Gather(dst, positions)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
