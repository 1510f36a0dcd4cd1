package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/gputest"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/registry"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/selector/none"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	gputest.Run(t, func(t testing.TB) gpu.Device { return newDevice(t, Options{Workers: 3}) }, gputest.Memfd{})
}

func newDevice(t testing.TB, o Options) *Device {
	t.Helper()
	if o.Methods == nil {
		m, err := methods.New()
		if err != nil {
			t.Fatal(err)
		}
		o.Methods = m
	}
	d := New(o)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// problem is a lease with a cache of random tokens, of which all are in a batch.
type problem struct {
	lease gpu.Lease
	cache gpu.Cache
	lent  gpu.Memory
	fd    int // of the cache's file
	step  *kv.Step
	query []byte
	rows  int
}

const questTopP = `{"skip_first_two_layers": false,
	"selector": {"type": "quest", "token_budget": 128},
	"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
	"weight_pruner": {"type": "top_p", "threshold": 0.85}}`

func newProblem(t testing.TB, d *Device, config string, sequences, tokens int) *problem {
	t.Helper()
	return newDeepProblem(t, d, config, 2, sequences, tokens)
}

func newDeepProblem(t testing.TB, d *Device, config string, layers, sequences, tokens int) *problem {
	t.Helper()
	g := &kv.Geometry{
		Layers: layers, QueryHeads: 8, KVHeads: 2, KDim: 64, VDim: 64,
		Scale: 0.125, Query: kv.F32, QueryScale: 1, Output: kv.F32,
	}
	cfg, err := d.options.Methods.Parse([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	l, err := layout.New(layout.Config{
		Kind: layout.NHD, DType: kv.F32, Layers: g.Layers, KVHeads: g.KVHeads, KDim: g.KDim, VDim: g.VDim,
		Sequences: sequences, Tokens: tokens, PageSize: 16,
	})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	buffer := make([]byte, l.Size())
	p := &problem{step: &kv.Step{}, rows: sequences}
	for s, table := range l.Tables(nil) {
		for i := range g.Layers {
			n := g.KVHeads * tokens * g.KDim
			l.Write(buffer, i, table, stored(r, kv.F32, n), stored(r, kv.F32, n), 0, tokens)
		}
		p.step.Sequences = append(p.step.Sequences, uint64(s+1))
		p.step.Lengths = append(p.step.Lengths, int32(tokens))
		p.step.TableCounts = append(p.step.TableCounts, uint32(len(table)))
		p.step.TableEntries = append(p.step.TableEntries, table...)
	}
	p.query = make([]byte, sequences*g.QueryHeads*g.KDim*4)
	kv.F32.Encode(p.query, stored(r, kv.F32, len(p.query)/4))

	if p.lease, err = d.Open(t.Context(), g, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.lease.Close(); err != nil {
			t.Error(err)
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if _, held := d.leases[p.lease.(*lease)]; held {
			t.Error("the device holds a closed lease")
		}
		unix.Close(p.fd)
	})
	if p.fd, err = share(buffer); err != nil {
		t.Fatal(err)
	}
	p.lent = p.importFile(t, p.fd, len(buffer), false)
	if p.cache, err = p.lease.NewCache(t.Context(), l.Spec(p.lent, 0)); err != nil {
		t.Fatal(err)
	}
	if err := p.cache.Step(t.Context(), p.step); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *problem) importFile(t testing.TB, fd, size int, writable bool) gpu.Memory {
	t.Helper()
	m, err := p.lease.Import(t.Context(), region(t, fd, size, writable))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// region lends a copy of fd.
func region(t testing.TB, fd, size int, writable bool) *gpu.Region {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return &gpu.Region{
		Kind: gpu.SharedMemory, Size: uint64(size), Writable: writable, Chunks: []gpu.Chunk{{FD: fd}},
	}
}

func (p *problem) request() *gpu.LayerRequest {
	return &gpu.LayerRequest{Layer: 1, Query: &gpu.Tensor{Inline: p.query}, Lists: true}
}

func (p *problem) run(t testing.TB) *gpu.LayerResult {
	t.Helper()
	result := &gpu.LayerResult{}
	if err := p.cache.Layer(t.Context(), p.request(), result); err != nil {
		t.Fatal(err)
	}
	result.Timing = gpu.Timing{}
	return result
}

// decode runs all layers of two steps.
func (p *problem) decode(t testing.TB) (results []*gpu.LayerResult) {
	t.Helper()
	for range 2 {
		if err := p.cache.Step(t.Context(), p.step); err != nil {
			t.Fatal(err)
		}
		for layer := range 2 {
			request, result := p.request(), &gpu.LayerResult{}
			request.Layer = layer
			if err := p.cache.Layer(t.Context(), request, result); err != nil {
				t.Fatal(err)
			}
			result.Timing = gpu.Timing{}
			results = append(results, result)
		}
	}
	return results
}

// wantFault fails the test unless err is of the kind and names the field.
func wantFault(t *testing.T, err error, kind fault.Kind, field string) {
	t.Helper()
	var e *fault.Error
	if !errors.As(err, &e) || e.Kind != kind || e.Field != field {
		t.Errorf("error %v, want %v at %q", err, kind, field)
	}
}

// withBroken are the usual methods, but the selector of that name panics.
func withBroken(t *testing.T, name string) *pipeline.Methods {
	t.Helper()
	m, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	method := selector.Method{Type: name, Default: func() selector.Config { return (*broken)(quest.Default()) }}
	if m.Selectors, err = registry.New("selector", none.Method(), method); err != nil {
		t.Fatal(err)
	}
	return m
}

// broken is a selector that panics.
type broken quest.Config

func (*broken) Validate() error                      { return nil }
func (*broken) New() selector.Selector               { return broken{} }
func (broken) Shadow() kv.Shadow                     { return nil }
func (broken) Select([]int32, *selector.Row) []int32 { panic("the selector is broken") }

func TestSelfTest(t *testing.T) {
	t.Parallel()
	if err := newDevice(t, Options{}).SelfTest(t.Context()); err != nil {
		t.Error(err)
	}
	err := newDevice(t, Options{Methods: withBroken(t, "quest")}).SelfTest(t.Context())
	wantFault(t, err, fault.Internal, "")
}

func TestWorkersDoNotChangeResults(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{
		"quest": questTopP,
		"h2o":   `{"skip_first_two_layers": false, "selector": {"type": "h2o", "token_budget": 64}}`,
		"tidal_decode": `{"skip_first_two_layers": false,
			"selector": {"type": "tidal_decode", "token_budget": 64, "reselection_layers": [0]}}`,
	} {
		want := newProblem(t, newDevice(t, Options{Workers: 1}), config, 5, 300).decode(t)
		for _, workers := range []int{2, 7} {
			got := newProblem(t, newDevice(t, Options{Workers: workers}), config, 5, 300).decode(t)
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %d workers give another result than one", name, workers)
			}
		}
	}
}

// An engine may cut its files short: it is told which region is gone, its neighbour notices nothing,
// and it can go on with other memory.
func TestTruncatedFiles(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Workers: 2})
	neighbour := newProblem(t, d, questTopP, 2, 300)
	want := neighbour.run(t)
	check := func(t *testing.T) {
		t.Helper()
		if got := neighbour.run(t); !bytes.Equal(got.Output, want.Output) {
			t.Error("the neighbour gets another output")
		}
	}

	t.Run("a cache while indexing", func(t *testing.T) {
		p := newProblem(t, d, questTopP, 2, 300)
		truncate(t, p.fd)
		err := p.cache.Layer(t.Context(), p.request(), &gpu.LayerResult{})
		wantFault(t, err, fault.DataLoss, "layers[1].k")
		_, err = p.cache.Index(t.Context())
		wantFault(t, err, fault.DataLoss, "layers[0].k")
		_, err = p.lent.Digest(t.Context(), 0, 4096)
		wantFault(t, err, fault.DataLoss, "probe")
		check(t)
	})

	t.Run("a cache while attending", func(t *testing.T) {
		p := newProblem(t, d, questTopP, 2, 300)
		p.run(t)
		truncate(t, p.fd)
		err := p.cache.Layer(t.Context(), p.request(), &gpu.LayerResult{})
		wantFault(t, err, fault.DataLoss, "layers[1].k")
		check(t)
	})

	for _, c := range []struct {
		field string
		place func(r *gpu.LayerRequest, m gpu.Memory)
	}{
		{"query_tensor.at", func(r *gpu.LayerRequest, m gpu.Memory) { r.Query = &gpu.Tensor{Memory: m} }},
		{"output_tensor.at", func(r *gpu.LayerRequest, m gpu.Memory) { r.Output = &gpu.Tensor{Memory: m} }},
		{"list_buffer.lists", func(r *gpu.LayerRequest, m gpu.Memory) {
			r.ListBuffer = &gpu.ListBuffer{Lists: gpu.Span{Memory: m}, Counts: gpu.Span{Memory: m, Offset: 1 << 15}, Capacity: 64}
		}},
	} {
		t.Run(c.field, func(t *testing.T) {
			p := newProblem(t, d, questTopP, 2, 300)
			fd, err := share(make([]byte, 1<<16))
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			m := p.importFile(t, fd, 1<<16, true)
			request := p.request()
			c.place(request, m)
			if err := p.cache.Layer(t.Context(), request, &gpu.LayerResult{}); err != nil {
				t.Fatal(err)
			}
			truncate(t, fd)
			wantFault(t, p.cache.Layer(t.Context(), request, &gpu.LayerResult{}), fault.DataLoss, c.field)
			if got := p.run(t); !bytes.Equal(got.Output, want.Output) {
				t.Error("the output is another in a message, after the loss")
			}
			check(t)
		})
	}
}

func truncate(t *testing.T, fd int) {
	t.Helper()
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
}

// TestRead: what layers read is what methods' formats take, of 4-byte keys and values of 64 elements.
func TestRead(t *testing.T) {
	t.Parallel()
	const (
		heads, tokens, candidates = 2, 320, 128 // KV heads, each with 4 query heads
		vector                    = 64 * 4
		bounds                    = 2 * 64 * 2 * tokens / 16 // fp16 minima and maxima of each chunk
		trained                   = 12 * 64                  // of channels' statistics
		estimate                  = 64/2 + 4                 // 4 bits an element, fp16 scale and zero
	)
	rows := func(config string) (cache, shadow int, kept uint64) {
		p := newProblem(t, newDevice(t, Options{Workers: 1}), config, 1, tokens)
		result := p.run(t)
		for _, n := range result.Kept {
			kept += uint64(n)
		}
		return int(result.Read.Cache), int(result.Read.Shadow), kept
	}
	for name, test := range map[string]struct {
		config        string
		cache, shadow func(kept int) int
	}{
		"dense": {
			`{}`,
			func(int) int { return heads * tokens * 2 * vector }, func(int) int { return 0 },
		},
		"quest": {
			`{"skip_first_two_layers": false, "selector": {"type": "quest", "token_budget": 128}}`,
			func(int) int { return heads * candidates * 2 * vector }, func(int) int { return heads * bounds },
		},
		"quest and top-p": {
			questTopP,
			func(kept int) int { return kept * 2 * vector },
			func(int) int { return heads * (bounds + trained + candidates*estimate) },
		},
		"oracle": { // reads each key to select, and those selected again
			`{"skip_first_two_layers": false, "selector": {"type": "oracle_topk", "token_budget": 128}}`,
			func(int) int { return heads * (tokens + 2*candidates) * vector }, func(int) int { return 0 },
		},
	} {
		cache, shadow, kept := rows(test.config)
		if wantCache, wantShadow := test.cache(int(kept)), test.shadow(int(kept)); cache != wantCache || shadow != wantShadow {
			t.Errorf("%s: read %d and %d bytes of cache and shadow, want %d and %d", name, cache, shadow, wantCache, wantShadow)
		}
	}
}

// TestSkippedLayers: they are not indexed and take no shadow, and others are as they would be alone.
func TestSkippedLayers(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Workers: 1})
	config := strings.Replace(questTopP, "false", "true", 1)
	p := newDeepProblem(t, d, config, 3, 1, 320)
	every := newDeepProblem(t, d, questTopP, 3, 1, 320)
	if one, all := p.cache.ShadowBytes(), every.cache.ShadowBytes(); one == 0 || 3*one != all {
		t.Errorf("one layer of three takes %d bytes of shadow, all take %d", one, all)
	}
	g := &p.lease.(*lease).geometry
	for name, problem := range map[string]*problem{config: p, questTopP: every} {
		parsed, err := d.options.Methods.Parse([]byte(name))
		if err != nil {
			t.Fatal(err)
		}
		perToken, err := d.ShadowBytesPerToken(g, parsed)
		if err != nil {
			t.Fatal(err)
		}
		// Head records come on top.
		if total := float64(problem.cache.ShadowBytes()); total < perToken*320 || total > perToken*320*1.5 {
			t.Errorf("the shadow takes %v bytes, %v a token", total, perToken)
		}
	}
	for layer := range 3 {
		request, got, want := p.request(), &gpu.LayerResult{}, &gpu.LayerResult{}
		request.Layer = layer
		if err := p.cache.Layer(t.Context(), request, got); err != nil {
			t.Fatal(err)
		}
		if err := every.cache.Layer(t.Context(), request, want); err != nil {
			t.Fatal(err)
		}
		if layer < 2 {
			if got.Paths[0] != pipeline.Dense || got.Reasons[0] != pipeline.SkippedLayer || got.Index.TokensIndexed != 0 {
				t.Errorf("layer %d: %v, %v, %d tokens indexed", layer, got.Paths[0], got.Reasons[0], got.Index.TokensIndexed)
			}
			continue
		}
		got.Timing, want.Timing = gpu.Timing{}, gpu.Timing{}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("layer %d: %+v, want %+v", layer, got, want)
		}
	}
}

