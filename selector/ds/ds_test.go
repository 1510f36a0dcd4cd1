package ds

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// configs draws a config whose lists are those of layers 0..2 with 2 heads of dim channels.
func configs(t *rapid.T, dim int) *Config {
	c := Default()
	c.TokenBudget = rapid.IntRange(1, 400).Draw(t, "token_budget")
	c.SparsityRate = rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate")
	c.QuantBit = rapid.SampledFrom([]int{2, 4, 8, 32}).Draw(t, "quant_bit")
	c.R = rapid.IntRange(1, dim).Draw(t, "r")
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "lists"), 0))
	for layer := range 3 {
		c.Channels[strconv.Itoa(layer)] = [][]int{random.Perm(dim), random.Perm(dim)}
	}
	return c
}

func half(x float32) float32 {
	var b [2]byte
	var y [1]float32
	kv.F16.Encode(b[:], []float32{x})
	kv.F16.Decode(y[:], b[:])
	return y[0]
}

// plainLabel is a label as it is kept, restored by the formula.
func plainLabel(values []float32, bits int) []float32 {
	if bits == 32 {
		return values
	}
	top := float32(math.Pow(2, float64(bits)) - 1)
	zero := half(slices.Min(values))
	scale := half((slices.Max(values) - slices.Min(values)) / top)
	restored := make([]float32, len(values))
	for i, x := range values {
		code := float32(0)
		if scale > 0 {
			code = max(0, min(top, float32(math.Floor(float64((x-zero)*(1/scale)+.5)))))
		}
		restored[i] = scale*code + zero
	}
	return restored
}

// TestSelect compares with the formula.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := configs(t, e.Dim)
		if err := config.Validate(); err != nil {
			t.Fatal(err)
		}
		s := config.New()
		if shadow := s.Shadow(); shadow != nil {
			e.Index(shadow)
		}
		got := s.Select(nil, &e.Row)
		budget := e.Budget(config.TokenBudget, config.SparsityRate)
		list := config.Channels[strconv.Itoa(e.Layer)][e.Head][:config.R]
		e.CheckTop(t, got, budget, 1e-4*float64(1+e.Dim*len(e.Queries)), func(p int) float64 {
			label := make([]float32, config.R)
			for i, channel := range list {
				label[i] = e.Key(p)[channel]
			}
			sum := 0.0
			for i, x := range plainLabel(label, config.QuantBit) {
				for _, q := range e.Queries {
					sum += float64(q[list[i]]) * float64(x)
				}
			}
			return sum
		})
	})
}

// TestIndexIsIncremental: indexing tokens one by one gives the bytes that indexing them at once gives.
func TestIndexIsIncremental(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := configs(t, e.Dim)
		config.QuantBit = 4
		shadow := config.New().Shadow()
		records := e.Index(shadow)
		c := rapid.IntRange(e.First/16, (e.Len-1)/16).Draw(t, "chunk")
		want := slices.Clone(records.Chunk(c))
		valid := kvtest.Valid(c, e.First, e.Len)
		stale := slices.Repeat([]float32{3}, len(e.All))
		records.Update(shadow, stale, e.Dim, c, valid, valid)
		for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}).Draw(t, "order") {
			if bit := uint16(1) << i; valid&bit != 0 {
				records.Update(shadow, e.All, e.Dim, c, valid, bit)
			}
		}
		if !slices.Equal(records.Chunk(c), want) {
			t.Fatal("the record depends on how it came about")
		}
	})
}

// TestWithoutLists: where nothing says which channels to look at, all tokens are candidates.
func TestWithoutLists(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 100
	keys := make([]float32, length*dim)
	config := Default()
	config.R = 3
	config.Channels["4"] = [][]int{{1, 2, 63}}
	for name, row := range map[string]selector.Row{
		"layer":        {Layer: 5, Head: 0},
		"head":         {Layer: 4, Head: 1},
		"never seeded": {Layer: 4, Head: 0},
	} {
		row.Queries, row.Dim, row.Len, row.TokenBudget = [][]float32{keys[:dim]}, dim, length, 5
		s := config.New()
		row.Records = kvtest.Index(s.Shadow(), keys, dim, 0)
		if got := s.Select(nil, &row); len(got) != length {
			t.Errorf("%s: %d candidates, want all %d", name, len(got), length)
		}
	}
	// A list of another model's does no harm either.
	head := make([]byte, config.New().Shadow().HeadBytes(63))
	config.New().Shadow().(labels).Seed(head, 4, 0, 63)
	if seeded(head) {
		t.Error("channel 63 was accepted for keys of 63 channels")
	}
}

