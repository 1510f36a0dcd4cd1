package capture

import (
	"bytes"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/testdata"
)

func TestDecodeSmolLM2(t *testing.T) {
	t.Parallel()
	c := mustDecode(t, testdata.SmolLM2)
	got := *c
	got.Meta, got.Layers = nil, nil
	want := Capture{N: 4096, Steps: 8, QueryHeads: 6, KVHeads: 2, KDim: 64, VDim: 64, Window: 64, Scale: 0.125}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sizes (-want +got):\n%s", diff)
	}
	var indices []int
	for _, l := range c.Layers {
		indices = append(indices, l.Index)
		// Each query of the prefill gave 1.
		sum := 0.0
		for _, x := range l.Mass {
			sum += float64(x)
		}
		if all := float64(c.QueryHeads * c.N); len(l.QWindow) == 0 || math.Abs(sum-all) > 1e-4*all {
			t.Errorf("layer %d: %d values of window queries, a mass of %v, want %v", l.Index, len(l.QWindow), sum, all)
		}
	}
	if want := []int{2, 9, 17}; !slices.Equal(indices, want) {
		t.Errorf("layers %v, want %v", indices, want)
	}
	for key, want := range map[string]string{
		"licence": "Apache-2.0", "text_source": "pydoc_data", "origin": "SmolLM2", "cut": "all positions",
	} {
		if !strings.Contains(c.Meta[key], want) {
			t.Errorf("metadata %s is %q, want it to mention %q", key, c.Meta[key], want)
		}
	}
	if c.Tokens() != 4104 || c.Group() != 3 {
		t.Errorf("%d tokens, groups of %d, want 4104 and 3", c.Tokens(), c.Group())
	}
}

func TestWriteGivesTheFileBack(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if err := Write(&out, mustDecode(t, testdata.SmolLM2)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), testdata.SmolLM2) {
		t.Error("writing the decoded file gave other bytes")
	}
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := captures(t)
		var out bytes.Buffer
		if err := Write(&out, c); err != nil {
			t.Fatal(err)
		}
		got, err := Decode(out.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		maps.DeleteFunc(got.Meta, func(key, _ string) bool {
			return slices.Contains([]string{"n", "steps", "scale", "layers"}, key)
		})
		if diff := cmp.Diff(c, got); diff != "" {
			t.Fatalf("(-written +read):\n%s", diff)
		}
	})
}

// TestViews reads the tensors by their formulas: element [h, t, d] is h*tokens*dim + t*dim + d.
func TestViews(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := captures(t)
		for i, l := range c.Layers {
			for h := range c.KVHeads {
				for j := range c.Tokens() * c.KDim {
					if c.Keys(i, h)[j] != l.K[h*c.Tokens()*c.KDim+j] {
						t.Fatalf("Keys(%d, %d)[%d] is another element", i, h, j)
					}
				}
				for j := range c.Tokens() * c.VDim {
					if c.Values(i, h)[j] != l.V[h*c.Tokens()*c.VDim+j] {
						t.Fatalf("Values(%d, %d)[%d] is another element", i, h, j)
					}
				}
			}
			for s := range c.Steps {
				for h := range c.QueryHeads {
					for d := range c.KDim {
						if c.Query(i, s, h)[d] != l.Q[(s*c.QueryHeads+h)*c.KDim+d] {
							t.Fatalf("Query(%d, %d, %d)[%d] is another element", i, s, h, d)
						}
					}
				}
			}
		}
	})
}

// slowCut picks query heads one by one and copies element by element.
func slowCut(c *Capture, layers, kvHeads []int) *Capture {
	var queryHeads []int
	for h := range c.QueryHeads {
		if slices.Contains(kvHeads, h/c.Group()) {
			queryHeads = append(queryHeads, h)
		}
	}
	take := func(s []float32, outer, heads, inner int, kept []int) (taken []float32) {
		for o := 0; s != nil && o < outer; o++ {
			for _, h := range kept {
				for i := range inner {
					taken = append(taken, s[(o*heads+h)*inner+i])
				}
			}
		}
		return taken
	}
	cut := &Capture{
		Meta: maps.Clone(c.Meta), N: c.N, Steps: c.Steps, Scale: c.Scale, KDim: c.KDim, VDim: c.VDim,
		QueryHeads: len(queryHeads), KVHeads: len(kvHeads),
	}
	cut.Meta["layers"], cut.Meta["kv_heads"] = formatInts(layers), formatInts(kvHeads)
	for _, l := range c.Layers {
		if !slices.Contains(layers, l.Index) {
			continue
		}
		if l.QWindow != nil {
			cut.Window = c.Window
		}
		cut.Layers = append(cut.Layers, Layer{
			Index:   l.Index,
			K:       take(l.K, 1, c.KVHeads, c.Tokens()*c.KDim, kvHeads),
			V:       take(l.V, 1, c.KVHeads, c.Tokens()*c.VDim, kvHeads),
			Q:       take(l.Q, c.Steps, c.QueryHeads, c.KDim, queryHeads),
			QWindow: take(l.QWindow, c.Window, c.QueryHeads, c.KDim, queryHeads),
			Mass:    take(l.Mass, 1, c.QueryHeads, c.N, queryHeads),
		})
	}
	return cut
}

