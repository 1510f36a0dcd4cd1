package simd

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestAtLeast(t *testing.T) {
	t.Parallel()
	value := rapid.OneOf(rapid.Float32Range(-2, 2), rapid.SampledFrom([]float32{0, 1, float32(math.NaN()), float32(math.Inf(1))}))
	rapid.Check(t, func(t *rapid.T) {
		x, least := rapid.SliceOfN(value, 0, 100).Draw(t, "x"), value.Draw(t, "least")
		want := []int32{-7}
		for i, v := range x {
			if v >= least {
				want = append(want, int32(i))
			}
		}
		if got := AtLeast([]int32{-7}, x, least); !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}

func BenchmarkAtLeast(b *testing.B) {
	x, dst := make([]float32, 8192), make([]int32, 0, 8192)
	for i := range x {
		x[i] = float32(i * 7919 % 8192)
	}
	for b.Loop() {
		AtLeast(dst, x, 6000)
	}
}