// calibration finds the channels of testdata in its first n steps.
func calibration(t *testing.T, n int) *Calibration {
	t.Helper()
	c := selectortest.Capture(t)
	var cal Calibration
	for i, l := range c.Layers {
		s := &selector.Sample{
			Layer: l.Index, KVHeads: c.KVHeads, QueryHeads: c.QueryHeads, Dim: c.KDim,
			Queries: l.Q[:n*c.QueryHeads*c.KDim],
		}
		for h := range c.KVHeads {
			s.Keys = append(s.Keys, c.Keys(i, h)[:(c.N+n)*c.KDim]...)
		}
		if err := cal.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	return &cal
}

// inlined is a config that got its lists from a channel file.
func inlined(t *testing.T, file map[string][][]int, r, bits int, kind string) *Config {
	t.Helper()
	config, err := Inline(
		fmt.Appendf(nil, `{"selector": {"type": "ds", "config_path": "x.json", "r": %d, "selected_channel": %q}}`, r, kind),
		func(string) ([]byte, error) { return json.Marshal(file) })
	if err != nil {
		t.Fatal(err)
	}
	parsed := struct{ Selector *Config }{Default()}
	if err := json.Unmarshal(config, &parsed); err != nil {
		t.Fatal(err)
	}
	parsed.Selector.QuantBit = bits
	return parsed.Selector
}

// TestCoverage: calibrated on four decode steps, labels of the next four find most of what there is to find
// in a quarter of real rows (oracle_topk: .977, at worst .85).
func TestCoverage(t *testing.T) {
	t.Parallel()
	file := calibration(t, 4).File()
	for _, test := range []struct {
		r, bits     int
		kind        string
		mean, worst float64
	}{
		{8, 32, "q", .95, .65}, {8, 32, "qk", .95, .65}, {16, 4, "q", .96, .7}, {16, 4, "qk", .96, .7}, {32, 2, "q", .95, .65},
	} {
		config := inlined(t, file, test.r, test.bits, test.kind)
		config.TokenBudget = 1024
		got := selectortest.Cover(t, config, 4)
		if got.Mean < test.mean || got.Worst < test.worst || got.Candidates != 1024 {
			t.Errorf("%d channels by %s in %d bits: %+v, want a mean of %v, at worst %v, with 1024 candidates",
				test.r, test.kind, test.bits, got, test.mean, test.worst)
		}
	}
}

// TestCalibration compares with the means by their formulas, of two samples.
func TestCalibration(t *testing.T) {
	t.Parallel()
	const kvHeads, queryHeads, dim = 2, 4, 5
	random := rand.New(rand.NewPCG(1, 2))
	normal := func(n int) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(random.NormFloat64())
		}
		return x
	}
	var c Calibration
	sizes := map[string][dim]float64{} // by name and head
	for _, sample := range []selector.Sample{
		{Keys: normal(kvHeads * 7 * dim), Queries: normal(3 * queryHeads * dim)},
		{Keys: normal(kvHeads * 4 * dim), Queries: normal(4 * queryHeads * dim)},
	} {
		sample.Layer, sample.KVHeads, sample.QueryHeads, sample.Dim = 11, kvHeads, queryHeads, dim
		if err := c.Add(&sample); err != nil {
			t.Fatal(err)
		}
		n, tokens := sample.Asking(), sample.Tokens()
		for d := range dim {
			add := func(kind string, head int, x float64) {
				name := fmt.Sprintf("model.layers.11.self_attn.%s_proj %d", kind, head)
				size := sizes[name]
				size[d] += math.Abs(x)
				sizes[name] = size
			}
			for h := range queryHeads {
				for i := range n {
					q := float64(sample.Queries[(i*queryHeads+h)*dim+d])
					k := float64(sample.Keys[(h/2*tokens+tokens-n+i)*dim+d])
					add("q", h, q/float64(n))
					add("qk", h, q*k/float64(n))
				}
			}
			for h := range kvHeads {
				for i := range tokens {
					add("k", h, float64(sample.Keys[(h*tokens+i)*dim+d])/float64(tokens))
				}
			}
		}
	}
	got := 0
	for name, heads := range c.File() {
		for h, order := range heads {
			want := []int{0, 1, 2, 3, 4}
			size := sizes[fmt.Sprintf("%s %d", name, h)]
			slices.SortFunc(want, func(a, b int) int {
				if size[a] > size[b] {
					return -1
				}
				return 1
			})
			if !slices.Equal(order, want) {
				t.Errorf("%s, head %d: %v, want %v by %v", name, h, order, want, size)
			}
			got++
		}
	}
	if got != len(sizes) {
		t.Errorf("%d lists, want %d", got, len(sizes))
	}
	if err := c.Add(&selector.Sample{Layer: 11, KVHeads: 1, QueryHeads: 4, Dim: 5, Keys: normal(5), Queries: normal(20)}); err == nil {
		t.Error("a sample of another model was accepted")
	}
	if err := c.Add(&selector.Sample{}); err == nil {
		t.Error("an empty sample was accepted")
	}
}

