package capture

import (
	"math"
	"testing"
)

// slowHalf reads a finite binary16 by its definition.
func slowHalf(h uint16) float64 {
	sign, exponent, mantissa := 1-2*float64(h>>15), int(h>>10&31), float64(h&1023)
	if exponent == 0 {
		return sign * math.Ldexp(mantissa, -24)
	}
	return sign * math.Ldexp(1024+mantissa, exponent-25)
}

func TestEveryHalf(t *testing.T) {
	t.Parallel()
	for i := range 1 << 16 {
		h := uint16(i)
		f := halfToFloat(h)
		switch {
		case h&0x7fff > 0x7c00:
			if f == f {
				t.Fatalf("%#04x is %v, want NaN", h, f)
			}
			continue
		case h&0x7fff == 0x7c00:
			if !math.IsInf(float64(f), 1-2*int(h>>15)) {
				t.Fatalf("%#04x is %v, want an infinity", h, f)
			}
		case math.Float64bits(float64(f)) != math.Float64bits(slowHalf(h)):
			t.Fatalf("%#04x is %v, want %v", h, f, slowHalf(h))
		}
		if back := halfFromFloat(f); back != h {
			t.Fatalf("%#04x, as %v, came back as %#04x", h, f, back)
		}
	}
}

// TestHalfRounding tries the middle between every two neighbours and the floats on either side.
func TestHalfRounding(t *testing.T) {
	t.Parallel()
	for h := range uint16(0x7c00) {
		above := 65536.0 // what follows the largest half, for rounding
		if h+1 < 0x7c00 {
			above = slowHalf(h + 1)
		}
		middle := float32((slowHalf(h) + above) / 2)
		for _, test := range []struct {
			f    float32
			want uint16
		}{
			{math.Nextafter32(middle, 0), h},
			{middle, h + h&1},
			{math.Nextafter32(middle, math.MaxFloat32), h + 1},
		} {
			if got := halfFromFloat(test.f); got != test.want {
				t.Fatalf("%v gave %#04x, want %#04x", test.f, got, test.want)
			}
			if got := halfFromFloat(-test.f); got != test.want|0x8000 {
				t.Fatalf("%v gave %#04x, want %#04x", -test.f, got, test.want|0x8000)
			}
		}
	}
	if got := halfFromFloat(math.MaxFloat32); got != 0x7c00 {
		t.Errorf("the largest float gave %#04x, want infinity", got)
	}
}