func TestCutAgainstSlow(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := captures(t)
		some := func(n int, label string) []int {
			picks := rapid.SliceOfNDistinct(rapid.IntRange(0, n-1), 1, n, rapid.ID[int]).Draw(t, label)
			slices.Sort(picks)
			return picks
		}
		kvHeads, layers := some(c.KVHeads, "KV heads"), some(len(c.Layers), "layers")
		for i, at := range layers {
			layers[i] = c.Layers[at].Index
		}
		cut, err := Cut(c, layers, kvHeads)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(slowCut(c, layers, kvHeads), cut); diff != "" {
			t.Fatalf("(-slow +fast):\n%s", diff)
		}
	})
}

func TestCutRefuses(t *testing.T) {
	t.Parallel()
	c := mustDecode(t, smallFile().bytes(t))
	for name, test := range map[string]struct {
		layers, kvHeads []int
		want            string
	}{
		"no layers":     {nil, []int{0}, "no layer given"},
		"no heads":      {[]int{1}, nil, "no KV head given"},
		"unknown layer": {[]int{1, 2}, []int{0}, "no layer 2"},
		"unknown head":  {[]int{1}, []int{2}, "no KV head 2"},
		"negative head": {[]int{1}, []int{-1}, "no KV head -1"},
		"twice":         {[]int{1, 1}, []int{0}, "layer 1 follows 1"},
		"descending":    {[]int{1}, []int{1, 0}, "KV head 0 follows 1"},
	} {
		if _, err := Cut(c, test.layers, test.kvHeads); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(c *Capture)
		want  string
	}{
		"too large for F16":   {func(c *Capture) { c.Layers[1].V[4] = -65520 }, `tensor "layer.10.v": value 4 is -65520`},
		"NaN":                 {func(c *Capture) { c.Layers[0].K[1] = float32(math.NaN()) }, `tensor "layer.1.k": value 1 is NaN`},
		"missing values":      {func(c *Capture) { c.Layers[0].Q = c.Layers[0].Q[1:] }, `tensor "layer.1.q" has 31 values, expected shape [steps=2, query_heads=4, k_dim=4]`},
		"no values":           {func(c *Capture) { c.Layers[0].K = nil }, `tensor "layer.1.k" has 0 values`},
		"window unknown":      {func(c *Capture) { c.Window = 0 }, `tensor "layer.1.q_window" has 32 values`},
		"overflowing product": {func(c *Capture) { c.KDim = math.MaxInt }, `tensor "layer.1.k"`},
		"uneven groups":       {func(c *Capture) { c.QueryHeads = 3 }, "q has 3 heads, expected a multiple of the 2"},
		"no KV heads":         {func(c *Capture) { c.KVHeads = 0 }, "multiple of the 0"},
		"no layers":           {func(c *Capture) { c.Layers = nil }, "no layers"},
		"layers descending":   {func(c *Capture) { slices.Reverse(c.Layers) }, "layer 1 follows layer 10"},
		"no steps":            {func(c *Capture) { c.Steps = 0 }, "steps is 0"},
		"no scale":            {func(c *Capture) { c.Scale = 0 }, "scale is 0"},
	} {
		c := mustDecode(t, smallFile().bytes(t))
		test.spoil(c)
		var out bytes.Buffer
		if err := Write(&out, c); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
		if out.Len() > 0 {
			t.Errorf("%s: %d bytes written before the error", name, out.Len())
		}
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "small.safetensors")
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("no file: error %v, want it to name %s", err, path)
	}
	data := smallFile().bytes(t)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mustDecode(t, data), c); diff != "" {
		t.Errorf("(-decoded +opened):\n%s", diff)
	}
	if err := os.WriteFile(path, data[:len(data)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("truncated file: error %v, want it to name %s", err, path)
	}
}