// TestInline reads a file in the shape of the original project's: lists of q for each query head, of k for
// each KV head, and of things that are no heads.
func TestInline(t *testing.T) {
	t.Parallel()
	const file = `{
		"model.layers.0.self_attn.q_proj": [[3,1,0,2], [1,3,2,0], [0,1,2,3], [0,1,3,2]],
		"model.layers.0.self_attn.k_proj": [[2,0,1,3], [3,2,1,0]],
		"model.layers.0.self_attn.o_proj": [[0]],
		"model.layers.0.mlp.down_proj": [[1,0,2,3,4]],
		"language_model.model.layers.12.self_attn.q_proj": [[0,1,2,3]]
	}`
	for kind, want := range map[string]map[string][][]int{
		// Ranks of channels 0..3 in the first group: 2+3, 1+0, 3+2, 0+1.
		"q": {"0": {{1, 3}, {0, 1}}, "12": {{0, 1}}},
		"k": {"0": {{2, 0}, {3, 2}}},
	} {
		config, err := Inline(
			fmt.Appendf(nil, `{"selector": {"type": "ds", "config_path": "x.json", "r": 2, "selected_channel": %q}}`, kind),
			func(path string) ([]byte, error) {
				if path != "x.json" {
					t.Errorf("read %q", path)
				}
				return []byte(file), nil
			})
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Selector map[string]json.RawMessage
		}
		var channels map[string][][]int
		if err := errors.Join(json.Unmarshal(config, &got), json.Unmarshal(got.Selector["channels"], &channels)); err != nil {
			t.Fatal(err)
		}
		if !maps.EqualFunc(channels, want, func(a, b [][]int) bool { return slices.EqualFunc(a, b, slices.Equal) }) {
			t.Errorf("%s: channels %v, want %v", kind, channels, want)
		}
		if _, has := got.Selector["config_path"]; has {
			t.Error("the path is still there")
		}
	}
}

func TestInlineRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ keys, file string }{
		"not JSON":      {`"r": 2`, `[`},
		"no lists":      {`"r": 2`, `{"model.layers.0.self_attn.k_proj": [[0]]}`},
		"empty":         {`"r": 2`, `{"layers.0.self_attn.q_proj": [], "layers.0.self_attn.k_proj": [[0]]}`},
		"no list":       {`"r": 2`, `{"layers.0.self_attn.q_proj": 7}`},
		"twice":         {`"r": 2`, `{"layers.0.self_attn.q_proj": [[0,0]]}`},
		"out of range":  {`"r": 2`, `{"layers.0.self_attn.q_proj": [[0,2]]}`},
		"negative":      {`"r": 2`, `{"layers.0.self_attn.q_proj": [[0,-1]]}`},
		"other lengths": {`"r": 2`, `{"layers.0.self_attn.q_proj": [[0,1],[0]]}`},
		"two names":     {`"r": 2`, `{"layers.0.self_attn.q_proj": [[0,1]], "model.layers.0.self_attn.q_proj": [[0,1]]}`},
		"r":             {`"r": "x"`, `{"layers.0.self_attn.q_proj": [[0,1]]}`},
		"negative r":    {`"r": -1`, `{"layers.0.self_attn.q_proj": [[0,1]]}`},
	} {
		config := fmt.Appendf(nil, `{"selector": {"type": "ds", "config_path": "x.json", %s}}`, test.keys)
		if got, err := Inline(config, func(string) ([]byte, error) { return []byte(test.file), nil }); err == nil {
			t.Errorf("%s: became %s", name, got)
		}
	}
}

