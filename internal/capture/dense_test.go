package capture

import (
	"math"
	"os"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/testdata"
)

// slowDense is softmax attention term by term, without the shift by the highest logit.
func slowDense(c *Capture, layer, step, head int) (out, weights []float64) {
	l, kvHead := c.Layers[layer], head/c.Group()
	out, weights = make([]float64, c.VDim), make([]float64, c.N+step+1)
	sum := 0.0
	for t := range weights {
		logit := 0.0
		for d := range c.KDim {
			q := l.Q[(step*c.QueryHeads+head)*c.KDim+d]
			k := l.K[(kvHead*c.Tokens()+t)*c.KDim+d]
			logit += float64(q) * float64(k)
		}
		weights[t] = math.Exp(c.Scale * logit)
		sum += weights[t]
	}
	for t := range weights {
		weights[t] /= sum
		for d := range out {
			out[d] += weights[t] * float64(l.V[(kvHead*c.Tokens()+t)*c.VDim+d])
		}
	}
	return out, weights
}

func near(a, b, tolerance float64) bool { return math.Abs(a-b) <= tolerance }

func TestDenseAgainstSlow(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := captures(t)
		for i := range c.Layers {
			for _, values := range [][]float32{c.Layers[i].K, c.Layers[i].Q, c.Layers[i].V} {
				for j := range values {
					values[j] = float32(math.Remainder(float64(values[j]), 4)) // logits that exp can hold
				}
			}
		}
		s := new(Scratch)
		for i := range c.Layers {
			for step := range c.Steps {
				for head := range c.QueryHeads {
					out, weights := c.Dense(i, step, head, s)
					wantOut, wantWeights := slowDense(c, i, step, head)
					for _, pair := range [][2][]float64{{out, wantOut}, {weights, wantWeights}} {
						if !slices.EqualFunc(pair[0], pair[1], func(a, b float64) bool { return near(a, b, 1e-12) }) {
							t.Fatalf("layer %d, step %d, head %d: %v, want %v", i, step, head, pair[0], pair[1])
						}
					}
				}
			}
		}
	})
}

func TestDenseScratch(t *testing.T) { // not parallel: it counts allocations
	c := mustDecode(t, smallFile().bytes(t))
	first, _ := c.Dense(0, 0, 0, nil)
	second, _ := c.Dense(0, 1, 3, nil)
	if &first[0] == &second[0] {
		t.Error("without a scratch, two calls share their result")
	}
	s := new(Scratch)
	c.Dense(0, 1, 0, s)
	if n := testing.AllocsPerRun(10, func() { c.Dense(1, 1, 3, s) }); n > 0 {
		t.Errorf("%v allocations with a scratch, want none", n)
	}
}

// TestDenseHugeLogits has logits beyond what exp can hold: 64 * 65504^2 and its negative.
func TestDenseHugeLogits(t *testing.T) {
	t.Parallel()
	c := mustDecode(t, smallFile().bytes(t))
	c.Scale = 64
	c.Layers[0].K[0], c.Layers[0].K[c.KDim] = 65504, -65504
	c.Layers[0].Q[0] = 65504
	_, weights := c.Dense(0, 0, 0, nil)
	if want := []float64{1, 0, 0, 0}; !slices.Equal(weights, want) {
		t.Errorf("weights %v, want %v", weights, want)
	}
}

// TestOracle checks the embedded capture against every figure of its oracle.
func TestOracle(t *testing.T) {
	t.Parallel()
	testOracle(t, mustDecode(t, testdata.SmolLM2), testdata.SmolLM2Oracle)
}

// TestNamedOracle does the same for a capture of the tester's choice.
func TestNamedOracle(t *testing.T) {
	t.Parallel()
	path, oracle := os.Getenv("TWILIGHT_CAPTURE"), os.Getenv("TWILIGHT_ORACLE")
	if path == "" || oracle == "" {
		t.Skip("set TWILIGHT_CAPTURE and TWILIGHT_ORACLE to a capture and its oracle to check them as well")
	}
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(oracle)
	if err != nil {
		t.Fatal(err)
	}
	testOracle(t, c, data)
}

func testOracle(t *testing.T, c *Capture, data []byte) {
	t.Helper()
	oracle, err := DecodeOracle(data)
	if err != nil {
		t.Fatal(err)
	}
	if oracle.N != c.N || oracle.Scale != c.Scale || len(oracle.Layers) != len(c.Layers) {
		t.Fatalf("the oracle is of n=%d, scale=%v, %d layers, the capture of %d, %v, %d",
			oracle.N, oracle.Scale, len(oracle.Layers), c.N, c.Scale, len(c.Layers))
	}
	s, figures := new(Scratch), 0
	for i, l := range c.Layers {
		steps := oracle.Layers[l.Index]
		if len(steps) != c.Steps {
			t.Fatalf("layer %d: the oracle has %d steps, the capture %d", l.Index, len(steps), c.Steps)
		}
		for step, heads := range steps {
			if len(heads) != c.QueryHeads {
				t.Fatalf("layer %d, step %d: the oracle has %d heads, the capture %d", l.Index, step, len(heads), c.QueryHeads)
			}
			for head, want := range heads {
				out, weights := c.Dense(i, step, head, s)
				figures += checkFigures(t, [3]int{l.Index, step, head}, want, out, weights)
			}
		}
	}
	t.Logf("%d figures agree with the oracle's", figures)
}

