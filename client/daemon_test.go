package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
)

// daemonPath, in the environment, makes this test's binary a daemon at that path.
const daemonPath = "TWILIGHT_TEST_DAEMON"

func TestMain(m *testing.M) {
	if path := os.Getenv(daemonPath); path != "" {
		term := make(chan os.Signal, 1)
		signal.Notify(term, syscall.SIGTERM)
		d, err := inprocess.Start(context.Background(), inprocess.Options{Path: path, DrainGrace: 20 * time.Millisecond})
		if err == nil {
			<-term // unless it is killed
			err = d.Stop(context.Background())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// process starts a daemon in a process of its own.
func process(t testing.TB, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), daemonPath+"="+path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func serve(t *testing.T, path string) *inprocess.Daemon {
	t.Helper()
	d, err := inprocess.Start(t.Context(), inprocess.Options{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return d
}

func dial(t *testing.T, target string) *client.Client {
	t.Helper()
	c, err := client.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := c.WaitServing(ctx); err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	layers, queryHeads, kvHeads, dim = 2, 4, 2, 32
	maxTokens                        = 400
	sparse                           = `{"selector": {"type": "quest", "token_budget": 96}, "weight_estimator": {"type": "min_max_quant"},
		"weight_pruner": {"type": "top_p", "threshold": 0.9}, "skip_first_two_layers": false}`
)

// engine decodes one sequence of random keys, values and queries, the same for every engine.
type engine struct {
	t       *testing.T
	session *client.Session
	layout  *layout.Layout
	kv      *client.Buffer
	cache   *client.Cache
	table   []int32
	k, v    [layers][]float32
	length  int
}

func newEngine(t *testing.T, c *client.Client, onState func(client.State, error)) *engine {
	t.Helper()
	e := &engine{t: t}
	var err error
	e.session, err = c.Open(t.Context(), client.OpenOptions{
		EngineName: t.Name(), Config: sparse, OnState: onState,
		Geometry: client.Geometry{Layers: layers, QueryHeads: queryHeads, KVHeads: kvHeads, KDim: dim, Query: client.F32},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.session.Close() })
	e.layout, err = layout.New(layout.Config{
		Kind: layout.HND, DType: client.F16, Layers: layers, KVHeads: kvHeads, KDim: dim, VDim: dim,
		Sequences: 1, Tokens: maxTokens, PageSize: 32,
	})
	if err != nil {
		t.Fatal(err)
	}
	if e.kv, err = e.session.NewBuffer(t.Context(), int(e.layout.Size()), client.ReadOnly); err != nil {
		t.Fatal(err)
	}
	e.cache, err = e.session.RegisterCache(t.Context(), e.spec())
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(3, 4))
	for i := range layers {
		e.k[i], e.v[i] = normal(random, kvHeads*maxTokens*dim), normal(random, kvHeads*maxTokens*dim)
	}
	e.table = e.layout.Tables(nil)[0]
	slices.Reverse(e.table)
	return e
}

func (e *engine) spec() client.CacheSpec {
	strides := client.Strides{Page: int(e.layout.K.Page), Head: int(e.layout.K.Head), Token: int(e.layout.K.Token)}
	spec := client.CacheSpec{DType: client.F16, PageSize: e.layout.PageSize, NumPages: e.layout.NumPages, K: strides}
	for i := range layers {
		spec.Layers = append(spec.Layers, client.CacheLayer{
			Layer: i,
			K:     client.Location{Buffer: e.kv, Offset: int(e.layout.KOffset(i))},
			V:     client.Location{Buffer: e.kv, Offset: int(e.layout.VOffset(i))},
		})
	}
	return spec
}

func normal(random *rand.Rand, n int) []float32 {
	s := make([]float32, n)
	for i := range s {
		s[i] = float32(random.NormFloat64())
	}
	return s
}

// grow writes tokens into the cache, up to a length.
func (e *engine) grow(length int) {
	for i := range layers {
		e.layout.Write(e.kv.Bytes(), i, e.table, e.k[i], e.v[i], e.length, length)
	}
	e.length = length
}

func (e *engine) batch() client.Batch {
	return client.Batch{Sequences: []client.Sequence{{ID: 9, Len: e.length, Table: e.table}}}
}

// query is that of a layer at the present length.
func (e *engine) query(layer int) []byte {
	random := rand.New(rand.NewPCG(uint64(e.length), uint64(layer)))
	return e.session.Geometry().EncodeQuery(nil, normal(random, queryHeads*dim))
}

// decode grows by a token and returns the outputs of all layers.
func (e *engine) decode() ([]byte, error) {
	e.grow(e.length + 1)
	step, err := e.cache.Step(e.t.Context(), e.batch())
	if err != nil {
		return nil, err
	}
	var outputs []byte
	for i := range layers {
		r, err := step.Layer(e.t.Context(), client.Layer{Layer: i, Query: e.query(i)})
		if err != nil {
			return nil, err
		}
		outputs = append(outputs, r.Output...)
	}
	return outputs, nil
}

// bits is what an engine that nothing disturbs decodes from a length on.
func bits(t *testing.T, from, steps int) [][]byte {
	t.Helper()
	e := newEngine(t, dial(t, serve(t, "").Target()), nil)
	e.grow(from)
	var all [][]byte
	for range steps {
		outputs, err := e.decode()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, outputs)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
	return all
}

// Steps one by one, a prefill indexed before or not, give the bits of a fresh lease at each length.
func TestGrownIsFresh(t *testing.T) {
	t.Parallel()
	const from, steps = 250, 3
	c := dial(t, serve(t, "").Target())
	grown, indexed := newEngine(t, c, nil), newEngine(t, c, nil)
	grown.grow(from)
	indexed.grow(from)
	prefill := indexed.batch()
	prefill.IndexOnly = true
	if step, err := indexed.cache.Step(t.Context(), prefill); err != nil || step.Index.TokensIndexed != layers*from {
		t.Fatalf("prefill: %+v, %v", step, err)
	}
	for step := range steps {
		fresh := newEngine(t, c, nil)
		fresh.grow(from + step)
		var outputs [3][]byte
		for i, e := range []*engine{fresh, grown, indexed} {
			var err error
			if outputs[i], err = e.decode(); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(outputs[0], outputs[1]) || !bytes.Equal(outputs[0], outputs[2]) {
			t.Errorf("step %d differs from that of a fresh lease", step)
		}
		if err := fresh.session.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, e := range []*engine{grown, indexed} {
		if err := e.session.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A killed daemon costs the steps it was needed for; the next give the bits they would have given.
func TestDaemonKilled(t *testing.T) {
	t.Parallel()
	const from, steps = 300, 6
	want := bits(t, from, steps)
	path := filepath.Join(t.TempDir(), "tw.sock")
	first := process(t, path)
	seen := make(states, 10)
	e := newEngine(t, dial(t, "unix://"+path), seen.record)
	e.grow(from)
	for step := range steps {
		if step == steps/2 {
			_ = first.Process.Kill()
			_ = first.Wait()
			seen.expect(t, client.StateLive, client.StateLost)
			if _, err := e.decode(); !errors.Is(err, client.ErrLeaseLost) {
				t.Fatalf("without a daemon: %v", err)
			}
			e.length-- // the engine attended by itself; decode it again to compare
			process(t, path)
			if err := e.session.WaitLive(t.Context()); err != nil {
				t.Fatal(err)
			}
			seen.expect(t, client.StateLive)
		}
		got, err := e.decode()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want[step]) {
			t.Errorf("step %d differs from that of an undisturbed engine", step)
		}
	}
}

// A daemon that is replaced says so, and its successor carries on.
func TestDaemonReplaced(t *testing.T) {
	t.Parallel()
	want := bits(t, 100, 2)
	path := filepath.Join(t.TempDir(), "tw.sock")
	first, err := inprocess.Start(t.Context(), inprocess.Options{Path: path, DrainGrace: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(states, 10)
	e := newEngine(t, dial(t, first.Target()), seen.record)
	e.grow(100)
	decode := func(step int) {
		t.Helper()
		if got, err := e.decode(); err != nil || !bytes.Equal(got, want[step]) {
			t.Errorf("step %d: differs, or failed with %v", step, err)
		}
	}
	decode(0)
	stopped := make(chan error)
	go func() { stopped <- first.Stop(t.Context()) }()
	seen.expect(t, client.StateLive, client.StateDraining)
	if _, err := e.cache.Step(t.Context(), e.batch()); !errors.Is(err, client.ErrDraining) {
		t.Errorf("a step while draining: %v", err)
	}
	seen.expect(t, client.StateLost)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	serve(t, path)
	seen.expect(t, client.StateLive)
	decode(1)
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// Whatever is in flight, and whatever is given up, each layer answers for itself.
func TestLayersInFlight(t *testing.T) {
	t.Parallel()
	e := newEngine(t, dial(t, serve(t, "").Target()), nil)
	e.grow(200)
	step, err := e.cache.Step(t.Context(), e.batch())
	if err != nil {
		t.Fatal(err)
	}
	want := make([]*client.LayerResult, layers)
	for i := range layers {
		if want[i], err = step.Layer(t.Context(), client.Layer{Layer: i, Query: e.query(i), Lists: true}); err != nil {
			t.Fatal(err)
		}
		rows := 0
		for row, list := range want[i].RowLists() {
			if len(list) != int(want[i].Kept[row]) || !slices.IsSorted(list) {
				t.Errorf("layer %d, row %d: %d kept, listed are %v", i, row, want[i].Kept[row], list)
			}
			rows++
		}
		if rows != kvHeads {
			t.Errorf("%d list rows, want %d", rows, kvHeads)
		}
	}
	var flying sync.WaitGroup
	for n := range 40 {
		flying.Go(func() {
			ctx, layer := t.Context(), n%layers
			if n%4 == 3 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(n)*50*time.Microsecond)
				defer cancel()
			}
			got, err := step.Layer(ctx, client.Layer{Layer: layer, Query: e.query(layer), Lists: true})
			switch {
			case errors.Is(err, context.DeadlineExceeded):
			case err != nil:
				t.Error(err)
			case !bytes.Equal(got.Output, want[layer].Output) || !slices.Equal(got.Lists, want[layer].Lists):
				t.Errorf("layer %d answered otherwise", layer)
			}
		})
	}
	flying.Wait()
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

// The daemon's refusals arrive by their kinds, and the session goes on.
func TestDaemonRefuses(t *testing.T) {
	t.Parallel()
	c := dial(t, serve(t, "").Target())
	e := newEngine(t, c, nil)
	e.grow(40)
	step, err := e.cache.Step(t.Context(), e.batch())
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*client.Sequence)) func() error {
		return func() error {
			b := e.batch()
			b.Sequences[0].Table = slices.Clone(b.Sequences[0].Table)
			change(&b.Sequences[0])
			_, err := e.cache.Step(t.Context(), b)
			return err
		}
	}
	layer := func(l client.Layer) func() error {
		return func() error { _, err := step.Layer(t.Context(), l); return err }
	}
	open := func(change func(*client.OpenOptions)) func() error {
		return func() error {
			o := client.OpenOptions{Geometry: e.session.Geometry()}
			change(&o)
			s, err := c.Open(t.Context(), o)
			if err == nil {
				s.Close()
			}
			return err
		}
	}
	for name, tc := range map[string]struct {
		call  func() error
		code  client.Code
		field string
	}{
		"query size":    {layer(client.Layer{Query: make([]byte, 7)}), client.ErrInvalid, "layer.query_inline"},
		"unknown layer": {layer(client.Layer{Layer: 77, Query: e.query(0)}), client.ErrNotFound, "layer.layer"},
		"output read-only": {
			layer(client.Layer{Query: e.query(0), Output: &client.Tensor{Location: client.Location{Buffer: e.kv}}}),
			client.ErrPermission, "layer.output_tensor.at",
		},
		"page":      {with(func(s *client.Sequence) { s.Table[0] = 999 }), client.ErrOutOfRange, "step.table.entries[0]"},
		"shrinking": {with(func(s *client.Sequence) { s.Len-- }), client.ErrPrecondition, "step.lengths[0]"},
		"head size": {open(func(o *client.OpenOptions) { o.Geometry.KDim = 5000 }), client.ErrInvalid, "geometry.k_dim"},
		"config":    {open(func(o *client.OpenOptions) { o.Config = `{"what": 1}` }), client.ErrInvalid, "config_json.what"},
		"device":    {open(func(o *client.OpenOptions) { o.Device = "none" }), client.ErrNotFound, "device"},
		"other memory": {
			func() error {
				file, err := os.CreateTemp(t.TempDir(), "")
				if err != nil {
					return err
				}
				defer file.Close()
				if err := file.Truncate(4096); err != nil {
					return err
				}
				_, err = e.session.ShareFD(t.Context(), client.Share{
					FD: int(file.Fd()), Size: 4096, Access: client.ReadOnly, Probe: &client.Probe{Bytes: []byte("no zeros")},
				})
				return err
			}, client.ErrDataLoss, "register_region.probe.expected_sha256",
		},
		"shadow": {
			func() error {
				spec := e.spec()
				spec.NumPages, spec.K = 1<<30, client.Strides{}
				_, err := e.session.RegisterCache(t.Context(), spec)
				return err
			}, client.ErrExhausted, "",
		},
	} {
		err := tc.call()
		var refused *client.Error
		if !errors.As(err, &refused) || refused.Code != tc.code || (tc.field != "" && refused.Field != tc.field) {
			t.Errorf("%s: got %+v (%v), want %v at %s", name, refused, err, tc.code, tc.field)
		}
	}
	if _, err := e.decode(); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	c := dial(t, serve(t, "").Target())
	if err := c.Health(t.Context()); err != nil {
		t.Error(err)
	}
	plain, err := c.Capabilities(t.Context(), nil)
	if err != nil || len(plain.GetDevices()) != 1 || plain.GetDevices()[0].ShadowBytesPerToken != nil {
		t.Fatalf("without a question: %v, %v", plain, err)
	}
	query := client.ShadowQuery{Geometry: client.Geometry{Layers: 2, QueryHeads: 4, KVHeads: 2, KDim: 32, Query: client.F16}, Config: sparse}
	asked, err := c.Capabilities(t.Context(), &query)
	if err != nil {
		t.Fatal(err)
	}
	e := newEngine(t, c, nil)
	size, err := e.session.ShadowBytes(t.Context(), e.spec())
	if err != nil {
		t.Fatal(err)
	}
	if per := asked.GetDevices()[0].GetShadowBytesPerToken(); per <= 0 || per != size.PerToken || size != e.cache.Shadow() {
		t.Errorf("capabilities tell %v bytes a token, the session %+v, the cache %+v", per, size, e.cache.Shadow())
	}
	if e.session.Device().GetId() != "host" || e.session.Limits().GetMaxBatch() == 0 || !bytes.Contains([]byte(e.session.Config()), []byte(`"group"`)) {
		t.Errorf("device %v, limits %v, config %s", e.session.Device(), e.session.Limits(), e.session.Config())
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
}