// interrupted is a shadow that calls a hook when it has trained a head.
type interrupted struct {
	kv.Shadow
	hook func()
}

func (s interrupted) Train(head []byte, keys []float32, dim int) {
	s.Shadow.Train(head, keys, dim)
	s.hook()
}

// A training that is cancelled when only some heads have it must leave none with it.
func TestCancelledTraining(t *testing.T) {
	t.Parallel()
	d := newDevice(t, Options{Workers: 1})
	config := strings.Replace(questTopP, "0.85", "0.2", 1) // so that even of few tokens some are pruned
	long := newProblem(t, d, config, 1, 300)
	short := *long.step
	short.Sequences, short.Lengths, short.Ended = []uint64{2}, []int32{10}, []uint64{1}

	want := newProblem(t, d, config, 1, 300)
	if err := want.cache.Step(t.Context(), &short); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	c := long.cache.(*cache)
	c.estimator.method = interrupted{c.estimator.method, func() {
		cancel()
		for !c.job.stop.Load() {
			time.Sleep(time.Millisecond)
		}
	}}
	if err := c.Layer(ctx, long.request(), &gpu.LayerResult{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v, want %v", err, context.Canceled)
	}
	if err := c.Step(t.Context(), &short); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(long.run(t), want.run(t)) {
		t.Error("a cancelled training shows")
	}
}

// A bug in a method costs the request, not the process, and is logged with its stack.
func TestPanickingMethod(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	d := newDevice(t, Options{Methods: withBroken(t, "broken"), Log: slog.New(slog.NewTextHandler(&log, nil))})
	p := newProblem(t, d, `{"skip_first_two_layers": false, "selector": {"type": "broken"}}`, 1, 64)
	err := p.cache.Layer(t.Context(), p.request(), &gpu.LayerResult{})
	wantFault(t, err, fault.Internal, "")
	if !strings.Contains(log.String(), "broken.Select") {
		t.Errorf("the log %q does not name the culprit", log.String())
	}
	newProblem(t, d, `{"skip_first_two_layers": false}`, 1, 64).run(t)
}

func TestImport(t *testing.T) {
	t.Parallel()
	p := newProblem(t, newDevice(t, Options{Workers: 1}), questTopP, 1, 64)
	const size = 1 << 13
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(path string, flags int) func() int {
		return func() int {
			fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
	}
	sealed := func(seal int) func() int {
		return func() int {
			fd, err := unix.MemfdCreate("host-test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Ftruncate(fd, size); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seal); err != nil {
				t.Fatal(err)
			}
			return fd
		}
	}
	pipe := func() int {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		unix.Close(fds[1])
		return fds[0]
	}
	closed := func() int {
		fd := pipe()
		unix.Close(fd)
		return fd
	}
	const accepted = fault.Kind(255)
	const fdToken, fdOffset = "shared_memory.fd_token", "shared_memory.offset"
	for name, c := range map[string]struct {
		open     func() int
		writable bool
		offset   uint64
		device   string
		kind     fault.Kind
		field    string
	}{
		"file":                      {open: open(file, unix.O_RDWR), writable: true, kind: accepted},
		"read-only file":            {open: open(file, unix.O_RDONLY), kind: accepted},
		"read-only file to write":   {open: open(file, unix.O_RDONLY), writable: true, kind: fault.Permission, field: "access"},
		"write-only file":           {open: open(file, unix.O_WRONLY), kind: fault.Permission, field: "access"},
		"sealed memfd":              {open: sealed(unix.F_SEAL_SHRINK | unix.F_SEAL_GROW), writable: true, kind: accepted},
		"write-sealed memfd":        {open: sealed(unix.F_SEAL_WRITE), kind: accepted},
		"write-sealed to write":     {open: sealed(unix.F_SEAL_WRITE), writable: true, kind: fault.Permission, field: "access"},
		"future-sealed to write":    {open: sealed(unix.F_SEAL_FUTURE_WRITE), writable: true, kind: fault.Permission, field: "access"},
		"directory":                 {open: open(t.TempDir(), unix.O_RDONLY), kind: fault.Invalid, field: fdToken},
		"device file":               {open: open("/dev/zero", unix.O_RDWR), kind: fault.Invalid, field: fdToken},
		"pipe":                      {open: pipe, kind: fault.Invalid, field: fdToken},
		"closed":                    {open: closed, kind: fault.DataLoss, field: fdToken},
		"no descriptor":             {open: func() int { return -1 }, kind: fault.Invalid, field: fdToken},
		"offset within a page":      {open: open(file, unix.O_RDONLY), offset: 100, kind: fault.Invalid, field: fdOffset},
		"offset beyond the end":     {open: open(file, unix.O_RDONLY), offset: 4096, kind: fault.OutOfRange, field: "size"},
		"shared memory of a device": {open: open(file, unix.O_RDONLY), device: "GPU-1", kind: fault.Invalid, field: "device"},
	} {
		t.Run(name, func(t *testing.T) {
			fd := c.open()
			m, err := p.lease.Import(t.Context(), &gpu.Region{
				Kind: gpu.SharedMemory, Size: size, Offset: c.offset, Writable: c.writable, Device: c.device,
				Chunks: []gpu.Chunk{{FD: fd}},
			})
			if fd >= 0 {
				if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
					t.Errorf("the descriptor is still open (%v)", err)
				}
			}
			if c.kind != accepted {
				wantFault(t, err, c.kind, c.field)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Release(); err != nil {
				t.Error(err)
			}
		})
	}

	// Descriptors are closed for every other kind too, and on a closed lease.
	for _, kind := range []gpu.RegionKind{gpu.CUDAVMM, gpu.SharedMemory} {
		a, b := pipe(), pipe()
		_, err := p.lease.Import(t.Context(), &gpu.Region{Kind: kind, Size: size, Chunks: []gpu.Chunk{{FD: a}, {FD: b}}})
		if err == nil {
			t.Errorf("%v of two descriptors was imported", kind)
		}
		for _, fd := range []int{a, b} {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
				t.Errorf("%v: a descriptor is still open (%v)", kind, err)
			}
		}
	}
	if err := p.lease.Close(); err != nil {
		t.Fatal(err)
	}
	fd := pipe()
	_, err := p.lease.Import(t.Context(), &gpu.Region{Kind: gpu.SharedMemory, Size: size, Chunks: []gpu.Chunk{{FD: fd}}})
	wantFault(t, err, fault.Unavailable, "")
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("closed lease: the descriptor is still open (%v)", err)
	}
}

