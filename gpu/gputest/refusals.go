package gputest

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// refused fails the test unless err is of the kind, names the field, and reads as a sentence.
func refused(t testing.TB, err error, kind fault.Kind, field string) {
	t.Helper()
	var e *fault.Error
	switch {
	case err == nil:
		t.Errorf("not refused, want %v at %s", kind, field)
	case !errors.As(err, &e):
		t.Errorf("%v: want a fault of kind %v", err, kind)
	case e.Kind != kind || e.Field != field:
		t.Errorf("%v (%v): want %v at %s", err, e.Kind, kind, field)
	case len(strings.Fields(e.Text)) < 4:
		t.Errorf("%v: this is no sentence", err)
	}
}

// testRefusals asks for what cannot be, and each time again for what can: the device must answer both
// rightly.
func testRefusals(t *testing.T, s *suite) {
	t.Run("Open", func(t *testing.T) { testOpenRefusals(t, s) })
	t.Run("Import", func(t *testing.T) { testImportRefusals(t, s) })
	t.Run("NewCache", func(t *testing.T) { testCacheRefusals(t, s) })
	t.Run("Step", func(t *testing.T) { testStepRefusals(t, s) })
	t.Run("Layer", func(t *testing.T) { testLayerRefusals(t, s) })
}

func testOpenRefusals(t *testing.T, s *suite) {
	for _, c := range []struct {
		change func(g *kv.Geometry)
		kind   fault.Kind
		field  string
	}{
		{func(g *kv.Geometry) { g.Layers = 0 }, fault.Invalid, "geometry.num_layers"},
		{func(g *kv.Geometry) { g.KVHeads = 0 }, fault.Invalid, "geometry.kv_heads"},
		{func(g *kv.Geometry) { g.QueryHeads = 5 }, fault.Invalid, "geometry.query_heads"},
		{func(g *kv.Geometry) { g.QueryHeads = -2 }, fault.Invalid, "geometry.query_heads"},
		{func(g *kv.Geometry) { g.QueryHeads = 2 * (s.info.MaxGroup + 1) }, fault.Unsupported, "geometry.query_heads"},
		{func(g *kv.Geometry) { g.KDim = s.info.MaxHeadSize + 1 }, fault.Unsupported, "geometry.k_dim"},
		{func(g *kv.Geometry) { g.VDim = 0 }, fault.Unsupported, "geometry.v_dim"},
		{func(g *kv.Geometry) { g.Scale = 0 }, fault.Invalid, "geometry.softmax_scale"},
		{func(g *kv.Geometry) { g.Scale = float32(math.NaN()) }, fault.Invalid, "geometry.softmax_scale"},
		{func(g *kv.Geometry) { g.Softcap = -1 }, fault.Invalid, "geometry.logit_softcap"},
		{func(g *kv.Geometry) { g.Sinks = []float32{1} }, fault.Invalid, "geometry.sinks"},
		{func(g *kv.Geometry) { g.Sinks = []float32{1, 2, 3, float32(math.Inf(1))} }, fault.Invalid, "geometry.sinks[3]"},
		{func(g *kv.Geometry) { g.Query = 9 }, fault.Unsupported, "geometry.query_dtype"},
		{func(g *kv.Geometry) { g.QueryScale = 2 }, fault.Invalid, "geometry.query_scale"},
		{func(g *kv.Geometry) { g.QueryScale = 0 }, fault.Invalid, "geometry.query_scale"},
		{func(g *kv.Geometry) { g.Output = kv.F8E4M3 }, fault.Unsupported, "geometry.output_dtype"},
	} {
		g := standard().geometry
		c.change(&g)
		config := s.parse(t, keepAll)
		lease, err := s.device.Open(t.Context(), &g, config)
		refused(t, err, c.kind, c.field)
		if err == nil {
			lease.Close()
		}
		_, err = s.device.ShadowBytesPerToken(&g, config)
		refused(t, err, c.kind, c.field)
	}
	s.verify(t, standard())
}

