package simd

import "slices"

// AtLeast appends to dst the indices of the elements of x that are at least so much, ascending. NaN is not.
func AtLeast(dst []int32, x []float32, least float32) []int32 {
	n := len(dst)
	dst = slices.Grow(dst, len(x))[:n+len(x)]
	done := 0
	if lots := len(x) / lot; accelerated && lots > 0 {
		n += atLeastLots(&dst[n], &x[0], least, lots)
		done = lots * lot
	}
	for i, v := range x[done:] {
		if v >= least {
			dst[n] = int32(done + i)
			n++
		}
	}
	return dst[:n]
}
