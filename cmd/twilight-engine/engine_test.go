//go:build linux && cgo && cuda

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"hash"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
	"github.com/twilight-sidecar/twilight/internal/requestfuzz"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/testdata"
)

// These tests own GPU memory, and lend it to a twilightd of its own process, whose workers are others.
var (
	commands = flag.String("commands", "", "folder of twilightd and twilight-worker; that of the tests")
	file     = flag.String("capture", "", "capture to replay; testdata's")
	requests = flag.Int("requests", 10_000, "fuzzed requests that TestFuzzedRequests sends")
	seed     = flag.Uint64("seed", 1, "of TestFuzzedRequests")
)

const (
	fullConfig = `{"selector": {"type": "full"}}`
	allConfig  = `{"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`
	twiConfig  = `{"selector": {"type": "quest", "sparsity_rate": 0.25}, "weight_estimator": {"type": "min_max_quant"},
		"weight_pruner": {"type": "top_p", "threshold": 0.95}}`
)

// daemon is a twilightd of its own process.
type daemon struct {
	t    testing.TB
	path string // of its socket
	args []string
	cmd  *exec.Cmd
}

// start starts a daemon that serves the GPUs alone.
func start(t testing.TB, args ...string) *daemon {
	t.Helper()
	d := &daemon{t: t, path: filepath.Join(t.TempDir(), "s"), args: args}
	d.run()
	t.Cleanup(func() {
		_ = d.cmd.Process.Signal(os.Interrupt)
		_ = d.cmd.Wait()
	})
	return d
}

func (d *daemon) run() {
	d.t.Helper()
	folder := *commands
	if folder == "" {
		self, err := os.Executable()
		if err != nil {
			d.t.Fatal(err)
		}
		folder = filepath.Dir(self)
	}
	d.cmd = exec.Command(filepath.Join(folder, "twilightd"), append([]string{
		"--listen", "unix://" + d.path, "--backend", "cuda", "--log-level", "warn", "--log-format", "text",
	}, d.args...)...)
	d.cmd.Stderr = os.Stderr
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) dial() *client.Client {
	d.t.Helper()
	c, err := client.Dial("unix://" + d.path)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { c.Close() })
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	if err := c.WaitServing(ctx); err != nil {
		d.t.Fatal(err)
	}
	return c
}

var device = sync.OnceValues(func() (*engine.GPU, error) { return engine.Open("") })

// lends lends memory of one kind.
func lends(t *testing.T, kind gpu.RegionKind, headroom int) *lender {
	t.Helper()
	g, err := device()
	if err != nil {
		t.Fatal(err)
	}
	return &lender{GPU: g, kind: kind, headroom: headroom}
}

// free frees what was lent, once no lease has it.
func (l *lender) freeAfter(t *testing.T) {
	t.Helper()
	if err := l.free(); err != nil {
		t.Error(err)
	}
}

// hashing sums up whatever a daemon wrote.
type hashing struct {
	replay.Memory
	sum hash.Hash
}

type hashed struct {
	replay.Buffer
	sum hash.Hash
}

func (h hashing) Lend(ctx context.Context, s *client.Session, size int, access client.Access) (replay.Buffer, error) {
	b, err := h.Memory.Lend(ctx, s, size, access)
	return hashed{b, h.sum}, err
}

func (b hashed) Pull() error {
	err := b.Buffer.Pull()
	b.sum.Write(b.Bytes())
	return err
}