func testImportRefusals(t *testing.T, s *suite) {
	e := s.engine(t, standard())
	const size = 1 << 16
	buffer := s.memory.Alloc(t, size)
	for _, c := range []struct {
		change func(r *gpu.Region)
		kind   fault.Kind
		field  string
	}{
		{func(r *gpu.Region) { r.Size = 0 }, fault.OutOfRange, "size"},
		{func(r *gpu.Region) { r.Size = size + 1 }, fault.OutOfRange, "size"},
		{func(r *gpu.Region) { r.Size = math.MaxUint64 }, fault.OutOfRange, "size"},
		{func(r *gpu.Region) { r.Offset = 1 << 40 }, fault.OutOfRange, "size"},
		{func(r *gpu.Region) { r.Kind = 99 }, fault.Unsupported, "kind"},
	} {
		region := buffer.Region(t, size, false)
		c.change(region)
		_, err := e.lease.Import(t.Context(), region)
		refused(t, err, c.kind, c.field)
	}
	for _, kind := range []gpu.RegionKind{gpu.SharedMemory, gpu.CUDAIPC, gpu.CUDAVMM, gpu.CUDAFabric} {
		if slices.Contains(s.info.Regions, kind) {
			continue
		}
		_, err := e.lease.Import(t.Context(), &gpu.Region{
			Kind: kind, Size: size, Chunks: []gpu.Chunk{{FD: -1, Handle: make([]byte, 64), Size: size}},
		})
		refused(t, err, fault.Unsupported, "kind")
	}

	memory := must(e.lease.Import(t.Context(), buffer.Region(t, size, false)))(t)
	for _, r := range []struct {
		offset uint64
		length uint32
	}{{0, size + 1}, {size, 1}, {math.MaxUint64, 2}, {math.MaxUint64 - 1, 1}} {
		_, err := memory.Digest(t.Context(), r.offset, r.length)
		refused(t, err, fault.OutOfRange, "probe.offset")
	}
	e.check([]seq{{0, 320, 0}}, e.decode(seq{0, 320, 0}))
}

