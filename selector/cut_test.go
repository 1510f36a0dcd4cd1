package selector

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestCut compares with a stable sort: the kept indices must be its first k.
func TestCut(t *testing.T) {
	t.Parallel()
	negativeZero := float32(math.Copysign(0, -1))
	inf := float32(math.Inf(1))
	score := rapid.OneOf(
		rapid.Float32(),
		rapid.Float32Range(-1, 1),
		rapid.SampledFrom([]float32{0, negativeZero, 1, -1, inf, -inf, math.MaxFloat32, math.SmallestNonzeroFloat32}),
	)
	rapid.Check(t, func(t *rapid.T) {
		scores := rapid.SliceOfN(score, 1, 300).Draw(t, "scores")
		k := rapid.IntRange(1, len(scores)).Draw(t, "k")

		want := make([]int, len(scores))
		for i := range want {
			want[i] = i
		}
		slices.SortStableFunc(want, func(a, b int) int {
			switch {
			case scores[a] > scores[b]:
				return -1
			case scores[a] < scores[b]:
				return 1
			}
			return 0
		})
		want = want[:k]
		slices.Sort(want)

		cut, ties := Cut(scores, k)
		var got []int
		for i, s := range scores {
			if s > cut {
				got = append(got, i)
			} else if s == cut && ties > 0 {
				got = append(got, i)
				ties--
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("kept %v, want %v (cut %v)", got, want, cut)
		}
	})
}

func BenchmarkCut(b *testing.B) {
	scores := make([]float32, 2048)
	for i := range scores {
		scores[i] = float32(math.Sin(float64(i * i)))
	}
	for b.Loop() {
		Cut(scores, 512)
	}
}
