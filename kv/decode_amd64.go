package kv

import "golang.org/x/sys/cpu"

// Eight elements at a time are converted about ten times as fast as by the loops that do the rest.
const lot = 8

var hasLots = cpu.X86.HasAVX2 && cpu.X86.HasF16C

// f16Lots and bf16Lots convert n elements; n is a multiple of lot, and not 0.
//
//go:noescape
func f16Lots(dst *float32, src *byte, n int)

//go:noescape
func bf16Lots(dst *float32, src *byte, n int)

// decodeLots converts as many elements from the front of src as it can, and returns how many. t is F16
// or BF16.
func decodeLots(t DType, dst []float32, src []byte) int {
	n := len(dst) &^ (lot - 1)
	if !hasLots || n == 0 {
		return 0
	}
	src = src[:n*t.Size()]
	if t == F16 {
		f16Lots(&dst[0], &src[0], n)
	} else {
		bf16Lots(&dst[0], &src[0], n)
	}
	return n
}
