package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// format is an element type by its definition.
type format struct {
	exponentBits, mantissaBits int
	finiteOnly                 bool // no infinities, one NaN of each sign
}

var formats = map[DType]format{
	F16:    {5, 10, false},
	BF16:   {8, 7, false},
	F8E4M3: {4, 3, true},
}

// value is the number that code stands for.
func (f format) value(code int) float64 {
	mantissa := code & (1<<f.mantissaBits - 1)
	exponent := code >> f.mantissaBits & (1<<f.exponentBits - 1)
	sign := 1.0
	if code>>(f.mantissaBits+f.exponentBits) != 0 {
		sign = -1
	}
	bias := 1<<(f.exponentBits-1) - 1
	switch top := exponent == 1<<f.exponentBits-1; {
	case top && f.finiteOnly && mantissa == 1<<f.mantissaBits-1, top && !f.finiteOnly && mantissa != 0:
		return math.NaN()
	case top && !f.finiteOnly:
		return math.Inf(int(sign))
	case exponent == 0:
		return math.Copysign(math.Ldexp(float64(mantissa), 1-bias-f.mantissaBits), sign)
	}
	return sign * math.Ldexp(float64(mantissa|1<<f.mantissaBits), exponent-bias-f.mantissaBits)
}

// largest is the code of the largest finite value.
func (f format) largest() int {
	nan := (1<<f.exponentBits - 1) << f.mantissaBits
	if f.finiteOnly {
		nan |= 1<<f.mantissaBits - 1
	}
	return nan - 1
}

// round finds the code whose value is nearest to x, the even one of two, among all.
func (f format) round(x float64) int {
	sign := 0
	if math.Signbit(x) {
		sign = 1 << (f.exponentBits + f.mantissaBits)
	}
	x = math.Abs(x)
	top := f.largest()
	above := sort.Search(top+1, func(code int) bool { return f.value(code) >= x })
	if above > top {
		over := math.Ldexp(1, 1<<(f.exponentBits-1)) // what would come next, were the exponent unbounded
		if !f.finiteOnly && x-f.value(top) >= over-x {
			top++
		}
		return sign | top
	}
	if above == 0 {
		return sign
	}
	down, up := x-f.value(above-1), f.value(above)-x
	if down < up || down == up && above%2 == 1 {
		above--
	}
	return sign | above
}

func encode(t DType, f float32) int {
	var b [4]byte
	t.Encode(b[:], []float32{f})
	return int(binary.LittleEndian.Uint32(b[:]))
}

func decode(t DType, code int) float32 {
	var f [1]float32
	t.Decode(f[:], binary.LittleEndian.AppendUint32(nil, uint32(code)))
	return f[0]
}

func sameFloat(a float32, b float64) bool {
	if math.IsNaN(float64(a)) || math.IsNaN(b) {
		return math.IsNaN(float64(a)) && math.IsNaN(b)
	}
	return float64(a) == b && math.Signbit(float64(a)) == math.Signbit(b)
}

func TestEveryCode(t *testing.T) {
	t.Parallel()
	for dtype, f := range formats {
		t.Run(dtype.String(), func(t *testing.T) {
			t.Parallel()
			for code := range 1 << (8 * dtype.Size()) {
				got, want := decode(dtype, code), f.value(code)
				if !sameFloat(got, want) {
					t.Fatalf("code %#x decodes to %v, want %v", code, got, want)
				}
				back := encode(dtype, got)
				if math.IsNaN(want) {
					if !math.IsNaN(f.value(back)) || back>>(8*dtype.Size()-1) != code>>(8*dtype.Size()-1) {
						t.Fatalf("NaN %#x encodes to %#x", code, back)
					}
				} else if back != code {
					t.Fatalf("code %#x, %v, encodes to %#x", code, got, back)
				}
			}
		})
	}
}

// TestEveryTie encodes the points halfway between neighbouring values, and the floats next to them.
func TestEveryTie(t *testing.T) {
	t.Parallel()
	for dtype, f := range formats {
		t.Run(dtype.String(), func(t *testing.T) {
			t.Parallel()
			for code := range f.largest() {
				tie := float32((f.value(code) + f.value(code+1)) / 2)
				for i, x := range [...]float32{
					math.Nextafter32(tie, 0), tie, math.Nextafter32(tie, math.MaxFloat32),
				} {
					want := [...]int{code, code + code%2, code + 1}[i]
					if got := encode(dtype, x); got != want {
						t.Fatalf("%v encodes to %#x, want %#x", x, got, want)
					}
					sign := 1 << (8*dtype.Size() - 1)
					if got := encode(dtype, -x); got != want|sign {
						t.Fatalf("%v encodes to %#x, want %#x", -x, got, want|sign)
					}
				}
			}
		})
	}
}

func TestEncodeRounds(t *testing.T) {
	t.Parallel()
	for dtype, f := range formats {
		t.Run(dtype.String(), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(t *rapid.T) {
				x := math.Float32frombits(rapid.Uint32().Draw(t, "bits"))
				got := encode(dtype, x)
				if math.IsNaN(float64(x)) {
					if !math.IsNaN(f.value(got)) {
						t.Fatalf("%v encodes to %#x", x, got)
					}
				} else if want := f.round(float64(x)); got != want {
					t.Fatalf("%v encodes to %#x, want %#x", x, got, want)
				}
			})
		})
	}
}

