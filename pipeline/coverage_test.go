package pipeline

import (
	"math"
	"testing"

	"github.com/twilight-sidecar/twilight/kv"
)

// TestOutside sets up chunks with a candidate each, whose weight is given, and some with none.
func TestOutside(t *testing.T) {
	t.Parallel()
	inf := float32(math.Inf(1))
	exp := func(x float64) float32 { return float32(math.Exp(x)) }
	for name, test := range map[string]struct {
		taken, rest []float32 // bounds relative to the top
		weights     []float32 // of the chunks taken
		softcap     float32
		want        float64
	}{
		"everything is taken": {
			taken: []float32{1, 2}, weights: []float32{1, 1},
		},
		"on a line": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{exp(-1), exp(-2), exp(-3), exp(-4)},
			rest: []float32{0, -2}, want: math.Exp(-5) + math.Exp(-6),
		},
		"about a line": {
			taken: []float32{8, 8, 2, 2}, weights: []float32{exp(0), exp(-2), exp(-3), exp(-5)},
			rest: []float32{0}, want: math.Exp(-5),
		},
		"one bound for all": {
			taken: []float32{3, 3, 3, 3}, weights: []float32{exp(0), exp(-2), exp(-3), exp(-5)},
			rest: []float32{3}, want: math.Exp(-2.5),
		},
		"no more than all tokens at the bound": {
			taken: []float32{3, 3, 3, 3}, weights: []float32{1, 1, 1, 1},
			rest: []float32{-20, -30}, want: kv.ChunkTokens * (math.Exp(-20) + math.Exp(-30)),
		},
		"softcapped bounds": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{1, 1, 1, 1}, softcap: 1,
			rest: []float32{-1000}, want: 1, // with a bound of -1000 it would be nothing
		},
		"too few to fit a line": {
			taken: []float32{8, 6, 4}, weights: []float32{1, 1, 1}, rest: []float32{0}, want: math.NaN(),
		},
		"no bound on a chunk taken": {
			taken: []float32{8, inf, 4, 2}, weights: []float32{1, 1, 1, 1}, rest: []float32{0}, want: math.NaN(),
		},
		"no bound on a chunk outside": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{1, 1, 1, 1}, rest: []float32{0, inf, 1}, want: math.NaN(),
		},
	} {
		// The first token lies in the middle of chunk 2, and chunks with candidates come last.
		const first = 2*kv.ChunkTokens + 7
		top := float32(0)
		if test.softcap == 0 {
			top = 5
		}
		var bounds []float32
		var candidates []int32
		for _, b := range test.rest {
			bounds = append(bounds, b+top)
		}
		for i, b := range test.taken {
			bounds = append(bounds, b+top)
			candidates = append(candidates, int32((2+len(test.rest)+i)*kv.ChunkTokens+9))
		}
		got := new(fit).outside(bounds, test.weights, candidates, first, top, test.softcap)
		if math.IsNaN(got) != math.IsNaN(test.want) || math.Abs(got-test.want) > 1e-5*test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}
