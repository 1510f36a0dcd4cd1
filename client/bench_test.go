package client_test

import (
	"testing"

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