func TestEncodeEdges(t *testing.T) {
	t.Parallel()
	inf := float32(math.Inf(1))
	for _, c := range []struct {
		dtype DType
		in    float32
		want  int
	}{
		{F16, 65504, 0x7bff},
		{F16, 65519.996, 0x7bff},
		{F16, 65520, 0x7c00},
		{F16, -inf, 0xfc00},
		{F16, 0x1p-24, 1},
		{F16, 0x1p-25, 0},
		{F16, 0x1.000002p-25, 1},
		{F16, 0x1.ff8p-15, 0x3ff},
		{F16, 0x1.ffcp-15, 0x400},
		{BF16, inf, 0x7f80},
		{BF16, math.MaxFloat32, 0x7f80},
		{BF16, math.SmallestNonzeroFloat32, 0},
		{F8E4M3, 448, 0x7e},
		{F8E4M3, 449, 0x7e},
		{F8E4M3, 1e30, 0x7e},
		{F8E4M3, -inf, 0xfe},
		{F8E4M3, 0x1p-9, 1},
		{F8E4M3, 0x1p-10, 0},
		{F8E4M3, -1, 0xb8},
	} {
		if got := encode(c.dtype, c.in); got != c.want {
			t.Errorf("%v: %v encodes to %#x, want %#x", c.dtype, c.in, got, c.want)
		}
	}
}

// TestBulk checks that long, odd and misaligned runs give what their elements give one by one.
func TestBulk(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		dtype := rapid.SampledFrom([]DType{F32, F16, BF16, F8E4M3}).Draw(t, "dtype")
		n := rapid.IntRange(0, 40).Draw(t, "n")
		off := rapid.IntRange(0, 7).Draw(t, "offset")
		buf := rapid.SliceOfN(rapid.Byte(), off+n*dtype.Size()+3, -1).Draw(t, "bytes")

		got := make([]float32, n)
		dtype.Decode(got, buf[off:])
		back := make([]byte, n*dtype.Size()+1)
		back[len(back)-1] = 0xa5
		dtype.Encode(back, got)
		for i, x := range got {
			var one [1]float32
			dtype.Decode(one[:], buf[off+i*dtype.Size():][:dtype.Size()])
			if !sameFloat(x, float64(one[0])) {
				t.Fatalf("element %d is %v, alone %v", i, x, one[0])
			}
			if dtype == F32 && math.Float32bits(x) != binary.LittleEndian.Uint32(buf[off+4*i:]) {
				t.Fatalf("element %d is %v", i, x)
			}
			alone := make([]byte, dtype.Size())
			dtype.Encode(alone, one[:])
			if string(alone) != string(back[i*dtype.Size():][:dtype.Size()]) {
				t.Fatalf("element %d encodes to %x, alone %x", i, back[i*dtype.Size():][:dtype.Size()], alone)
			}
		}
		if back[len(back)-1] != 0xa5 {
			t.Fatal("encoded beyond the end")
		}
	})
}

func TestDTypeNames(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		dtype DType
		size  int
		names []string
	}{
		{F32, 4, []string{"fp32", "f32"}},
		{F16, 2, []string{"fp16", "f16"}},
		{BF16, 2, []string{"bf16"}},
		{F8E4M3, 1, []string{"fp8", "e4m3"}},
	} {
		if !c.dtype.Valid() || c.dtype.Size() != c.size || c.dtype.String() != c.names[0] {
			t.Errorf("%v: valid %v, size %d", c.dtype, c.dtype.Valid(), c.dtype.Size())
		}
		for _, name := range c.names {
			if got, err := ParseDType(name); got != c.dtype || err != nil {
				t.Errorf("%q is %v, %v", name, got, err)
			}
		}
	}
	if _, err := ParseDType("int8"); !errors.Is(err, fault.Unsupported) {
		t.Errorf("int8: %v", err)
	}
	for _, dtype := range []DType{0, F8E4M3 + 1} {
		if dtype.Valid() || dtype.Size() != 0 || dtype.String() != "unknown" {
			t.Errorf("type %d is %v, size %d", uint8(dtype), dtype, dtype.Size())
		}
	}
}

func TestShortBuffersPanic(t *testing.T) {
	t.Parallel()
	for _, dtype := range []DType{F32, F16, BF16, F8E4M3} {
		short := slices.Clip(make([]byte, 4*dtype.Size()-1))
		for name, f := range map[string]func(){
			"decode": func() { dtype.Decode(make([]float32, 4), short) },
			"encode": func() { dtype.Encode(short, make([]float32, 4)) },
		} {
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%v: %s of a short buffer does not panic", dtype, name)
					}
				}()
				f()
			}()
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for _, dtype := range []DType{F32, F16, BF16, F8E4M3} {
		for _, n := range []int{128, 16 * 128} {
			b.Run(fmt.Sprintf("%v/%d", dtype, n), func(b *testing.B) {
				src := randomElements(dtype, 1<<16)
				dst := make([]float32, n)
				at := 0
				for b.Loop() {
					dtype.Decode(dst, src[at*dtype.Size():])
					at = (at + n) % (1 << 16)
				}
				b.ReportMetric(float64(n)*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gelem/s")
			})
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	for _, dtype := range []DType{F32, F16, BF16, F8E4M3} {
		b.Run(dtype.String(), func(b *testing.B) {
			src, dst := make([]float32, 128), make([]byte, 512)
			dtype.Decode(src, randomElements(dtype, 128))
			for b.Loop() {
				dtype.Encode(dst, src)
			}
			b.ReportMetric(128*float64(b.N)/float64(b.Elapsed().Nanoseconds()), "Gelem/s")
		})
	}
}
