package gputest

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
)

func testSelfTest(t *testing.T, s *suite) {
	if err := s.device.SelfTest(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// verify runs a batch of three sequences and checks it against the reference.
func (s *suite) verify(t *testing.T, setup setup) {
	t.Helper()
	e := s.engine(t, setup)
	rows := []seq{{0, 320, 0}, {1, 37, 0}, {2, 300, 21}}
	e.check(rows, e.decode(rows...))
}

func testDTypes(t *testing.T, s *suite) {
	types := []kv.DType{kv.F32, kv.F16, kv.BF16, kv.F8E4M3}
	for i, cache := range types {
		for j, query := range types {
			t.Run(fmt.Sprintf("cache=%v/query=%v", cache, query), func(t *testing.T) {
				setup := standard()
				setup.shape.DType, setup.geometry.Query = cache, query
				setup.geometry.Output = []kv.DType{kv.F32, kv.F16, kv.BF16}[(i+j)%3]
				if query == kv.F8E4M3 {
					setup.geometry.QueryScale = 0.5
				}
				s.verify(t, setup)
			})
		}
	}
}

func testHeadSizes(t *testing.T, s *suite) {
	for _, dims := range [][2]int{{64, 64}, {80, 80}, {96, 96}, {128, 128}, {256, 256}, {192, 128}, {33, 7}} {
		t.Run(fmt.Sprintf("%dx%d", dims[0], dims[1]), func(t *testing.T) {
			setup := standard()
			setup.geometry.KDim, setup.geometry.VDim = dims[0], dims[1]
			setup.geometry.Scale = 1 / float32(dims[0]) * 8
			s.verify(t, setup)
		})
	}
}

func testGroups(t *testing.T, s *suite) {
	for _, group := range []int{1, 3, 4, 7} {
		for name, config := range map[string]string{"union": quest, "per_query_head": questPerHead} {
			t.Run(fmt.Sprintf("%d/%s", group, name), func(t *testing.T) {
				setup := standard()
				setup.geometry.QueryHeads, setup.config = 2*group, config
				s.verify(t, setup)
			})
		}
	}
}

func testMethods(t *testing.T, s *suite) {
	const all = `"skip_first_two_layers": false`
	const bits = `"weight_estimator": {"type": "min_max_quant", "quant_bit": 4}`
	for name, config := range map[string]string{
		"dense":          keepAll,
		"default":        ``,
		"skipped layers": `{"selector": {"type": "quest", "token_budget": 64}}`,
		"dense below":    `{` + all + `, "dense_below": 100, "selector": {"type": "quest", "token_budget": 64}}`,
		"quest":          `{` + all + `, "selector": {"type": "quest", "token_budget": 64}}`,
		"exact top_p":    `{` + all + `, "weight_pruner": {"type": "top_p", "threshold": 0.9}}`,
		"top_p":          `{` + all + `, ` + bits + `, "weight_pruner": {"type": "top_p", "threshold": 0.9}}`,
		"threshold":      `{` + all + `, ` + bits + `, "weight_pruner": {"type": "threshold", "threshold": 2}}`,
		"no pruner":      `{` + all + `, ` + bits + `}`,
		"adakv":          `{` + all + `, "selector": {"type": "adakv", "token_budget": 64, "selector": {"type": "quest"}}}`,
		"adakv per query head": `{` + all + `, "group": "per_query_head",
			"selector": {"type": "adakv", "token_budget": 48, "selector": {"type": "oracle_topk"}}}`,
		"pyramidkv": `{` + all + `, "selector": {"type": "pyramidkv", "token_budget": 96, "num_layers": 6,
			"selector": {"type": "quest"}}}`,
		"p over all": `{` + all + `, ` + bits + `, "p_over": "all",
			"selector": {"type": "quest", "token_budget": 160},
			"weight_pruner": {"type": "top_p", "threshold": 0.5}}`,
	} {
		t.Run(name, func(t *testing.T) {
			setup := standard()
			setup.config = config
			s.verify(t, setup)
		})
	}
}

func testLogits(t *testing.T, s *suite) {
	for name, change := range map[string]func(g *kv.Geometry){
		"softcap": func(g *kv.Geometry) { g.Softcap = 5 },
		"sinks":   func(g *kv.Geometry) { g.Sinks = []float32{-3, 0, 2, 7} },
		"both":    func(g *kv.Geometry) { g.Softcap, g.Sinks = 20, []float32{1, 2, 3, 4} },
		"scale":   func(g *kv.Geometry) { g.Scale = -0.05 },
	} {
		t.Run(name, func(t *testing.T) {
			setup := standard()
			change(&setup.geometry)
			s.verify(t, setup)
		})
	}
}

func testScales(t *testing.T, s *suite) {
	for name, scales := range map[string][2][]float32{
		"one":      {{0.25}, {3}},
		"per head": {{0.5, 2}, {0.01, 1}},
		"keys":     {{0.3, 0.7}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			setup := standard()
			setup.shape.DType = kv.F8E4M3
			setup.shape.KScales, setup.shape.VScales = scales[0], scales[1]
			s.verify(t, setup)
		})
	}
}

// testLayouts runs the same tokens in every layout, page size and order of pages: the same bits.
func testLayouts(t *testing.T, s *suite) {
	own := map[layout.Kind][]int{layout.Slots: {1}, layout.Contiguous: {320, 325}}
	rows := []seq{{0, 320, 0}, {1, 37, 0}, {2, 300, 21}}
	for _, dtype := range []kv.DType{kv.F16, kv.F8E4M3} {
		setup := standard()
		setup.shape.DType = dtype
		if dtype == kv.F8E4M3 {
			setup.shape.KScales, setup.shape.VScales = []float32{0.5, 2}, []float32{2}
		}
		e := s.engine(t, setup)
		want := e.decode(rows...)
		e.check(rows, want)
		for _, kind := range layout.Kinds() {
			sizes, ok := own[kind]
			if !ok {
				sizes = []int{1, 7, 16, 32, 64}
			}
			for _, size := range sizes {
				name := fmt.Sprintf("%v/%v/pages of %d", dtype, kind, size)
				t.Run(name, func(t *testing.T) {
					other := setup
					other.shape.Kind, other.shape.PageSize = kind, size
					if kind == layout.Contiguous {
						other.shape.Tokens = size
					}
					e := s.engine(t, other)
					same(t, name, want, e.decode(rows...))
				})
			}
		}
	}
}

// testPlacement varies where layers lie.
func testPlacement(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}, {1, 37, 0}, {2, 300, 21}}
	want := s.engine(t, standard()).decode(rows...)

	t.Run("padded pages", func(t *testing.T) {
		setup := standard()
		setup.shape.PagePadding = 192
		same(t, "padded pages", want, s.engine(t, setup).decode(rows...))
	})

	t.Run("a region for each plane", func(t *testing.T) {
		setup := standard()
		setup.edit = func(e *engine, spec *gpu.CacheSpec) {
			size := int(e.layout.VOffset(0))
			for i := range spec.Layers {
				spec.Layers[i].K = e.lendApart(e.bytes[e.layout.KOffset(i):][:size])
				spec.Layers[i].V = e.lendApart(e.bytes[e.layout.VOffset(i):][:size])
			}
		}
		e := s.engine(t, setup)
		same(t, "a region for each plane", want, e.decode(rows...))
	})
}

