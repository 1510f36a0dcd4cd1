package duo

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// TestSelect: a retrieval head sees all tokens, a streaming head exactly the sinks and the recent ones.
func TestSelect(t *testing.T) {
	t.Parallel()
	config := Default()
	config.Heads = [][]float64{{.49, .5}, {1, 0}}
	s := config.New()
	if s.Shadow() != nil {
		t.Error("it keeps a shadow")
	}
	span := func(from, to int32) (list []int32) {
		for p := from; p < to; p++ {
			list = append(list, p)
		}
		return list
	}
	ends := append(span(30, 94), span(744, 1000)...)
	for name, test := range map[string]struct {
		layer, head, own int
		want             []int32
	}{
		"below the threshold":   {0, 0, 0, ends},
		"at the threshold":      {0, 1, 0, span(30, 1000)},
		"retrieval":             {1, 0, 0, span(30, 1000)},
		"streaming":             {1, 1, 0, ends},
		"own budget, streaming": {1, 1, 10, append(span(30, 94), span(990, 1000)...)},
		"own budget, retrieval": {1, 0, 10, span(30, 1000)},
		"a layer beyond heads":  {2, 0, 0, span(30, 1000)},
		"a head beyond heads":   {1, 2, 0, span(30, 1000)},
	} {
		for _, pin := range []bool{false, true} {
			row := &selector.Row{
				Layer: test.layer, Head: test.head, First: 30, Len: 1000, TokenBudget: test.own, PinFirst: pin, PinCurrent: pin,
			}
			if got := s.Select([]int32{-7}, row); got[0] != -7 || !slices.Equal(got[1:], test.want) {
				t.Errorf("%s, pins %v: %v, want %v after what was there", name, pin, got, test.want)
			}
		}
	}
}

// TestSparsity: as many heads stream as lie below the quantile of distinct scores, and they are the lowest.
func TestSparsity(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		layers, kvHeads := rapid.IntRange(1, 5).Draw(t, "layers"), rapid.IntRange(1, 4).Draw(t, "heads")
		c := Default()
		c.Sparsity = rapid.OneOf(rapid.Float64Range(0, 1), rapid.SampledFrom([]float64{0, .25, .5, 1})).Draw(t, "sparsity")
		var flat []float64
		score := rapid.Map(rapid.IntRange(0, 1000), func(i int) float64 { return float64(i) / 1000 })
		for range layers {
			row := rapid.SliceOfN(score, kvHeads, kvHeads).Draw(t, "scores")
			c.Heads = append(c.Heads, row)
			flat = append(flat, row...)
		}
		n, highest, lowest := 0, 0.0, 1.0 // of the streaming heads, and of the others
		for l, row := range c.streams() {
			for h, streams := range row {
				if score := c.Heads[l][h]; streams {
					n, highest = n+1, max(highest, score)
				} else {
					lowest = min(lowest, score)
				}
			}
		}
		if highest > lowest {
			t.Fatalf("a head with %v streams, one with %v does not", highest, lowest)
		}
		slices.Sort(flat)
		if len(slices.Compact(slices.Clone(flat))) < len(flat) {
			return // which of equal scores stream is another matter
		}
		// The quantile by linear interpolation.
		at := c.Sparsity * float64(len(flat)-1)
		i := int(at)
		quantile := flat[i] + (at-float64(i))*(flat[min(i+1, len(flat)-1)]-flat[i])
		below := 0
		for _, score := range flat {
			if score < quantile {
				below++
			}
		}
		if c.Sparsity == 1 {
			below = len(flat)
		}
		// Interpolation rounds: right at a score it may fall to either side.
		if n != below && math.Abs(at-math.Round(at)) > 1e-9 {
			t.Fatalf("%d heads stream, want %d of %v", n, below, flat)
		}
	})
}

