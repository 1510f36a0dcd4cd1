package requestfuzz_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
	"github.com/twilight-sidecar/twilight/internal/requestfuzz"
	"github.com/twilight-sidecar/twilight/kv"
)

// TestHost: the CPU device answers whatever comes, and its memory stays as it was.
func TestHost(t *testing.T) {
	t.Parallel()
	daemon, err := inprocess.Start(t.Context(), inprocess.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = daemon.Stop(context.Background()) }()
	conn, err := client.Dial(daemon.Target())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const tokens, room = 512, 1 << 20
	shape, err := layout.New(layout.Config{
		Kind: layout.NHD, DType: kv.F16, Layers: 2, KVHeads: 2, KDim: 32, VDim: 32, Sequences: 2, Tokens: tokens, PageSize: 16,
	})
	if err != nil {
		t.Fatal(err)
	}
	session, err := conn.Open(t.Context(), client.OpenOptions{
		Geometry: client.Geometry{Layers: 2, QueryHeads: 4, KVHeads: 2, KDim: 32, VDim: 32, Query: client.F16, Output: client.F16},
		Config: `{"selector": {"type": "quest", "sparsity_rate": 0.25}, "weight_estimator": {"type": "min_max_quant"},
			"weight_pruner": {"type": "top_p"}}`,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	cached, err := session.NewBuffer(t.Context(), int(shape.Size()), client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	asked, err := session.NewBuffer(t.Context(), room, client.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	for _, b := range []*client.Buffer{cached, asked} {
		values := make([]float32, b.Size()/2)
		for i := range values {
			values[i] = float32(random.NormFloat64())
		}
		kv.F16.Encode(b.Bytes(), values)
	}
	before := bytes.Clone(cached.Bytes())
	spec := client.CacheSpec{
		DType: client.F16, PageSize: 16, NumPages: shape.NumPages,
		K: client.Strides{Page: int(shape.K.Page), Head: int(shape.K.Head), Token: int(shape.K.Token)},
	}
	for i := range 2 {
		spec.Layers = append(spec.Layers, client.CacheLayer{
			Layer: i + 2,
			K:     client.Location{Buffer: cached, Offset: int(shape.KOffset(i))},
			V:     client.Location{Buffer: cached, Offset: int(shape.VOffset(i))},
		})
	}
	cache, err := session.RegisterCache(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	at := func(offset int) client.Location { return client.Location{Buffer: asked, Offset: offset} }
	f := &requestfuzz.Fuzzer{
		T: t, Random: random, Session: session, Cache: cache, Spec: spec, Room: asked, Codes: map[client.Code]int{},
		Layer: func(i int) client.Layer {
			return client.Layer{
				Layer: i + 2, QueryAt: &client.Tensor{Location: at(0)}, Output: &client.Tensor{Location: at(1 << 16)},
				ListBuffer: &client.ListBuffer{Counts: at(1 << 17), Lists: at(1 << 18), Capacity: tokens},
			}
		},
	}
	for range 2000 {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		f.Request(ctx)
		cancel()
		if state, why := session.State(); state != client.StateLive || t.Failed() {
			t.Fatalf("the session is %v: %v", state, why)
		}
	}
	t.Logf("served %d, refused %v", f.Served, f.Codes)
	if f.Served < 200 || len(f.Codes) < 4 {
		t.Errorf("served are %d, refusals %v: the fuzz does not reach far", f.Served, f.Codes)
	}
	if !bytes.Equal(cached.Bytes(), before) {
		t.Error("the cache's content changed")
	}
}