func TestShadowLimits(t *testing.T) {
	t.Parallel()
	probe := newProblem(t, newDevice(t, Options{Workers: 1}), questTopP, 1, 320)
	taken := probe.cache.(*cache).taken
	for name, o := range map[string]Options{
		"device": {Workers: 1, ShadowBytes: taken * 5 / 2},
		"lease":  {Workers: 1, ShadowBytes: taken * 100, Limits: gpu.Limits{ShadowBytes: taken * 5 / 2}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, o)
			p := newProblem(t, d, questTopP, 1, 320)
			register := func() (gpu.Cache, error) {
				c := p.cache.(*cache)
				spec := &gpu.CacheSpec{
					DType: kv.F32, PageSize: 16, NumPages: 20, NullPage: -1,
					K: gpu.Strides{Page: 8192, Head: 256, Token: 512}, V: gpu.Strides{Page: 8192, Head: 256, Token: 512},
				}
				for i := range c.layers {
					spec.Layers = append(spec.Layers, gpu.CacheLayer{
						Layer: i,
						K:     gpu.Span{Memory: p.lent, Offset: c.layers[i].extents[0].from},
						V:     gpu.Span{Memory: p.lent, Offset: c.layers[i].extents[1].from},
					})
				}
				return p.lease.NewCache(t.Context(), spec)
			}
			second, err := register()
			if err != nil {
				t.Fatal(err)
			}
			_, err = register()
			wantFault(t, err, fault.Exhausted, "num_pages")
			if e := new(fault.Error); errors.As(err, &e) && (e.Requested != taken || e.Available != taken/2) {
				t.Errorf("%v: asked %d and left %d, want %d and %d", err, e.Requested, e.Available, taken, taken/2)
			}
			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := register(); err != nil {
				t.Errorf("after a cache was closed: %v", err)
			}
		})
	}
}

// In the steady state a layer must not leave work to the garbage collector.
func TestLayerAllocations(t *testing.T) {
	p := newProblem(t, newDevice(t, Options{Workers: 2}), questTopP, 4, 300)
	request, result := p.request(), &gpu.LayerResult{}
	layer := func() {
		if err := p.cache.Layer(t.Context(), request, result); err != nil {
			t.Fatal(err)
		}
	}
	for range 50 { // until each worker has met each row
		layer()
	}
	if n := testing.AllocsPerRun(100, layer); n != 0 {
		t.Errorf("%v allocations per layer", n)
	}
}

func BenchmarkLayer(b *testing.B) {
	for _, workers := range []int{1, 2} {
		b.Run(fmt.Sprint(workers), func(b *testing.B) {
			p := newProblem(b, newDevice(b, Options{Workers: workers}), questTopP, 8, 4096)
			request, result := p.request(), &gpu.LayerResult{}
			b.ReportAllocs()
			for b.Loop() {
				if err := p.cache.Layer(b.Context(), request, result); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func floatsOf(data []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(&data[0])), len(data)/4)
}