// TestReplay holds a GPU's replay against the CPU's, for every kind of memory, and against itself, and so armed.
func TestReplay(t *testing.T) {
	loaded, err := capture.Decode(testdata.SmolLM2)
	if *file != "" {
		loaded, err = capture.Open(*file)
	}
	if err != nil {
		t.Fatal(err)
	}
	host, err := inprocess.Start(t.Context(), inprocess.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = host.Stop(context.Background()) }()
	onHost, err := client.Dial(host.Target())
	if err != nil {
		t.Fatal(err)
	}
	defer onHost.Close()
	onGPU := start(t).dial()
	for _, tc := range []struct {
		name, config string
		dtype        kv.DType
		layout       layout.Kind
	}{
		{"full", fullConfig, kv.F16, layout.NHD},
		{"all", allConfig, kv.F16, layout.NHD},
		{"twilight", twiConfig, kv.F16, layout.NHD},
		{"twilight, bf16, packed", twiConfig, kv.BF16, layout.Packed},
		{"twilight, slots", twiConfig, kv.F16, layout.Slots},
	} {
		run := func(c *client.Client, memory replay.Memory, device string, armed bool) *replay.Report {
			t.Helper()
			r, err := replay.Run(t.Context(), c, replay.Options{
				Capture: loaded, Config: tc.config, DType: tc.dtype, Layout: tc.layout, Seed: 1, Memory: memory, Device: device, Armed: armed,
			})
			if err != nil {
				t.Fatalf("%s: %v", tc.name, err)
			}
			return r
		}
		want := run(onHost, nil, "", false)
		var first [32]byte
		for i, memory := range []*lender{
			lends(t, gpu.CUDAIPC, 0), lends(t, gpu.CUDAIPC, 4096+512), lends(t, gpu.CUDAVMM, 0), lends(t, gpu.CUDAVMM, 3<<20+256),
		} {
			sum := sha256.New()
			got := run(onGPU, hashing{memory, sum}, memory.UUID(), false)
			memory.freeAfter(t)
			off, most := differences(want, got)
			t.Logf("%s, %v at %d: kept %.1f (CPU %.1f), at most %d off; error %.2g (CPU %.2g), mass %.4f (CPU %.4f)",
				tc.name, memory.kind, memory.headroom, got.MeanKept, want.MeanKept, most, got.RelErr, want.RelErr,
				got.MeanTrueMass, want.MeanTrueMass)
			for _, what := range off {
				t.Errorf("%s, %v: %s", tc.name, memory.kind, what)
			}
			if tc.config == fullConfig && got.RelErr > 1e-3 {
				t.Errorf("%s: the outputs are off by %v", tc.name, got.RelErr)
			}
			if got := [32]byte(sum.Sum(nil)); i == 0 {
				first = got
			} else if got != first {
				t.Errorf("%s, %v: the outputs' bits differ from the first run's", tc.name, memory.kind)
			}
		}
		for _, kind := range []gpu.RegionKind{gpu.CUDAIPC, gpu.CUDAVMM} {
			memory := lends(t, kind, 0)
			off, _ := differences(want, run(onGPU, memory, memory.UUID(), true))
			memory.freeAfter(t)
			for _, what := range off {
				t.Errorf("%s, armed, %v: %s", tc.name, kind, what)
			}
		}
	}
}

// differences are the kept counts that differ by more than 1% and 8 tokens, and the largest difference.
func differences(want, got *replay.Report) (off []string, most int) {
	for i, layer := range want.Layers {
		for h, head := range layer.Heads {
			for step, n := range head.KeptPerStep {
				m := got.Layers[i].Heads[h].KeptPerStep[step]
				d := max(n-m, m-n)
				most = max(most, d)
				if float64(d) > max(8, .01*float64(n)) {
					off = append(off, fmt.Sprintf("layer %d, head %d, step %d keeps %d, the CPU %d", layer.Layer, h, step, m, n))
				}
			}
		}
	}
	return off, most
}

// small is a session with a cache of its own, and room to ask.
type small struct {
	t                     *testing.T
	session               *client.Session
	geometry              client.Geometry
	memory                *engine.Memory // of the cache
	room                  *engine.Memory // queries, outputs and lists
	kv, rw                *client.Buffer
	cache                 *client.Cache
	spec                  client.CacheSpec
	table                 []int32
	query, output, listed int    // offsets in room
	sequence              uint64 // of the last decode
	alive                 bool   // it is known to the daemon
}

const (
	smallTokens = 4096
	smallPages  = 2 * smallTokens / 16
	roomBytes   = 4 << 20
)