func TestFits(t *testing.T) {
	t.Parallel()
	config := Default()
	config.Heads = [][]float64{{1, 0}, {0, 1}}
	s := config.New().(selector.Fitter)
	for _, test := range []struct {
		layer, kvHeads int
		field          string
	}{{0, 2, ""}, {1, 2, ""}, {2, 2, "heads"}, {1, 3, "heads[1]"}, {1, 1, "heads[1]"}} {
		err := s.Fits(test.layer, &kv.Geometry{KVHeads: test.kvHeads})
		var f *fault.Error
		if (err == nil) != (test.field == "") || err != nil && (!errors.As(err, &f) || f.Field != test.field) {
			t.Errorf("%+v: error %v", test, err)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		field  string
		change func(c *Config)
	}{
		"as it is":         {"", func(*Config) {}},
		"sinks":            {"sink_size", func(c *Config) { c.SinkSize = -1 }},
		"recent":           {"recent_size", func(c *Config) { c.RecentSize = 0 }},
		"threshold":        {"threshold", func(c *Config) { c.Threshold = math.NaN() }},
		"sparsity":         {"sparsity", func(c *Config) { c.Sparsity = 1.5 }},
		"nothing to go by": {"heads", func(c *Config) { c.Heads = nil }},
		"a path only":      {"heads", func(c *Config) { c.Heads, c.HeadsPath = nil, "/etc/passwd" }},
		"no heads":         {"heads[0]", func(c *Config) { c.Heads = [][]float64{{}} }},
		"other numbers":    {"heads[1]", func(c *Config) { c.Heads = [][]float64{{1}, {1, 0}} }},
		"too large":        {"heads[0][1]", func(c *Config) { c.Heads[0][1] = 1.1 }},
		"no number":        {"heads[0][1]", func(c *Config) { c.Heads[0][1] = math.NaN() }},
	} {
		c := Default()
		c.Heads = [][]float64{{1, .3}}
		test.change(c)
		var f *fault.Error
		switch err := c.Validate(); {
		case test.field == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case test.field != "" && (!errors.As(err, &f) || f.Field != test.field || f.Kind != fault.Invalid):
			t.Errorf("%s: error %v, want one about %s", name, err, test.field)
		}
	}
}

func inline(file string) ([][]float64, error) {
	config, err := Inline([]byte(`{"selector": {"type": "duo", "heads_path": "x.tsv", "sparsity": 0.5}}`),
		func(string) ([]byte, error) { return []byte(file), nil })
	if err != nil {
		return nil, err
	}
	var parsed struct{ Selector Config }
	if err := json.Unmarshal(config, &parsed); err != nil {
		return nil, err
	}
	if parsed.Selector.HeadsPath != "" {
		return nil, errors.New("the path is still there")
	}
	return parsed.Selector.Heads, nil
}

func TestInline(t *testing.T) {
	t.Parallel()
	got, err := inline("6.054687500000000000e-01\t0.000000000000000000e+00\n-1e-3\t1.5\n0.25\t1")
	want := [][]float64{{.60546875, 0}, {0, 1}, {.25, 1}}
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v, error %v, want %v", got, err, want)
	}
	for name, file := range map[string]string{
		"no number": "1\tx\n", "NaN": "nan\t1\n", "another length": "1\t0\n1\n", "an empty line": "1\t0\n\n1\t0\n",
	} {
		if got, err := inline(file); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: %v, error %v, want one about the line", name, got, err)
		}
	}
}

// FuzzInline: whatever a head file holds, what becomes of it is refused or has valid scores.
func FuzzInline(f *testing.F) {
	f.Add("0.5\t1\n0\t0.25\n")
	f.Add("1e400\n")
	f.Add("\n")
	f.Fuzz(func(t *testing.T, file string) {
		heads, err := inline(file)
		if err != nil || len(heads) == 0 {
			return
		}
		c := Default()
		c.Heads = heads
		if err := c.Validate(); err != nil {
			t.Errorf("%q: %v", file, err)
		}
	})
}