func testCacheRefusals(t *testing.T, s *suite) {
	setup := standard()
	setup.shape.DType = kv.F8E4M3
	e := s.engine(t, setup)
	other := s.engine(t, standard())
	for _, c := range []struct {
		change func(c *gpu.CacheSpec)
		kind   fault.Kind
		field  string
	}{
		{func(c *gpu.CacheSpec) { c.DType = 0 }, fault.Unsupported, "dtype"},
		{func(c *gpu.CacheSpec) { c.DType = 77 }, fault.Unsupported, "dtype"},
		{func(c *gpu.CacheSpec) { c.PageSize = 0 }, fault.OutOfRange, "page_size"},
		{func(c *gpu.CacheSpec) { c.PageSize = -16 }, fault.OutOfRange, "page_size"},
		{func(c *gpu.CacheSpec) { c.NumPages = 0 }, fault.OutOfRange, "num_pages"},
		{func(c *gpu.CacheSpec) { c.NumPages = 1 << 40 }, fault.OutOfRange, "num_pages"},
		{func(c *gpu.CacheSpec) { c.NullPage = int32(c.NumPages) }, fault.OutOfRange, "null_page"},
		{func(c *gpu.CacheSpec) { c.NullPage = -2 }, fault.OutOfRange, "null_page"},
		{func(c *gpu.CacheSpec) { c.MaxTokens = -1 }, fault.OutOfRange, "max_tokens"},
		{func(c *gpu.CacheSpec) { c.Layers = c.Layers[:1] }, fault.Invalid, "layers"},
		{func(c *gpu.CacheSpec) { c.Layers[1].Layer = c.Layers[0].Layer }, fault.Invalid, "layers[1].layer"},
		{func(c *gpu.CacheSpec) { c.NumPages++ }, fault.OutOfRange, "layers[1].v.offset"},
		{func(c *gpu.CacheSpec) { c.Layers[0].K.Offset = math.MaxUint64 }, fault.OutOfRange, "layers[0].k.offset"},
		{func(c *gpu.CacheSpec) { c.Layers[1].V.Offset = e.layout.Size() }, fault.OutOfRange, "layers[1].v.offset"},
		{func(c *gpu.CacheSpec) { c.Layers[1].K.Memory = nil }, fault.NotFound, "layers[1].k"},
		{func(c *gpu.CacheSpec) { c.Layers[0].V.Memory = other.lent }, fault.NotFound, "layers[0].v"},
		{func(c *gpu.CacheSpec) { c.DType = kv.F16 }, fault.Invalid, "k_strides.head"},
		{func(c *gpu.CacheSpec) { c.K.Page = 0 }, fault.Invalid, "k_strides.page"},
		{func(c *gpu.CacheSpec) { c.K.Head = 63 }, fault.Invalid, "k_strides.head"},
		{func(c *gpu.CacheSpec) { c.V.Token = 64 }, fault.Invalid, "v_strides.token"},
		{func(c *gpu.CacheSpec) { c.V.Page = math.MaxUint64 }, fault.OutOfRange, "v_strides.page"},
		{func(c *gpu.CacheSpec) { c.V.Page = 1 << 60 }, fault.OutOfRange, "v_strides.page"},
		{func(c *gpu.CacheSpec) { c.Layers[0].KScales = []float32{1, 1, 1} }, fault.Invalid, "layers[0].k_scales"},
		{func(c *gpu.CacheSpec) { c.Layers[1].VScales = []float32{1, 0} }, fault.Invalid, "layers[1].v_scales[1]"},
	} {
		spec := *e.spec
		spec.Layers = slices.Clone(spec.Layers)
		c.change(&spec)
		cache, err := e.lease.NewCache(t.Context(), &spec)
		refused(t, err, c.kind, c.field)
		if err == nil {
			cache.Close()
		}
		_, _, err = e.lease.ShadowBytes(&spec)
		refused(t, err, c.kind, c.field)
	}
	for field, change := range map[string]func(c *gpu.CacheSpec){
		"layers[0].k_scales": func(c *gpu.CacheSpec) { c.Layers[0].KScales = []float32{2} },
		"layers[1].v.offset": func(c *gpu.CacheSpec) { c.Layers[1].V.Offset++ },
		"v_strides.page":     func(c *gpu.CacheSpec) { c.V.Page++ },
	} {
		spec := *other.spec
		spec.Layers = slices.Clone(spec.Layers)
		change(&spec)
		_, err := other.lease.NewCache(t.Context(), &spec)
		refused(t, err, fault.Invalid, field)
	}

	rows := []seq{{0, 320, 0}}
	e.check(rows, e.decode(rows...))
	other.check(rows, other.decode(rows...))
}

func testStepRefusals(t *testing.T, s *suite) {
	rows := []seq{{0, 300, 0}, {1, 310, 0}}
	e := s.engine(t, standard())
	err := e.cache.Layer(t.Context(), e.request(0, rows), &gpu.LayerResult{})
	refused(t, err, fault.Precondition, "step_id")
	_, err = e.cache.Index(t.Context())
	refused(t, err, fault.Precondition, "step_id")

	want := e.decode(rows...)
	for _, c := range []struct {
		change func(s *kv.Step)
		kind   fault.Kind
		field  string
	}{
		{func(s *kv.Step) { s.Lengths[1] = -1 }, fault.Invalid, "lengths[1]"},
		{func(s *kv.Step) { s.Lengths[0] = 299 }, fault.Precondition, "lengths[0]"},
		{func(s *kv.Step) { s.Lengths = s.Lengths[:1] }, fault.Invalid, "sequences"},
		{func(s *kv.Step) { s.TableEntries[3] = int32(e.layout.NumPages) }, fault.OutOfRange, "table.entries[3]"},
		{func(s *kv.Step) { s.TableEntries[0] = -1 }, fault.OutOfRange, "table.entries[0]"},
		{func(s *kv.Step) { s.Sequences[1] = s.Sequences[0] }, fault.Invalid, "sequences[1]"},
		{func(s *kv.Step) { s.Ended = []uint64{99} }, fault.NotFound, "ended[0]"},
		{func(s *kv.Step) { s.BySlots, s.Slots = true, []int64{1 << 40} }, fault.OutOfRange, "slots.slots[0]"},
	} {
		step := e.batch(rows...)
		step.TableEntries = slices.Clone(step.TableEntries)
		c.change(step)
		refused(t, e.cache.Step(t.Context(), step), c.kind, c.field)
		// The step before is still the current one.
		same(t, "after a refused step", want, e.layers(rows...))
	}
}