// checkFigures allows half a unit of the last digit that the oracle prints, and the rounding of
// float64 sums.
func checkFigures(t *testing.T, at [3]int, want Figures, out, weights []float64) (checked int) {
	t.Helper()
	check := func(name string, got, want, relative float64) {
		checked++
		if !near(got, want, relative*math.Abs(want)+1e-12) {
			t.Errorf("layer, step, head %v: %s is %v, want %v", at, name, got, want)
		}
	}
	norm := 0.0
	for _, x := range out {
		norm += x * x
	}
	check("norm", math.Sqrt(norm), want.Norm, 5e-10)
	for d, x := range want.Out4 {
		check("out"+strconv.Itoa(d), out[d], x, 5e-10)
	}
	sink, err := Mass(weights, []int32{0, 1, 2, 3})
	if err != nil {
		t.Error(err)
	}
	check("sink4", sink, want.Sink4, 5e-8)
	if len(want.Budget) == 0 {
		t.Errorf("layer, step, head %v: the oracle has no budgets", at)
	}
	for text, n := range want.Budget {
		p, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		check("budget "+text, float64(Budget(weights, p)), float64(n), 0)
	}
	return checked
}

func TestBudget(t *testing.T) {
	t.Parallel()
	weights := []float64{0.125, 0.5, 0.125, 0.25}
	for _, test := range []struct {
		p    float64
		want int
	}{{0, 0}, {0.1, 1}, {0.5, 1}, {0.51, 2}, {0.75, 2}, {0.8, 3}, {1, 4}, {1.5, 4}} {
		if got := Budget(weights, test.p); got != test.want {
			t.Errorf("p=%v: %d tokens, want %d", test.p, got, test.want)
		}
	}
	if want := []float64{0.125, 0.5, 0.125, 0.25}; !slices.Equal(weights, want) {
		t.Errorf("Budget reordered the weights: %v", weights)
	}
}

// TestBudgetIsMinimal tries every subset: one of the budget's size reaches p, no smaller one does.
func TestBudgetIsMinimal(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		// Multiples of 1/64 add up without rounding.
		parts := rapid.SliceOfN(rapid.IntRange(0, 16), 1, 8).Draw(t, "parts")
		weights, total := make([]float64, len(parts)), 0
		for i, part := range parts {
			weights[i] = float64(part) / 64
			total += part
		}
		p := float64(rapid.IntRange(0, total).Draw(t, "p")) / 64
		fewest := len(weights)
		for set := range 1 << len(weights) {
			size, sum := 0, 0.0
			for i, w := range weights {
				if set>>i&1 == 1 {
					size++
					sum += w
				}
			}
			if sum >= p {
				fewest = min(fewest, size)
			}
		}
		if got := Budget(weights, p); got != fewest {
			t.Fatalf("budget %d, want %d", got, fewest)
		}
	})
}

func TestMass(t *testing.T) {
	t.Parallel()
	weights := []float64{0.125, 0.5, 0.125, 0.25}
	for _, test := range []struct {
		positions []int32
		want      float64
	}{{nil, 0}, {[]int32{1}, 0.5}, {[]int32{0, 3}, 0.375}, {[]int32{0, 1, 2, 3}, 1}} {
		if got, err := Mass(weights, test.positions); err != nil || got != test.want {
			t.Errorf("%v: mass %v, error %v, want %v", test.positions, got, err, test.want)
		}
	}
	for _, positions := range [][]int32{{4}, {-1}, {1, 1}, {2, 1}, {0, math.MaxInt32}} {
		if got, err := Mass(weights, positions); err == nil {
			t.Errorf("%v: mass %v, want an error", positions, got)
		}
	}
}

func TestRelErr(t *testing.T) {
	t.Parallel()
	var e, other RelErr
	if e.Value() != 0 {
		t.Errorf("error of nothing is %v, want 0", e.Value())
	}
	e.Add([]float32{3, 4}, []float64{3, 4})
	if e.Value() != 0 {
		t.Errorf("error of equals is %v, want 0", e.Value())
	}
	other.Add([]float32{0, 0}, []float64{0, 0})
	other.Add([]float32{3, 4}, []float64{0, 0})
	if !math.IsInf(other.Value(), 1) {
		t.Errorf("error over zeros is %v, want +Inf", other.Value())
	}
	e.Merge(other) // ||(0, 0, 3, 4)|| / ||(3, 4, 0, 0)||
	if e.Value() != 1 {
		t.Errorf("pooled error is %v, want 1", e.Value())
	}
	e.Add([]float32{float32(math.NaN())}, []float64{1})
	if !math.IsNaN(e.Value()) {
		t.Errorf("error with a NaN is %v, want NaN", e.Value())
	}
}

func BenchmarkDense(b *testing.B) {
	c := mustDecode(b, testdata.SmolLM2)
	s := new(Scratch)
	for b.Loop() {
		c.Dense(0, c.Steps-1, 0, s)
	}
}
