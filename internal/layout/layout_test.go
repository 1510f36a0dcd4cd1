package layout

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
)

// Every token must be readable through the strides that a layout tells a device, whatever was written
// before or after it, and nothing else may be touched.
func TestWriteIsReadBack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		size := func(name string, most int) int { return rapid.IntRange(1, most).Draw(t, name) }
		c := Config{
			Kind:   rapid.SampledFrom(Kinds()).Draw(t, "kind"),
			DType:  rapid.SampledFrom([]kv.DType{kv.F32, kv.F16, kv.BF16, kv.F8E4M3}).Draw(t, "dtype"),
			Layers: size("layers", 3), KVHeads: size("heads", 3), KDim: size("k_dim", 5), VDim: size("v_dim", 5),
			Sequences: size("sequences", 3), Tokens: size("tokens", 40), PageSize: size("page_size", 20),
		}
		c.PagePadding = 4 * rapid.IntRange(0, 3).Draw(t, "padding")
		if c.DType == kv.F8E4M3 {
			c.KScales = []float32{0.5}
			for range c.KVHeads {
				c.VScales = append(c.VScales, 0.25)
			}
			c.VScales[c.KVHeads-1] = 2
		}
		l, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		r := rand.New(rand.NewPCG(1, 2))
		var pages []int32
		for _, p := range r.Perm(l.NumPages) {
			pages = append(pages, int32(p))
		}
		tables := l.Tables(pages)
		const untouched = 0xee // no element of a type below is all of these
		buffer := slices.Repeat([]byte{untouched}, int(l.Size()))
		tensor := func(dim int) []float32 {
			x := make([]float32, c.KVHeads*c.Tokens*dim)
			for i := range x {
				x[i] = float32(r.IntN(8)-4) / 4 // exact in all types, also scaled
			}
			return x
		}
		keys, values := map[[2]int][]float32{}, map[[2]int][]float32{}
		for s, table := range tables {
			for i := range c.Layers {
				k, v := tensor(c.KDim), tensor(c.VDim)
				keys[[2]int{s, i}], values[[2]int{s, i}] = k, v
				cut := rapid.IntRange(0, c.Tokens).Draw(t, "cut")
				l.Write(buffer, i, table, k, v, cut, c.Tokens)
				l.Write(buffer, i, table, k, v, 0, cut)
			}
		}

		spec := l.Spec(nil, 0)
		for s, table := range tables {
			for i := range c.Layers {
				for _, p := range []struct {
					want    []float32
					at      gpu.Span
					strides gpu.Strides
					dim     int
					scales  []float32
				}{
					{keys[[2]int{s, i}], spec.Layers[i].K, spec.K, c.KDim, spec.Layers[i].KScales},
					{values[[2]int{s, i}], spec.Layers[i].V, spec.V, c.VDim, spec.Layers[i].VScales},
				} {
					plane := &kv.Plane{
						Data:       buffer[p.at.Offset:],
						PageStride: int(p.strides.Page), HeadStride: int(p.strides.Head), TokenStride: int(p.strides.Token),
						PageSize: spec.PageSize, DType: spec.DType, Dim: p.dim, Scales: p.scales,
					}
					got := make([]float32, c.Tokens*p.dim)
					for h := range c.KVHeads {
						plane.Reader(table, h).Read(got, 0, c.Tokens)
						if !slices.Equal(got, p.want[h*len(got):(h+1)*len(got)]) {
							t.Fatalf("sequence %d, layer %d, head %d: other values are read than were written", s, i, h)
						}
					}
				}
			}
		}
		elements := c.Sequences * c.Layers * c.KVHeads * c.Tokens * (c.KDim + c.VDim)
		written := len(buffer) - len(slices.DeleteFunc(buffer, func(b byte) bool { return b != untouched }))
		if written > elements*c.DType.Size() {
			t.Errorf("%d bytes were written for %d elements of %v", written, elements, c.DType)
		}
	})
}

func TestShapes(t *testing.T) {
	t.Parallel()
	base := Config{
		DType: kv.F16, Layers: 1, KVHeads: 4, KDim: 64, VDim: 64, Sequences: 2, Tokens: 100, PageSize: 16,
	}
	for _, c := range []struct {
		kind            Kind
		pageSize, pages int
		k               gpu.Strides
		v               uint64
	}{
		{NHD, 16, 14, gpu.Strides{Page: 8192, Head: 128, Token: 512}, 14 * 8192},
		{HND, 16, 14, gpu.Strides{Page: 8192, Head: 2048, Token: 128}, 14 * 8192},
		{Packed, 16, 14, gpu.Strides{Page: 16384, Head: 256, Token: 1024}, 128},
		{Slots, 1, 200, gpu.Strides{Page: 512, Head: 128, Token: 512}, 200 * 512},
		{Contiguous, 100, 2, gpu.Strides{Page: 51200, Head: 12800, Token: 128}, 2 * 51200},
	} {
		base.Kind = c.kind
		l, err := New(base)
		if err != nil {
			t.Fatal(err)
		}
		if l.PageSize != c.pageSize || l.NumPages != c.pages || l.K != c.k || l.V != c.k || l.VOffset(0) != c.v {
			t.Errorf("%v: %d pages of %d tokens, strides %v and %v, V at %d; want %+v",
				c.kind, l.NumPages, l.PageSize, l.K, l.V, l.VOffset(0), c)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	good := Config{
		Kind: NHD, DType: kv.F16, Layers: 1, KVHeads: 1, KDim: 8, VDim: 8, Sequences: 1, Tokens: 16, PageSize: 16,
	}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(c *Config){
		"kind":      func(c *Config) { c.Kind = "nope" },
		"dtype":     func(c *Config) { c.DType = 0 },
		"layers":    func(c *Config) { c.Layers = 0 },
		"heads":     func(c *Config) { c.KVHeads = -1 },
		"k_dim":     func(c *Config) { c.KDim = 0 },
		"v_dim":     func(c *Config) { c.VDim = 0 },
		"sequences": func(c *Config) { c.Sequences = 0 },
		"tokens":    func(c *Config) { c.Tokens = 0 },
		"page size": func(c *Config) { c.PageSize = 0 },
		"padding":   func(c *Config) { c.PagePadding = 3 },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: %+v was accepted", name, c)
		}
	}
	for _, k := range Kinds() {
		if got, err := Parse(string(k)); got != k || err != nil {
			t.Errorf("Parse(%q) is %q, %v", k, got, err)
		}
	}
}