func newSmall(t *testing.T, c *client.Client, l *lender) *small {
	t.Helper()
	s := &small{t: t, geometry: client.Geometry{
		Layers: 2, QueryHeads: 8, KVHeads: 2, KDim: 64, VDim: 64, Query: client.F16, Output: client.F16,
	}}
	s.query, s.output, s.listed, s.sequence = 0, 1<<20, 2<<20, 1<<40
	shape, err := layout.New(layout.Config{
		Kind: layout.HND, DType: kv.F16, Layers: 2, KVHeads: 2, KDim: 64, VDim: 64, Sequences: 2, Tokens: smallTokens, PageSize: 16,
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.memory, err = l.Alloc(l.kind, int(shape.Size()), l.headroom); err != nil {
		t.Fatal(err)
	}
	if s.room, err = l.Alloc(l.kind, roomBytes, l.headroom); err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	s.fill(s.memory, random, 1)
	s.fill(s.room, random, 3)
	ctx := t.Context()
	if s.session, err = c.Open(ctx, client.OpenOptions{Geometry: s.geometry, Config: twiConfig}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.session.Close(), s.memory.Release(), s.room.Release()); err != nil {
			t.Error(err)
		}
	})
	if s.kv, err = lend(ctx, s.session, s.memory, 0, s.memory.Size(), client.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if s.rw, err = lend(ctx, s.session, s.room, 0, roomBytes, client.ReadWrite); err != nil {
		t.Fatal(err)
	}
	s.spec = client.CacheSpec{
		DType: client.F16, PageSize: 16, NumPages: shape.NumPages,
		K: client.Strides{Page: int(shape.K.Page), Head: int(shape.K.Head), Token: int(shape.K.Token)},
	}
	for i := range 2 {
		s.spec.Layers = append(s.spec.Layers, client.CacheLayer{
			Layer: i + 2,
			K:     client.Location{Buffer: s.kv, Offset: int(shape.KOffset(i))}, V: client.Location{Buffer: s.kv, Offset: int(shape.VOffset(i))},
		})
	}
	if s.cache, err = s.session.RegisterCache(ctx, s.spec); err != nil {
		t.Fatal(err)
	}
	for _, p := range random.Perm(shape.NumPages)[:smallTokens/16] {
		s.table = append(s.table, int32(p))
	}
	return s
}

func (s *small) fill(m *engine.Memory, random *rand.Rand, spread float64) {
	s.t.Helper()
	values := make([]float32, m.Size()/2)
	for i := range values {
		values[i] = float32(spread * random.NormFloat64())
	}
	data := make([]byte, m.Size())
	kv.F16.Encode(data, values)
	if err := m.Write(0, data); err != nil {
		s.t.Fatal(err)
	}
}

func (s *small) layer(i int) client.Layer {
	at := func(offset int) client.Location { return client.Location{Buffer: s.rw, Offset: offset} }
	return client.Layer{
		Layer: i + 2, QueryAt: &client.Tensor{Location: at(s.query)}, Output: &client.Tensor{Location: at(s.output)},
		ListBuffer: &client.ListBuffer{Counts: at(s.listed), Lists: at(s.listed + 4096), Capacity: smallTokens},
	}
}

// decode asks for the layers of a sequence that was not there before, and returns outputs and lists.
func (s *small) decode() []byte {
	s.t.Helper()
	ctx := s.t.Context()
	s.sequence++
	step, err := s.cache.Step(ctx, client.Batch{Sequences: []client.Sequence{{ID: s.sequence, Len: smallTokens, Table: s.table}}})
	if err != nil {
		s.t.Fatal(err)
	}
	answer := make([]byte, roomBytes-s.output)
	if err := s.room.Write(s.output, answer); err != nil {
		s.t.Fatal(err)
	}
	for i := range 2 {
		r, err := step.Layer(ctx, s.layer(i))
		if err != nil {
			s.t.Fatal(err)
		}
		if r.Paths[0] != client.PathSparse || r.Kept[0] == 0 || r.Kept[0] >= smallTokens {
			s.t.Fatalf("layer %d keeps %v on paths %v", i, r.Kept, r.Paths)
		}
	}
	if err := s.room.Read(s.output, answer); err != nil {
		s.t.Fatal(err)
	}
	return answer
}

// TestLentAgain kills the daemon: its successor gets the same memory, and gives the same bits.
func TestLentAgain(t *testing.T) {
	for _, kind := range []gpu.RegionKind{gpu.CUDAIPC, gpu.CUDAVMM} {
		d := start(t)
		s := newSmall(t, d.dial(), lends(t, kind, 1<<20))
		want := s.decode()
		if err := d.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = d.cmd.Wait()
		for state, _ := s.session.State(); state == client.StateLive; state, _ = s.session.State() {
			time.Sleep(time.Millisecond)
		}
		d.run()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := s.session.WaitLive(ctx); err != nil {
			t.Fatalf("%v: %v", kind, err)
		}
		cancel()
		s.alive = false
		if !bytes.Equal(s.decode(), want) {
			t.Errorf("%v: the successor's bits differ", kind)
		}
	}
}

// TestOtherMemory: a probe finds out that the daemon sees other memory than was meant.
func TestOtherMemory(t *testing.T) {
	l := lends(t, gpu.CUDAIPC, 0)
	s := newSmall(t, start(t).dial(), l)
	other, err := share(s.memory, 0, 4096, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	other.Probe.Bytes[100] ^= 1
	if _, err := s.session.ShareGPU(t.Context(), other); !errors.Is(err, client.ErrDataLoss) {
		t.Errorf("a wrong probe: %v", err)
	}
}

// TestShadowMemory: a cache takes what capabilities say, and gives it back.
func TestShadowMemory(t *testing.T) {
	l := lends(t, gpu.CUDAIPC, 0)
	conn := start(t, "--spares", "0").dial() // which would take memory meanwhile
	free := func() int {
		t.Helper()
		n, err := l.Free()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	g := client.Geometry{Layers: 2, QueryHeads: 32, KVHeads: 8, KDim: 128, VDim: 128, Query: client.F16, Output: client.F16}
	for name, config := range map[string]string{"twilight": twiConfig, "all": allConfig} {
		told, err := conn.Capabilities(t.Context(), &client.ShadowQuery{Geometry: g, Config: config})
		if err != nil {
			t.Fatal(err)
		}
		session, err := conn.Open(t.Context(), client.OpenOptions{Geometry: g, Config: config})
		if err != nil {
			t.Fatal(err)
		}
		const pages = 32768
		strides := client.Strides{Page: 16 * 8 * 128 * 2, Head: 128 * 2, Token: 8 * 128 * 2}
		plane := pages * strides.Page
		m, err := l.Alloc(gpu.CUDAIPC, 4*plane, 0)
		if err != nil {
			t.Fatal(err)
		}
		b, err := lend(t.Context(), session, m, 0, 4*plane, client.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		spec := client.CacheSpec{DType: client.F16, PageSize: 16, NumPages: pages, K: strides}
		for i := range 2 {
			spec.Layers = append(spec.Layers, client.CacheLayer{
				Layer: i, K: client.Location{Buffer: b, Offset: 2 * i * plane}, V: client.Location{Buffer: b, Offset: (2*i + 1) * plane},
			})
		}
		register := func() *client.Cache {
			t.Helper()
			c, err := session.RegisterCache(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		closed := func(c *client.Cache) {
			t.Helper()
			if err := c.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		closed(register())
		before := free()
		c := register()
		taken := before - free()
		perToken := told.GetDevices()[0].GetShadowBytesPerToken()
		stated := perToken * pages * 16
		t.Logf("%s: %d bytes taken, %.0f stated (%.2f a token)", name, taken, stated, perToken)
		// An allocation is a multiple of 2 MiB, and some state does not grow with tokens.
		if math.Abs(float64(taken)-stated) > max(.005*stated, 8<<20) || c.Shadow().PerToken != perToken {
			t.Errorf("%s: a cache takes %d bytes, %.0f were stated; per token %v, stated %v",
				name, taken, stated, c.Shadow().PerToken, perToken)
		}
		closed(c)
		for range 1000 {
			again, err := lend(t.Context(), session, m, 0, 4*plane, client.ReadOnly)
			if err != nil {
				t.Fatal(err)
			}
			closed(register())
			if err := again.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if after := free(); before-after > 4<<20 {
			t.Errorf("%s: %d bytes are gone after 1000 registrations", name, before-after)
		}
		if err := errors.Join(session.Close(), m.Release()); err != nil {
			t.Error(err)
		}
	}
}

// TestFuzzedRequests sends requests with ids, lengths, strides and offsets of all sorts: each is answered,
// none harms the lease, its neighbour's bits, or the cache.
func TestFuzzedRequests(t *testing.T) {
	conn := start(t).dial()
	l := lends(t, gpu.CUDAIPC, 1<<20)
	s, neighbour := newSmall(t, conn, l), newSmall(t, conn, l)
	refill := func() {
		s.fill(s.room, rand.New(rand.NewPCG(5, 6)), 3)
		neighbour.fill(neighbour.room, rand.New(rand.NewPCG(7, 8)), 3)
	}
	refill()
	want, wantBeside := s.decode(), neighbour.decode()
	content := func() [32]byte {
		data := make([]byte, s.memory.Size())
		if err := s.memory.Read(0, data); err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(data)
	}
	before := content()
	f := &requestfuzz.Fuzzer{
		T: t, Random: rand.New(rand.NewPCG(*seed, 0)), Session: s.session, Cache: s.cache, Spec: s.spec, Layer: s.layer,
		Room: s.rw, Lend: s.otherMemory, Codes: map[client.Code]int{},
	}
	start := time.Now()
	for i := range *requests {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		f.Request(ctx)
		cancel()
		if state, why := s.session.State(); state != client.StateLive || t.Failed() {
			t.Fatalf("request %d of seed %d: the session is %v: %v", i, *seed, state, why)
		}
	}
	t.Logf("%d requests of seed %d in %v: %d served, refused %v", *requests, *seed, time.Since(start).Round(time.Millisecond), f.Served, f.Codes)
	if f.Served < *requests/20 || len(f.Codes) < 3 {
		t.Errorf("served are %d, refusals %v: the fuzz does not reach far", f.Served, f.Codes)
	}
	if content() != before {
		t.Error("the cache's content changed")
	}
	refill()
	if !bytes.Equal(s.decode(), want) {
		t.Error("the lease's bits differ from before")
	}
	if !bytes.Equal(neighbour.decode(), wantBeside) {
		t.Error("the neighbour's bits differ from before")
	}
}

// otherMemory lends memory under a changed handle or range.
func (s *small) otherMemory(ctx context.Context, f *requestfuzz.Fuzzer) error {
	other, err := share(s.memory, 0, s.memory.Size(), client.ReadOnly)
	if err != nil {
		s.t.Fatal(err)
	}
	export := other.Export
	other.Size = f.Rarely(other.Size, other.Size)
	other.Export = func(ctx context.Context) (client.GPUExport, error) {
		exported, err := export(ctx)
		if err != nil {
			return nil, err
		}
		ipc := exported.(client.CUDAIPC)
		ipc.Offset = f.Rarely(ipc.Offset, other.Size)
		switch f.Random.IntN(8) {
		case 0:
			ipc.Handle[f.Random.IntN(len(ipc.Handle))] ^= 1 << f.Random.IntN(8)
		case 1:
			ipc.Handle = ipc.Handle[:f.Random.IntN(len(ipc.Handle))]
		}
		return ipc, nil
	}
	b, err := s.session.ShareGPU(ctx, other)
	if err != nil {
		return err
	}
	return b.Close(ctx)
}
