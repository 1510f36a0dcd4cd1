package topp

import (
	"cmp"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/pruner"
)

// candidates makes weights of logits.
func candidates(logits []float32) *pruner.Candidates {
	c := &pruner.Candidates{Logits: logits}
	top := float64(slices.Max(logits))
	for _, l := range logits {
		c.Weights = append(c.Weights, float32(math.Exp(max(-87, float64(l)-top))))
	}
	return c
}

// with is the pruner for p.
func with(p float64) pruner.Pruner { return (&Config{Threshold: p}).New() }

// byWeight is the order in which top-p takes candidates.
func byWeight(c *pruner.Candidates) []int32 {
	order := make([]int32, len(c.Weights))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortStableFunc(order, func(a, b int32) int { return cmp.Compare(c.Weights[b], c.Weights[a]) })
	return order
}

func sum(c *pruner.Candidates, indices []int32) (total float64) {
	for _, i := range indices {
		total += float64(c.Weights[i])
	}
	return total
}

// TestSmallestSet: the kept are the first of the sorted candidates, they reach p, and one fewer would
// not.
func TestSmallestSet(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		spread := rapid.SampledFrom([]float64{0, 1e-3, 1, 10, 100}).Draw(t, "spread")
		logits := make([]float32, rapid.IntRange(1, 700).Draw(t, "n"))
		distinct := rapid.SampledFrom([]int{1, 2, 5, 1000}).Draw(t, "distinct values")
		for i := range logits {
			logits[i] = float32(spread * math.Floor(random.NormFloat64()*float64(distinct)) / float64(distinct))
		}
		c := candidates(logits)
		p := rapid.Float64Range(1e-6, 1).Draw(t, "p")
		if rapid.Bool().Draw(t, "override") {
			c.P = float32(p)
			p = float64(c.P)
		}
		if rapid.Bool().Draw(t, "over all") {
			c.Outside = rapid.Float64Range(0, 2).Draw(t, "outside")
		}
		got := with(cmp.Or(float64(c.P)/2, p)).Prune([]int32{-7}, c)
		if got[0] != -7 {
			t.Fatalf("what was in dst became %d", got[0])
		}
		got = got[1:]

		want := byWeight(c)[:len(got)]
		slices.Sort(want)
		if len(got) == 0 || !slices.Equal(got, want) {
			t.Fatalf("kept %v, want %v", got, want)
		}
		need := p * (1 + c.Outside) * sum(c, byWeight(c))
		kept, rounding := sum(c, got), 1e-12*need
		if kept < need-rounding && len(got) < len(logits) {
			t.Fatalf("%d kept hold %v, less than %v", len(got), kept, need)
		}
		if fewer := sum(c, byWeight(c)[:len(got)-1]); p < 1 && fewer >= need+rounding {
			t.Fatalf("%d kept, though one fewer holds %v, at least %v", len(got), fewer, need)
		}
	})
}

// TestLengths: rows of all kinds and lengths keep as many as sorting them keeps, up to one. A first candidate that weighs nothing, where public code starts its search, keeps no more.
func TestLengths(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	for kind, logit := range map[string]func(i int) float32{
		"random":    func(int) float32 { return float32(random.NormFloat64() * 3) },
		"uniform":   func(int) float32 { return float32(random.Float64() * 8) },
		"all equal": func(int) float32 { return -2 },
		"one spike": func(i int) float32 {
			if i == 0 {
				return 12
			}
			return 0
		},
		"sink dropped": func(i int) float32 {
			if i == 0 {
				return -1000
			}
			return float32(random.NormFloat64() * 3)
		},
	} {
		for _, n := range []int{1, 2, 3, 15, 16, 17, 100, 1000, 4096, 32768, 131072} {
			logits := make([]float32, n)
			for i := range logits {
				logits[i] = logit(i)
			}
			if kind == "one spike" { // anywhere
				at := random.IntN(n)
				logits[0], logits[at] = logits[at], logits[0]
			}
			c := candidates(logits)
			order := byWeight(c)
			for _, p := range []float64{.5, .85, .95, .999} {
				got := with(p).Prune(nil, c)
				need, held, want := p*sum(c, order), 0.0, 0
				for held < need && want < n {
					held += float64(c.Weights[order[want]])
					want++
				}
				if d := len(got) - want; d < -1 || d > 1 {
					t.Errorf("%s, %d candidates, p %v: kept %d, sorting keeps %d", kind, n, p, len(got), want)
				}
				if kind == "sink dropped" && n >= 1000 && p <= .95 && len(got) > n/2 {
					t.Errorf("%s, %d candidates, p %v: kept %d", kind, n, p, len(got))
				}
			}
		}
	}
}

