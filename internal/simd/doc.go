// Package simd multiplies and adds vectors as a cache or a shadow stores them: elements are decoded in
// registers, once for up to four query heads, and the memory of the vectors to come is asked for meanwhile,
// as addresses that a page table scatters are beyond a processor's own foresight.
//
// What it computes for a vector depends on the vector alone, not on its address, its neighbours or the
// number of heads. The assembly needs AVX2, FMA and F16C, and uses AVX-512 with VBMI where it pays; without
// them, plain Go gives the same within rounding. It reads no byte outside the vectors, and a fault in memory that is gone is Go's to handle, as
// runtime/debug.SetPanicOnFault describes.
package simd
