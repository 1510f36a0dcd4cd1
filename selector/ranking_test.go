package selector

import (
	"cmp"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestTake: whatever the steps, the candidates are the positions of the first units by score, and no step
// takes one that was there.
func TestTake(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		unit := rapid.SampledFrom([]int{1, 16, 48}).Draw(t, "unit")
		row := &Row{Len: rapid.IntRange(1, 600).Draw(t, "length")}
		row.First = rapid.IntRange(0, min(70, row.Len-1)).Draw(t, "first")
		n := (row.Len-1)/unit + 1 - row.First/unit
		r := &Ranking{Unit: unit, Scores: rapid.SliceOfN(rapid.OneOf(
			rapid.Float32Range(-3, 3), rapid.SampledFrom([]float32{0, 1, float32(math.Inf(1)), math.MaxFloat32}),
		), n, n).Draw(t, "scores")}
		order := make([]int, n)
		for i := range order {
			order[i] = i
		}
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(r.Scores[b], r.Scores[a]) })

		for range rapid.IntRange(1, 5).Draw(t, "steps") {
			from, to := r.Taken, rapid.IntRange(max(1, r.Taken), n).Draw(t, "to")
			want := r.among(row, order[from:to])
			if got := r.Take([]int32{-7}, row, to); !slices.Equal(got[1:], want) || got[0] != -7 || r.Taken != to {
				t.Fatalf("units %d..%d: %v, want %v after what was there; %d taken", from, to, got, want, r.Taken)
			}
			if all, want := r.Candidates(nil, row), r.among(row, order[:to]); !slices.Equal(all, want) {
				t.Fatalf("candidates %v, want %v", all, want)
			}
		}
	})
}

// among are the positions in units.
func (r *Ranking) among(row *Row, units []int) (positions []int32) {
	for p := row.First; p < row.Len; p++ {
		if slices.Contains(units, p/r.Unit-row.First/r.Unit) {
			positions = append(positions, int32(p))
		}
	}
	return positions
}
