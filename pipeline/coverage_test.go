package pipeline

import (
	"math"
	"testing"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestOutside sets up units with a candidate each, whose weight is given, and some with none.
func TestOutside(t *testing.T) {
	t.Parallel()
	inf := float32(math.Inf(1))
	exp := func(x float64) float32 { return float32(math.Exp(x)) }
	for name, test := range map[string]struct {
		taken, rest []float32 // bounds relative to the top
		weights     []float32 // of the units taken
		softcap     float32
		noBounds    bool // the scores are but scores
		want        float64
	}{
		"everything is taken": {
			taken: []float32{1, 2}, weights: []float32{1, 1},
		},
		"on a line": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{exp(-1), exp(-2), exp(-3), exp(-4)},
			rest: []float32{0, -2}, want: math.Exp(-5) + math.Exp(-6),
		},
		// Residuals of 1 with a variance of 4/2, about scores with a mean of 5 and squares of 36.
		"about a line": {
			taken: []float32{8, 8, 2, 2}, weights: []float32{exp(0), exp(-2), exp(-3), exp(-5)},
			rest: []float32{0, 4}, want: math.Exp(-5+1+1./4+25./36) + math.Exp(-3+1+1./4+1./36),
		},
		// Residuals of 2.5, .5, -.5 and -2.5.
		"one bound for all": {
			taken: []float32{3, 3, 3, 3}, weights: []float32{exp(0), exp(-2), exp(-3), exp(-5)},
			rest: []float32{3}, want: math.Exp(-2.5 + 13./4*(1+1./4)),
		},
		"no more than all tokens at the bound": {
			taken: []float32{3, 3, 3, 3}, weights: []float32{1, 1, 1, 1},
			rest: []float32{-20, -30}, want: kv.ChunkTokens * (math.Exp(-20) + math.Exp(-30)),
		},
		"no bounds": {
			taken: []float32{3, 3, 3, 3}, weights: []float32{1, 1, 1, 1}, noBounds: true,
			rest: []float32{-20, -30}, want: 2,
		},
		"softcapped bounds": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{1, 1, 1, 1}, softcap: 1,
			rest: []float32{-1000}, want: 1, // with a bound of -1000 it would be nothing
		},
		"no bound on a unit taken": {
			taken: []float32{8, inf, 6, 4, 2}, weights: []float32{exp(-1), exp(-9), exp(-2), exp(-3), exp(-4)},
			rest: []float32{0}, want: math.Exp(-5),
		},
		"no bound on a unit outside": {
			taken: []float32{8, 6, 4, 2}, weights: []float32{1, 1, 1, 1}, rest: []float32{0, inf, 1}, want: math.NaN(),
		},
		"too few to fit a line": {
			taken: []float32{8, 6, 4}, weights: []float32{1, 1, 1}, rest: []float32{0}, want: math.NaN(),
		},
	} {
		// The first token lies in the middle of chunk 2. That and the current chunk, which are no points,
		// weigh 1 together.
		const first, unit = 2*kv.ChunkTokens + 7, kv.ChunkTokens
		top := float32(0)
		if test.softcap == 0 {
			top = 5
		}
		bounds := []float32{50}
		candidates := []int32{first}
		weights := []float32{.5}
		for _, b := range test.rest {
			bounds = append(bounds, b+top)
		}
		for i, b := range test.taken {
			candidates = append(candidates, int32((2+len(bounds))*unit+9))
			bounds = append(bounds, b+top)
			weights = append(weights, test.weights[i])
		}
		candidates, weights = append(candidates, int32((2+len(bounds))*unit)), append(weights, .5)
		bounds = append(bounds, -50)
		inside := 0.0
		for _, w := range weights {
			inside += float64(w)
		}
		row := &selector.Row{
			First: first, Len: int(candidates[len(candidates)-1]) + 1, Queries: make([][]float32, 2),
			Ranking: selector.Ranking{Unit: unit, Scores: bounds, Bounds: [][]float32{make([]float32, len(bounds)), bounds}},
		}
		if test.noBounds {
			row.Ranking.Bounds = nil
		}
		var c cover
		c.begin(row, test.softcap)
		// Candidates come in parts, and weights in units of any top.
		for _, part := range [][2]int{{0, 3}, {3, len(candidates)}} {
			scaled := make([]float32, part[1]-part[0])
			for i, w := range weights[part[0]:part[1]] {
				scaled[i] = w * exp(float64(part[0]))
			}
			c.add(row, candidates[part[0]:part[1]], [][]float32{scaled, scaled}, []float32{0, top - float32(part[0])})
		}
		got := c.outside(1) * inside
		if math.IsNaN(got) != math.IsNaN(test.want) || math.Abs(got-test.want) > 1e-5*test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}
