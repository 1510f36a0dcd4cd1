package client_test

import (
	"context"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// BenchmarkLayer is a layer's way to a daemon that does nothing and back, over a Unix socket; tensors lie
// in shared memory. Allocations are those of both ends.
func BenchmarkLayer(b *testing.B) {
	f := newFake(b)
	f.answer = func(s *stream, req *twilightv1.LeaseRequest) bool {
		if req.GetLayer() == nil {
			return false
		}
		const rows = 64
		s.reply(&twilightv1.LeaseResponse{
			RequestId: req.GetRequestId(),
			Response: &twilightv1.LeaseResponse_LayerResult{LayerResult: &twilightv1.LayerResult{
				Candidates: make([]uint32, rows), Kept: make([]uint32, rows), Paths: make([]twilightv1.Path, rows),
				Reasons: make([]twilightv1.PathReason, rows), EstimatedMass: make([]float32, 4*rows),
			}},
		})
		return true
	}
	c, err := client.Dial(f.serveUnix())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	session, err := c.Open(b.Context(), client.OpenOptions{Geometry: geometry})
	if err != nil {
		b.Fatal(err)
	}
	defer session.Close()
	buffer, err := session.NewBuffer(b.Context(), 4096, client.ReadWrite)
	if err != nil {
		b.Fatal(err)
	}
	cache, err := session.RegisterCache(b.Context(), spec(buffer))
	if err != nil {
		b.Fatal(err)
	}
	step := f.step(cache, batch(8, 0))
	layer := client.Layer{
		QueryAt: &client.Tensor{Location: client.Location{Buffer: buffer}},
		Output:  &client.Tensor{Location: client.Location{Buffer: buffer, Offset: 2048}},
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := step.Layer(b.Context(), layer); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWays is a layer's way to a daemon in another process and back, by each way that tensors travel:
// armed with the next step armed while one runs, armed with arming counted, by message with tensors in
// shared memory, and inline. The layer itself is nearly nothing. A step has 32 layers; p50-ns and p99-ns
// are of a step's layers on average.
func BenchmarkWays(b *testing.B) {
	const depth = 32
	path := filepath.Join(b.TempDir(), "tw.sock")
	process(b, path)
	e := newDeepEngine(b, "unix://"+path, depth)
	cache, how, batch, query := e.cache, e.how, e.batch, make([]byte, deepTensor)
	layers := func(ask func(i int) client.Layer) {
		step, err := cache.Step(b.Context(), batch)
		if err != nil {
			b.Fatal(err)
		}
		for i := range depth {
			if _, err := step.Layer(b.Context(), ask(i)); err != nil {
				b.Fatal(err)
			}
		}
	}
	var next *client.Armed
	for _, way := range []struct {
		name       string
		begin, end func()
		step       func()
	}{
		{"armed", func() { next = e.arm() }, func() {
			next.Cancel()
			_, _ = next.Results(b.Context())
		}, func() {
			a := next
			e.replay(a, func() { next = e.arm() })
		}},
		{"armed, arming counted", nil, nil, func() { e.replay(e.arm(), func() {}) }},
		{"message, shared memory", nil, nil, func() {
			layers(func(i int) client.Layer {
				return client.Layer{Layer: i, QueryAt: &how.Layers[i].Query, Output: &how.Layers[i].Output}
			})
		}},
		{"message, inline", nil, nil, func() {
			layers(func(i int) client.Layer { return client.Layer{Layer: i, Query: query} })
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			if way.begin != nil {
				way.begin()
				defer way.end()
			}
			var times []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				way.step()
				times = append(times, time.Since(start)/depth)
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Nanoseconds()), "p50-ns/layer")
			b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds()), "p99-ns/layer")
		})
	}
}

// deepEngine has many layers and one token.
type deepEngine struct {
	t     testing.TB
	cache *client.Cache
	how   client.Arming
	batch client.Batch
}

const deepTensor = 8 * 64 * 2 // [1, heads, dim] in half precision

func newDeepEngine(t testing.TB, target string, depth int) *deepEngine {
	t.Helper()
	c, err := client.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.WaitServing(t.Context()); err != nil {
		t.Fatal(err)
	}
	const dim, page = 64, 16 * 64 * 2
	session, err := c.Open(t.Context(), client.OpenOptions{
		Geometry: client.Geometry{Layers: depth, QueryHeads: 8, KVHeads: 1, KDim: dim, Query: client.F16},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	kv, err := session.NewBuffer(t.Context(), 2*depth*page, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	tensors, err := session.NewBuffer(t.Context(), 2*depth*deepTensor, client.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	at := func(buffer *client.Buffer, offset int) client.Location {
		return client.Location{Buffer: buffer, Offset: offset}
	}
	registered := client.CacheSpec{
		DType: client.F16, PageSize: 16, NumPages: 1, K: client.Strides{Page: page, Head: page, Token: dim * 2},
	}
	e := &deepEngine{t: t, batch: client.Batch{Sequences: []client.Sequence{{ID: 1, Len: 1, Table: []int32{0}}}}}
	for i := range depth {
		registered.Layers = append(registered.Layers, client.CacheLayer{Layer: i, K: at(kv, 2*i*page), V: at(kv, (2*i+1)*page)})
		e.how.Layers = append(e.how.Layers, client.ArmedLayer{
			Layer:  i,
			Query:  client.Tensor{Location: at(tensors, 2*i*deepTensor)},
			Output: client.Tensor{Location: at(tensors, (2*i+1)*deepTensor)},
		})
	}
	if e.cache, err = session.RegisterCache(t.Context(), registered); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *deepEngine) arm() *client.Armed {
	a, err := e.cache.Arm(context.Background(), e.batch, e.how)
	if err != nil {
		e.t.Fatal(err)
	}
	return a
}

// replay runs an armed step and calls midway behind its first ring.
func (e *deepEngine) replay(a *client.Armed, midway func()) {
	for i := range e.how.Layers {
		a.Layer(i).Ready()
		if i == 0 {
			midway()
		}
		if err := a.Layer(i).Wait(context.Background()); err != nil {
			e.t.Fatal(err)
		}
	}
}

// An armed step allocates the same however many layers it has, on both sides together.
func TestArmedStepAllocations(t *testing.T) {
	var perStep [2]float64
	for i, depth := range []int{2, 34} {
		e := newDeepEngine(t, serve(t, "").Target(), depth)
		next := e.arm()
		step := func() {
			a := next
			e.replay(a, func() { next = e.arm() })
		}
		for range 50 {
			step()
		}
		perStep[i] = testing.AllocsPerRun(200, step)
		next.Cancel()
	}
	t.Logf("%v allocations in a step of 2 layers, %v in one of 34", perStep[0], perStep[1])
	if perLayer := (perStep[1] - perStep[0]) / 32; perLayer > 0.25 {
		t.Errorf("%v allocations a layer", perLayer)
	}
}

// BenchmarkStep declares a batch of 256 sequences of 8192 tokens that grow by one.
func BenchmarkStep(b *testing.B) {
	f := newFake(b)
	f.opened.Limits = &twilightv1.Limits{MaxMessageBytes: 1 << 20}
	_, cache := f.cache(nil)
	sequences := make([]client.Sequence, 256)
	for i := range sequences {
		sequences[i] = client.Sequence{ID: uint64(i + 1), Len: 8192, Table: make([]int32, 1<<14)}
	}
	b.ReportAllocs()
	for b.Loop() {
		for i := range sequences {
			sequences[i].Len = min(sequences[i].Len+1, 16*len(sequences[i].Table))
		}
		f.step(cache, client.Batch{Sequences: sequences})
	}
}