// FuzzInline: whatever a channel file holds, what becomes of it is refused or a valid config.
func FuzzInline(f *testing.F) {
	f.Add([]byte(`{"model.layers.0.self_attn.q_proj": [[3,1,0,2], [1,3,2,0]], "model.layers.0.self_attn.k_proj": [[2,0,1,3]]}`), 2)
	f.Add([]byte(`{"layers.00.self_attn.q_proj": [[]], "layers.1.self_attn.q_proj": []}`), 1)
	f.Add([]byte(`{"layers.0.self_attn.q_proj": null, "layers.0.self_attn.k_proj": [[0]]}`), 1)
	f.Add([]byte(`{"layers.0.self_attn.q_proj": [[0]]}`), -85)
	f.Fuzz(func(t *testing.T, file []byte, r int) {
		config := fmt.Appendf(nil, `{"selector": {"type": "ds", "config_path": "x", "r": %d}}`, r)
		config, err := Inline(config, func(string) ([]byte, error) { return file, nil })
		if err != nil {
			return
		}
		parsed := struct{ Selector *Config }{Default()}
		if err := json.Unmarshal(config, &parsed); err != nil {
			t.Fatal(err)
		}
		if parsed.Selector.Validate() == nil {
			parsed.Selector.New()
		}
	})
}

func TestFits(t *testing.T) {
	t.Parallel()
	config := Default()
	config.R = 2
	config.Channels["3"] = [][]int{{0, 1}, {2, 63}}
	s := config.New().(selector.Fitter)
	for _, test := range []struct {
		layer, kvHeads, dim int
		field               string
	}{
		{3, 2, 64, ""}, {3, 4, 64, `channels["3"]`}, {2, 2, 64, `channels["2"]`}, {3, 2, 63, `channels["3"][1][1]`},
	} {
		err := s.Fits(test.layer, &kv.Geometry{KVHeads: test.kvHeads, KDim: test.dim})
		var f *fault.Error
		if (err == nil) != (test.field == "") || err != nil && (!errors.As(err, &f) || f.Field != test.field) {
			t.Errorf("%+v: error %v", test, err)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	valid := func() *Config {
		c := Default()
		c.R = 2
		c.Channels["7"] = [][]int{{3, 1, 1}}
		return c
	}
	if err := valid().Validate(); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		field  string
		change func(c *Config)
	}{
		"budget":           {"token_budget", func(c *Config) { c.TokenBudget = 0 }},
		"rate":             {"sparsity_rate", func(c *Config) { c.SparsityRate = 2 }},
		"bits":             {"quant_bit", func(c *Config) { c.QuantBit = 3 }},
		"no channels":      {"r", func(c *Config) { c.R = 0 }},
		"kind":             {"selected_channel", func(c *Config) { c.SelectedChannel = "v" }},
		"nothing to go by": {"channels", func(c *Config) { c.Channels = nil }},
		"a path only":      {"channels", func(c *Config) { c.Channels, c.ConfigPath = nil, "/etc/passwd" }},
		"no layer":         {`channels["x"]`, func(c *Config) { c.Channels["x"] = c.Channels["7"] }},
		"another spelling": {`channels["07"]`, func(c *Config) { c.Channels["07"] = c.Channels["7"] }},
		"negative layer":   {`channels["-1"]`, func(c *Config) { c.Channels["-1"] = c.Channels["7"] }},
		"no lists":         {`channels["7"]`, func(c *Config) { c.Channels["7"] = nil }},
		"short list":       {`channels["7"][1]`, func(c *Config) { c.Channels["7"] = append(c.Channels["7"], []int{1}) }},
		"twice":            {`channels["7"][0][2]`, func(c *Config) { c.R = 3 }},
		"negative":         {`channels["7"][0][0]`, func(c *Config) { c.Channels["7"][0][0] = -1 }},
		"too large":        {`channels["7"][0][0]`, func(c *Config) { c.Channels["7"][0][0] = maxChannels }},
	} {
		c := valid()
		test.change(c)
		var f *fault.Error
		if err := c.Validate(); !errors.As(err, &f) || f.Field != test.field || f.Kind != fault.Invalid {
			t.Errorf("%s: error %v, want one about %s", name, err, test.field)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 1000
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	config := Default()
	config.Channels["0"] = [][]int{rand.Perm(dim)}
	s := config.New()
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length, TokenBudget: 300,
		Records: selectortest.Index(s.Shadow(), 0, 0, keys, dim, 0), PinFirst: true,
	}
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = s.Select(dst[:0], row) })
	shadow := s.Shadow()
	chunk := make([]byte, shadow.ChunkBytes(dim))
	kvtest.NoAllocation(t, func() { shadow.Index(row.Records.Head(), chunk, keys, dim, 0xffff, 0xffff) })
}