func testLayerRefusals(t *testing.T, s *suite) {
	setup := standard()
	e := s.engine(t, setup)
	other := s.engine(t, setup)
	rows := []seq{{0, 300, 0}, {1, 310, 0}}
	want := e.decode(rows...)

	const size = 1 << 16
	buffer := s.memory.Alloc(t, size)
	readable := must(e.lease.Import(t.Context(), buffer.Region(t, size, false)))(t)
	writable := must(e.lease.Import(t.Context(), buffer.Region(t, size, true)))(t)
	released := must(e.lease.Import(t.Context(), buffer.Region(t, size, true)))(t)
	if err := released.Release(); err != nil {
		t.Fatal(err)
	}
	notFinite := func(at, value int) func(*gpu.LayerRequest) {
		return func(r *gpu.LayerRequest) {
			x := float32(math.Inf(value))
			if value == 0 {
				x = float32(math.NaN())
			}
			kv.F32.Encode(r.Query.Inline[at*4:], []float32{x})
		}
	}
	lists := func(change func(b *gpu.ListBuffer)) func(*gpu.LayerRequest) {
		return func(r *gpu.LayerRequest) {
			r.ListBuffer = &gpu.ListBuffer{
				Lists: gpu.Span{Memory: writable}, Counts: gpu.Span{Memory: writable, Offset: 8192}, Capacity: 64,
			}
			change(r.ListBuffer)
		}
	}
	asked := func(q gpu.Tensor) func(*gpu.LayerRequest) {
		return func(r *gpu.LayerRequest) { r.Query = &q }
	}
	answered := func(o gpu.Tensor) func(*gpu.LayerRequest) {
		return func(r *gpu.LayerRequest) { r.Output = &o }
	}
	for _, c := range []struct {
		change func(r *gpu.LayerRequest)
		kind   fault.Kind
		field  string
	}{
		{func(r *gpu.LayerRequest) { r.Layer = 1 }, fault.NotFound, "layer"},
		{func(r *gpu.LayerRequest) { r.Layer = -1 }, fault.NotFound, "layer"},
		{func(r *gpu.LayerRequest) { r.Query.Inline = r.Query.Inline[1:] }, fault.Invalid, "query_inline"},
		{func(r *gpu.LayerRequest) { r.Query.Inline = nil }, fault.Invalid, "query_inline"},
		{notFinite(0, 0), fault.Invalid, "query[0][0][0]"},
		{notFinite(64*4+2*64+5, 1), fault.Invalid, "query[1][2][5]"},
		{notFinite(64*8-1, -1), fault.Invalid, "query[1][3][63]"},
		{asked(gpu.Tensor{Memory: readable, Offset: size - 4}), fault.OutOfRange, "query_tensor.at.offset"},
		{asked(gpu.Tensor{Memory: readable, Offset: 2}), fault.Invalid, "query_tensor.at.offset"},
		{asked(gpu.Tensor{Memory: readable, HeadStride: 128}), fault.Invalid, "query_tensor.head_stride"},
		{asked(gpu.Tensor{Memory: readable, HeadStride: 1 << 63}), fault.OutOfRange, "query_tensor.head_stride"},
		{asked(gpu.Tensor{Memory: readable, RowStride: 1027}), fault.Invalid, "query_tensor.row_stride"},
		{asked(gpu.Tensor{Memory: other.lent}), fault.NotFound, "query_tensor.at"},
		{asked(gpu.Tensor{Memory: released}), fault.NotFound, "query_tensor.at"},
		{answered(gpu.Tensor{Memory: readable}), fault.Permission, "output_tensor.at"},
		{answered(gpu.Tensor{Memory: e.lent}), fault.Permission, "output_tensor.at"},
		{answered(gpu.Tensor{Memory: writable, Offset: size - 64}), fault.OutOfRange, "output_tensor.at.offset"},
		{answered(gpu.Tensor{Memory: writable, RowStride: 512}), fault.Invalid, "output_tensor.row_stride"},
		{lists(func(b *gpu.ListBuffer) { b.Capacity = 0 }), fault.Invalid, "list_buffer.capacity"},
		{lists(func(b *gpu.ListBuffer) { b.Capacity = 1 << 20 }), fault.OutOfRange, "list_buffer.lists.offset"},
		{lists(func(b *gpu.ListBuffer) { b.Lists.Offset = 2 }), fault.Invalid, "list_buffer.lists.offset"},
		{lists(func(b *gpu.ListBuffer) { b.Lists.Memory = readable }), fault.Permission, "list_buffer.lists"},
		{lists(func(b *gpu.ListBuffer) { b.Counts.Memory = readable }), fault.Permission, "list_buffer.counts"},
		{lists(func(b *gpu.ListBuffer) { b.Counts.Offset = size - 4 }), fault.OutOfRange, "list_buffer.counts.offset"},
		{lists(func(b *gpu.ListBuffer) { b.Counts.Memory = nil }), fault.NotFound, "list_buffer.counts"},
		{func(r *gpu.LayerRequest) { r.P = []float32{0.5} }, fault.Invalid, "p"},
		{func(r *gpu.LayerRequest) { r.P = []float32{0.5, 1.5} }, fault.Invalid, "p[1]"},
		{func(r *gpu.LayerRequest) { r.P = []float32{float32(math.NaN()), 1} }, fault.Invalid, "p[0]"},
		{func(r *gpu.LayerRequest) { r.TokenBudget = []uint32{1, 2, 3} }, fault.Invalid, "token_budget"},
	} {
		request := e.request(0, rows)
		c.change(request)
		refused(t, e.cache.Layer(t.Context(), request, &gpu.LayerResult{}), c.kind, c.field)
		same(t, "after a refused layer", want, e.layers(rows...))
	}

	t.Run("a cache in a writable region", func(t *testing.T) {
		setup := standard()
		var lent gpu.Memory
		setup.edit = func(e *engine, spec *gpu.CacheSpec) {
			lent = must(e.lease.Import(t.Context(), e.buffer.Region(t, len(e.bytes), true)))(t)
			for i := range spec.Layers {
				spec.Layers[i].K.Memory, spec.Layers[i].V.Memory = lent, lent
			}
		}
		e := s.engine(t, setup)
		e.step(e.batch(rows...))
		request := e.request(0, rows)
		request.Output = &gpu.Tensor{Memory: lent}
		refused(t, e.cache.Layer(t.Context(), request, &gpu.LayerResult{}), fault.Permission, "output_tensor.at")
	})
}

// testCancellation cancels calls, before and while they run; what they indexed or not, later ones are
// right.
func testCancellation(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}, {1, 310, 0}, {2, 300, 0}}
	want := s.engine(t, standard()).decode(rows...)
	e := s.engine(t, standard())
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.cache.Step(cancelled, e.batch(rows...)); !errors.Is(err, context.Canceled) {
		t.Errorf("Step: %v", err)
	}
	e.step(e.batch(rows...))
	if err := e.cache.Layer(cancelled, e.request(0, rows), &gpu.LayerResult{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Layer: %v", err)
	}
	if _, err := e.cache.Index(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("Index: %v", err)
	}
	same(t, "after cancelled calls", want, e.layers(rows...))

	for range 20 {
		e := e.fresh()
		e.step(e.batch(rows...))
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		if err := e.cache.Layer(ctx, e.request(0, rows), &gpu.LayerResult{}); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		same(t, "after a layer that was cancelled midway", want, e.layers(rows...))
	}
}

func asFault(err error, f **fault.Error) bool { return errors.As(err, f) }