func TestExactCases(t *testing.T) {
	t.Parallel()
	repeat := func(x float32, n int) []float32 { return slices.Repeat([]float32{x}, n) }
	upTo := func(n int) (list []int32) {
		for i := range n {
			list = append(list, int32(i))
		}
		return list
	}
	tiny := append(repeat(-80, 9), 0)
	for name, test := range map[string]struct {
		p      float64
		logits []float32
		want   []int32
	}{
		"one candidate":                {.5, repeat(-3, 1), upTo(1)},
		"uniform, half":                {.5, repeat(2, 8), upTo(4)},
		"uniform, just over half":      {.501, repeat(2, 8), upTo(5)},
		"uniform, tiny p":              {1e-9, repeat(2, 8), upTo(1)},
		"p is 1":                       {1, tiny, upTo(10)},
		"p of nearly 1 needs no dust":  {.999999, tiny, []int32{9}},
		"one dominates, not the first": {.95, []float32{0, 0, 20, 0}, []int32{2}},
		"ties go to lower positions":   {.5, []float32{0, 1, 0, 1, 1}, []int32{1, 3}},
		"a tie for the last place":     {.75, []float32{0, 3, 0, 3, 3, 3}, []int32{1, 3, 4, 5}},
	} {
		if got := with(test.p).Prune(nil, candidates(test.logits)); !slices.Equal(got, test.want) {
			t.Errorf("%s: kept %v, want %v", name, got, test.want)
		}
	}
}

// TestBinsKeepOrder: a histogram is only right if no weight lies in an earlier bin than a larger one.
func TestBinsKeepOrder(t *testing.T) {
	t.Parallel()
	weight := rapid.OneOf(rapid.Float32Range(0, 1), rapid.Float32Range(0, 1e-9), rapid.SampledFrom([]float32{0, 1}))
	rapid.Check(t, func(t *rapid.T) {
		a, b := weight.Draw(t, "a"), weight.Draw(t, "b")
		if a, b = max(a, b), min(a, b); bin(a) > bin(b) || bin(b) >= bins || bin(a) < 0 {
			t.Fatalf("%v is in bin %d, %v in bin %d of %d", a, bin(a), b, bin(b), bins)
		}
	})
	if bin(1) != 0 || bin(math.Nextafter32(1, 2)) != 0 || bin(.5) != perOctave || bin(0) != bins-1 {
		t.Errorf("bins of 1, 1+, 1/2, 0: %d, %d, %d, %d", bin(1), bin(math.Nextafter32(1, 2)), bin(.5), bin(0))
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for _, p := range []float64{1e-9, .85, 1} {
		if err := (&Config{Threshold: p}).Validate(); err != nil {
			t.Errorf("p %v: %v", p, err)
		}
	}
	for _, p := range []float64{0, -1, 1.01, math.NaN(), math.Inf(1)} {
		c := &Config{Threshold: p}
		if f, ok := errors.AsType[*fault.Error](c.Validate()); !ok || f.Field != "threshold" {
			t.Errorf("p %v: error %v, want one about threshold", p, f)
		}
		c = Default()
		c.ThresholdByLayer["3"] = p
		if f, ok := errors.AsType[*fault.Error](c.Validate()); !ok || f.Field != `threshold_by_layer["3"]` {
			t.Errorf("p %v in layer 3: error %v, want one about threshold_by_layer", p, f)
		}
	}
	if c := Method().Default().(*Config); c.Threshold != .85 {
		t.Errorf("default p is %v", c.Threshold)
	}
}

// TestThresholds: p given with the step goes before that of a query head, that before the layer's, and that
// before the one for all.
func TestThresholds(t *testing.T) {
	t.Parallel()
	config := Default()
	config.Threshold = .5
	config.ThresholdByLayer = map[string]float64{"2": .25, "3": .25}
	config.ThresholdByHead = map[string][]float64{"3": {.75, 1}}
	p := config.New()
	for _, test := range []struct {
		layer, head, want int // of 8 equal candidates
		p                 float32
	}{
		{0, 0, 4, 0}, {2, 1, 2, 0}, {3, 0, 6, 0}, {3, 1, 8, 0}, {3, 0, 1, .125}, {0, 1, 1, .125},
	} {
		c := candidates(make([]float32, 8))
		c.Layer, c.QueryHead, c.P = test.layer, test.head, test.p
		if got := p.Prune(nil, c); len(got) != test.want {
			t.Errorf("%+v: kept %v", test, got)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	c, p := spread(4096), with(.95)
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = p.Prune(dst[:0], c) })
}

func spread(n int) *pruner.Candidates {
	random := rand.New(rand.NewPCG(1, 2))
	logits := make([]float32, n)
	for i := range logits {
		logits[i] = float32(random.NormFloat64() * 3)
	}
	return candidates(logits)
}

func BenchmarkPrune(b *testing.B) {
	c, p := spread(8192), with(.95)
	var dst []int32
	b.Run("histogram", func(b *testing.B) {
		for b.Loop() {
			dst = p.Prune(dst[:0], c)
		}
	})
	b.Run("sort", func(b *testing.B) {
		for b.Loop() {
			byWeight(c)
		}
	})
}