// lendApart lends data in memory of its own, behind other bytes of the file and of the region.
func (e *engine) lendApart(data []byte) gpu.Span {
	e.t.Helper()
	const skipped, offset = 4096, 64
	buffer := e.suite.memory.Alloc(e.t, skipped+offset+len(data))
	buffer.Write(skipped+offset, data)
	region := buffer.Region(e.t, skipped+offset+len(data), false)
	region.Offset += skipped
	region.Size = uint64(offset + len(data))
	return gpu.Span{Memory: must(e.lease.Import(e.t.Context(), region))(e.t), Offset: offset}
}

// testTensors gives queries and outputs in lent memory, with gaps, in place of messages.
func testTensors(t *testing.T, s *suite) {
	for _, output := range []kv.DType{kv.F32, kv.F16, kv.BF16} {
		setup := standard()
		setup.geometry.Query, setup.geometry.Output = kv.F16, output
		e := s.engine(t, setup)
		rows := []seq{{0, 320, 0}, {1, 37, 0}, {2, 300, 21}}
		want := e.decode(rows...)

		g := &e.geometry
		const size, base, gap, rowGap = 1 << 16, 256, 32, 64
		buffer := s.memory.Alloc(t, size)
		memory := must(e.lease.Import(t.Context(), buffer.Region(t, size, true)))(t)
		for i := range g.Layers {
			request := e.request(i, rows)
			request.Query = scatter(buffer, memory, request.Query.Inline, g.QueryHeads, g.KDim*g.Query.Size())
			vector := g.VDim * output.Size()
			headStride, expected := vector+gap, make([]byte, size)
			rowStride := g.QueryHeads*headStride + rowGap
			fill := seeded(3, 4)
			for j := range expected {
				expected[j] = byte(fill.Uint32())
			}
			out := s.memory.Alloc(t, size)
			out.Write(0, expected)
			request.Output = &gpu.Tensor{
				Memory: must(e.lease.Import(t.Context(), out.Region(t, size, true)))(t),
				Offset: base, RowStride: uint64(rowStride), HeadStride: uint64(headStride),
			}
			got := e.run(request)
			for b := range rows {
				for h := range g.QueryHeads {
					copy(expected[base+b*rowStride+h*headStride:], want[i].Output[(b*g.QueryHeads+h)*vector:][:vector])
				}
			}
			written := make([]byte, size)
			if out.Read(0, written); !bytes.Equal(written, expected) {
				t.Errorf("outputs of %v: layer %d: the region holds something else", output, i)
			}
			if len(got.Output) != 0 {
				t.Errorf("outputs of %v: layer %d: the output is in the message too", output, i)
			}
			got.Output = want[i].Output
			same(t, "tensors in memory", want[i:i+1], []*gpu.LayerResult{got})
		}
	}
}

// scatter puts vectors into memory with gaps between heads and rows.
func scatter(buffer Buffer, memory gpu.Memory, packed []byte, heads, vector int) *gpu.Tensor {
	const base, gap = 512, 16
	headStride := vector + gap
	rowStride := heads*headStride + gap
	for i := 0; i*vector < len(packed); i++ {
		buffer.Write(base+i/heads*rowStride+i%heads*headStride, packed[i*vector:(i+1)*vector])
	}
	return &gpu.Tensor{Memory: memory, Offset: base, RowStride: uint64(rowStride), HeadStride: uint64(headStride)}
}