// TestCalibration compares with dense attention on the real rows, and reads its own file back.
func TestCalibration(t *testing.T) {
	t.Parallel()
	c := selectortest.Capture(t)
	cal := Calibration{SinkSize: 64, RecentSize: 256}
	want := make([][]float64, c.Layers[len(c.Layers)-1].Index+1)
	for i, l := range c.Layers {
		s := &selector.Sample{
			Layer: l.Index, KVHeads: c.KVHeads, QueryHeads: c.QueryHeads, Dim: c.KDim, Keys: l.K, Queries: l.Q,
		}
		for range 2 { // that of two equal samples is the same
			if err := cal.Add(s, c.Scale); err != nil {
				t.Fatal(err)
			}
		}
		want[l.Index] = make([]float64, c.KVHeads)
		for h := range c.QueryHeads {
			for step := range c.Steps {
				_, weights := c.Dense(i, step, h, nil)
				var far []int32
				for p := 64; p < len(weights)-256; p++ {
					far = append(far, int32(p))
				}
				mass, err := capture.Mass(weights, far)
				if err != nil {
					t.Fatal(err)
				}
				want[l.Index][h/c.Group()] += mass / float64(c.Steps*c.Group())
			}
		}
	}
	for l := range want { // layers 2, 9 and 17 were sampled
		switch {
		case l <= 5:
			want[l] = want[2]
		case l <= 13:
			want[l] = want[9]
		default:
			want[l] = want[17]
		}
	}
	got, err := inline(string(cal.File()))
	if err != nil {
		t.Fatal(err)
	}
	close := cmp.Comparer(func(a, b float64) bool { return math.Abs(a-b) < 1e-9 })
	if !cmp.Equal(got, want, close) {
		t.Error(cmp.Diff(want, got, close))
	}
	for name, s := range map[string]*selector.Sample{
		"another model's": {Layer: 2, KVHeads: 1, QueryHeads: 1, Dim: 1, Keys: []float32{1}, Queries: []float32{1}},
		"empty":           {},
	} {
		if err := cal.Add(s, 1); err == nil {
			t.Errorf("a sample that is %s was accepted", name)
		}
	}
}

// TestCoverage: with the heads that look far as retrieval heads, real rows keep their weight; with those
// same heads streaming they lose it.
func TestCoverage(t *testing.T) {
	t.Parallel()
	c := selectortest.Capture(t)
	cal := Calibration{SinkSize: 64, RecentSize: 256}
	for _, l := range c.Layers {
		s := &selector.Sample{
			Layer: l.Index, KVHeads: c.KVHeads, QueryHeads: c.QueryHeads, Dim: c.KDim,
			Queries: l.Q[:4*c.QueryHeads*c.KDim],
		}
		for h := range c.KVHeads {
			s.Keys = append(s.Keys, l.K[h*c.Tokens()*c.KDim:][:(c.N+4)*c.KDim]...)
		}
		if err := cal.Add(s, c.Scale); err != nil {
			t.Fatal(err)
		}
	}
	heads, err := inline(string(cal.File()))
	if err != nil {
		t.Fatal(err)
	}
	config := Default()
	config.Heads, config.Threshold = heads, .15
	right := selectortest.Cover(t, config, 4)
	wrong := Default()
	for _, row := range heads {
		var turned []float64
		for _, score := range row {
			turned = append(turned, 1-score)
		}
		wrong.Heads = append(wrong.Heads, turned)
	}
	wrong.Threshold = .85
	if other := selectortest.Cover(t, wrong, 4); right.Mean < other.Mean+.1 || right.Candidates > 4000 {
		t.Errorf("%+v, and with the heads turned round %+v", right, other)
	}
}

func ExampleCalibration() {
	keys := []float32{0, 0, 0, 0, 9, 0, 0, 0} // the fifth of eight tokens
	cal := Calibration{SinkSize: 1, RecentSize: 2}
	_ = cal.Add(&selector.Sample{KVHeads: 1, QueryHeads: 1, Dim: 1, Keys: keys, Queries: []float32{1}}, 1)
	fmt.Printf("%.4s\n", cal.File())
	// Output: 9.99
}
