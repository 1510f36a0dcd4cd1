package capture

import "math"

// halfToFloat widens an IEEE 754 binary16. A half's exponent and mantissa, moved to a float's
// place, are the same number but for the exponent bias: 2^(127-15) makes up for it, subnormals
// included.
func halfToFloat(h uint16) float32 {
	sign, rest := uint32(h&0x8000)<<16, uint32(h&0x7fff)<<13
	if h&0x7c00 == 0x7c00 {
		return math.Float32frombits(sign | 0x7f800000 | rest)
	}
	return math.Float32frombits(sign | math.Float32bits(math.Float32frombits(rest)*0x1p112))
}

// halfFromFloat rounds a finite float to the nearest binary16, ties to even. It gives an infinity
// from 65520 on.
func halfFromFloat(f float32) uint16 {
	b := math.Float32bits(f)
	sign, b := uint16(b>>16)&0x8000, b&0x7fffffff
	switch abs := math.Float32frombits(b); {
	case abs >= 65520:
		return sign | 0x7c00
	case abs < 0x1p-14: // a subnormal counts 2^-24ths
		return sign | uint16(math.RoundToEven(float64(abs)*0x1p24))
	default:
		b += 0xfff + b>>13&1
		return sign | uint16(b>>13-(127-15)<<10)
	}
}
