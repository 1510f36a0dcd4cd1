package kv

import (
	"encoding/binary"
	"math"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/simd"
)

// DType is the type of stored elements. Elements are little-endian and need no alignment.
type DType uint8

// The element types, numbered as in proto DataType. F8E4M3 is OCP's finite-only format: no infinities,
// NaN is 0x7f and 0xff, the largest value 448.
const (
	F32 DType = iota + 1
	F16
	BF16
	F8E4M3
)

var dtypes = [...]struct {
	name string
	size int
	simd simd.Type
}{
	F32: {"fp32", 4, simd.F32}, F16: {"fp16", 2, simd.F16}, BF16: {"bf16", 2, simd.BF16}, F8E4M3: {"fp8", 1, simd.F8},
}

// ParseDType reads the name of a type: fp32, fp16, bf16 or fp8, also spelt f32, f16 and e4m3.
func ParseDType(s string) (DType, error) {
	switch s {
	case "fp32", "f32":
		return F32, nil
	case "fp16", "f16":
		return F16, nil
	case "bf16":
		return BF16, nil
	case "fp8", "e4m3":
		return F8E4M3, nil
	}
	return 0, fault.Newf(fault.Unsupported, "", "dtype %q is unknown: take fp32, fp16, bf16 or fp8", s)
}

// Valid says whether t is one of the types.
func (t DType) Valid() bool { return F32 <= t && t <= F8E4M3 }

// Size returns the bytes of an element, 0 if t is not valid.
func (t DType) Size() int {
	if !t.Valid() {
		return 0
	}
	return dtypes[t].size
}

func (t DType) String() string {
	if !t.Valid() {
		return "unknown"
	}
	return dtypes[t].name
}

// Decode converts the first len(dst) elements of src, exactly. It panics if src is shorter, and does
// nothing if t is not valid.
func (t DType) Decode(dst []float32, src []byte) {
	if t.Valid() {
		simd.Decode(dtypes[t].simd, dst, src)
	}
}

// Encode converts src into the first len(src)*Size bytes of dst, to the nearest value, ties to even.
// What is too large becomes Inf, or for F8E4M3 the largest value of its sign; NaN stays NaN. It panics
// if dst is shorter, and does nothing if t is not valid.
func (t DType) Encode(dst []byte, src []float32) {
	dst = dst[:len(src)*t.Size()]
	switch t {
	case F32:
		for i, f := range src {
			binary.LittleEndian.PutUint32(dst[4*i:], math.Float32bits(f))
		}
	case F16:
		for i, f := range src {
			binary.LittleEndian.PutUint16(dst[2*i:], encodeF16(f))
		}
	case BF16:
		for i, f := range src {
			binary.LittleEndian.PutUint16(dst[2*i:], encodeBF16(f))
		}
	case F8E4M3:
		for i, f := range src {
			dst[i] = encodeF8(f)
		}
	}
}

// encodeF16 rounds normal values by adding just under half of what is cut off, or half if the last
// kept bit is odd; a carry moves into the exponent, as it should. Subnormal values are rounded by the
// addition of a number whose last bit is worth theirs.
func encodeF16(f float32) uint16 {
	bits := math.Float32bits(f)
	sign, abs := uint16(bits>>16)&0x8000, bits&0x7fffffff
	switch {
	case abs > 0x7f800000: // NaN
		return sign | 0x7e00 | uint16(abs>>13)&0x3ff
	case abs >= 0x477ff000: // 65520 and up: rounds to Inf
		return sign | 0x7c00
	case abs < 0x38800000: // below 2^-14
		return sign | uint16(math.Float32bits(math.Float32frombits(abs)+0.5)-math.Float32bits(0.5))
	}
	return sign | uint16((abs-112<<23+0xfff+(abs>>13)&1)>>13)
}

func encodeBF16(f float32) uint16 {
	bits := math.Float32bits(f)
	if bits&0x7fffffff > 0x7f800000 { // NaN
		return uint16(bits>>16) | 0x40
	}
	return uint16((bits + 0x7fff + (bits>>16)&1) >> 16)
}

func encodeF8(f float32) uint8 {
	bits := math.Float32bits(f)
	sign, abs := uint8(bits>>24)&0x80, bits&0x7fffffff
	switch {
	case abs > 0x7f800000: // NaN
		return sign | 0x7f
	case abs >= 0x43e00000: // 448 and up
		return sign | 0x7e
	case abs < 0x3c800000: // below 2^-6
		const magic = 1 << 14
		return sign | uint8(math.Float32bits(math.Float32frombits(abs)+magic)-math.Float32bits(magic))
	}
	return sign | uint8((abs-120<<23+0x7ffff+(abs>>20)&1)>>20)
}
