package simd

import (
	"encoding/binary"
	"math"
	"unsafe"
)

// block is how many elements the plain ways decode at a time: few enough for the stack.
const block = 64

// plainDots is Dots from element done on. If that is not the first, it adds to out.
func plainDots(t Type, out [][]float32, at int, queries [][]float32, vectors [][]byte, done int) {
	var buffer [block]float32
	for i, v := range vectors {
		for from := done; from < len(queries[0]); from += block {
			to := min(from+block, len(queries[0]))
			elements := buffer[:to-from]
			decode(t, elements, v[t.Bytes(from):])
			for h, query := range queries {
				sum := float32(0)
				if from > 0 {
					sum = out[h][at+i]
				}
				for d, q := range query[from:to] {
					sum += q * elements[d]
				}
				out[h][at+i] = sum
			}
		}
	}
}

// plainAdd is Add for the elements from..end.
func plainAdd(t Type, out, weights [][]float32, at int, vectors [][]byte, from, end int) {
	var buffer [block]float32
	for ; from < end; from += block {
		to := min(from+block, end)
		elements := buffer[:to-from]
		for i, v := range vectors {
			decode(t, elements, v[t.Bytes(from):])
			for h := range out {
				sums, w := out[h][from:to], weights[h][at+i]
				for d, x := range elements {
					sums[d] += w * x
				}
			}
		}
	}
}

// decode is Decode.
func decode(t Type, dst []float32, src []byte) {
	switch t {
	case F32:
		decodeF32(dst, src)
	case F16:
		decodeF16(dst, src)
	case BF16:
		decodeBF16(dst, src)
	case F8:
		decodeF8(dst, src)
	}
}

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// decodeF32 is a copy where it can be: ten times the speed of the loop.
func decodeF32(dst []float32, src []byte) {
	if littleEndian {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(dst))), 4*len(dst)), src)
		return
	}
	for i := range dst {
		dst[i] = math.Float32frombits(binary.LittleEndian.Uint32(src[4*i:]))
	}
}

// decodeF16 looks every value up, which beats computing it threefold. Loading several at once gains as
// much again, here and in decodeBF16.
func decodeF16(dst []float32, src []byte) {
	table := f16Table
	for len(dst) >= 4 && len(src) >= 8 {
		v := binary.LittleEndian.Uint64(src)
		dst[0] = table[uint16(v)]
		dst[1] = table[uint16(v>>16)]
		dst[2] = table[uint16(v>>32)]
		dst[3] = table[uint16(v>>48)]
		dst, src = dst[4:], src[8:]
	}
	for i := range dst {
		dst[i] = table[binary.LittleEndian.Uint16(src[2*i:])]
	}
}

func decodeBF16(dst []float32, src []byte) {
	for len(dst) >= 4 && len(src) >= 8 {
		v := binary.LittleEndian.Uint64(src)
		dst[0] = math.Float32frombits(uint32(v) << 16)
		dst[1] = math.Float32frombits(uint32(v) & 0xffff0000)
		dst[2] = math.Float32frombits(uint32(v>>32) << 16)
		dst[3] = math.Float32frombits(uint32(v>>32) & 0xffff0000)
		dst, src = dst[4:], src[8:]
	}
	for i := range dst {
		dst[i] = math.Float32frombits(uint32(binary.LittleEndian.Uint16(src[2*i:])) << 16)
	}
}

func decodeF8(dst []float32, src []byte) {
	for i := range dst {
		dst[i] = f8Table[src[i]]
	}
}

// The tables hold every value: 256 KiB, of which real keys touch a part, and 1 KiB.
var (
	f16Table = tabulateF16()
	f8Table  = tabulateF8()
)

func tabulateF16() *[1 << 16]float32 {
	var t [1 << 16]float32
	for i := range t {
		h := uint32(i)
		// Moved into float32's place, the exponent lacks the difference of the biases, 127-15;
		// multiplying by its power of two supplies it, to subnormals as well.
		bits := math.Float32bits(math.Float32frombits((h&0x7fff)<<13) * 0x1p112)
		if h&0x7c00 == 0x7c00 {
			bits |= 0x7f800000
		}
		t[i] = math.Float32frombits(bits | (h&0x8000)<<16)
	}
	return &t
}

func tabulateF8() *[1 << 8]float32 {
	var t [1 << 8]float32
	for i := range t {
		h := uint32(i)
		bits := math.Float32bits(math.Float32frombits((h&0x7f)<<20) * 0x1p120)
		if h&0x7f == 0x7f {
			bits = 0x7fc00000
		}
		t[i] = math.Float32frombits(bits | (h&0x80)<<24)
	}
	return &t
}
