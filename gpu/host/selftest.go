package host

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// SelfTest implements gpu.Device: for each cache dtype, a dense and a sparse layer of a small cache in
// shared memory, against attention in float64 over the tokens that the device says it kept.
func (d *Device) SelfTest(ctx context.Context) error {
	cfg, err := d.options.Methods.Parse(nil)
	if err != nil {
		return err
	}
	for _, t := range dtypes {
		if err := d.selfTest(ctx, cfg, t); err != nil {
			return fmt.Errorf("self-test with a cache of %v: %w", t, err)
		}
	}
	return nil
}

func (d *Device) selfTest(ctx context.Context, cfg *pipeline.Config, t kv.DType) (err error) {
	const tokens, dim, group = 300, 32, 2
	g := &kv.Geometry{
		Layers: 2, QueryHeads: 2 * group, KVHeads: 2, KDim: dim, VDim: dim,
		Scale: 1 / float32(math.Sqrt(dim)), Query: kv.F32, QueryScale: 1, Output: kv.F32,
	}
	l, err := layout.New(layout.Config{
		Kind: layout.NHD, DType: t, Layers: g.Layers, KVHeads: g.KVHeads, KDim: dim, VDim: dim,
		Sequences: 1, Tokens: tokens, PageSize: 32,
	})
	if err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // test data, no secret
	pages := make([]int32, l.NumPages)
	for i, page := range random.Perm(l.NumPages) {
		pages[i] = int32(page)
	}
	keys, values := stored(random, t, g.KVHeads*tokens*dim), stored(random, t, g.KVHeads*tokens*dim)
	buffer := make([]byte, l.Size())
	for i := range g.Layers {
		l.Write(buffer, i, pages, keys, values, 0, tokens)
	}
	fd, err := share(buffer)
	if err != nil {
		return err
	}

	lease, err := d.Open(ctx, g, cfg)
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	defer func() { err = errors.Join(err, lease.Close()) }()
	lent, err := lease.Import(ctx, &gpu.Region{
		Kind: gpu.SharedMemory, Size: l.Size(), Chunks: []gpu.Chunk{{FD: fd}},
	})
	if err != nil {
		return err
	}
	spec := l.Spec(lent, 0)
	spec.Layers[1].Layer = 2 // behind those that the default config leaves dense
	cache, err := lease.NewCache(ctx, spec)
	if err != nil {
		return err
	}
	if err := cache.Step(ctx, &kv.Step{
		Sequences: []uint64{1}, Lengths: []int32{tokens},
		TableCounts: []uint32{uint32(len(pages))}, TableEntries: pages,
	}); err != nil {
		return err
	}

	queries := stored(random, kv.F32, g.QueryHeads*dim)
	query := make([]byte, 4*len(queries))
	kv.F32.Encode(query, queries)
	var answer gpu.LayerResult
	for i, path := range []pipeline.Path{pipeline.Dense, pipeline.Sparse} {
		request := &gpu.LayerRequest{Layer: spec.Layers[i].Layer, Query: &gpu.Tensor{Inline: query}, Lists: true}
		if err := cache.Layer(ctx, request, &answer); err != nil {
			return err
		}
		lists := answer.Lists
		for row, kept := range answer.Kept {
			if answer.Paths[row] != path {
				return fmt.Errorf("row %d of layer %d took path %d, not %d", row, request.Layer, answer.Paths[row], path)
			}
			for h := row * group; h < (row+1)*group; h++ {
				want := attend(queries[h*dim:][:dim], keys[row*tokens*dim:], values[row*tokens*dim:], lists[:kept], g.Scale)
				for j := range want {
					at := (h*dim + j) * 4
					got := float64(math.Float32frombits(binary.LittleEndian.Uint32(answer.Output[at:])))
					if !(math.Abs(got-want[j]) < 1e-4) {
						return fmt.Errorf("output [%d][%d] of layer %d is %v, not %v", h, j, request.Layer, got, want[j])
					}
				}
			}
			lists = lists[kept:]
		}
	}
	return nil
}

// stored returns n random values that t holds exactly.
func stored(random *rand.Rand, t kv.DType, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(random.NormFloat64())
	}
	data := make([]byte, n*t.Size())
	t.Encode(data, x)
	t.Decode(x, data)
	return x
}

// share puts data in a memfd.
func share(data []byte) (fd int, err error) {
	if fd, err = unix.MemfdCreate("twilight-self-test", unix.MFD_CLOEXEC); err != nil {
		return -1, err
	}
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil {
			return -1, errors.Join(err, unix.Close(fd))
		}
		data = data[n:]
	}
	return fd, nil
}

// attend is attention over the listed tokens, plainly.
func attend(query, keys, values []float32, list []int32, scale float32) []float64 {
	dim := len(query)
	weights, sum := make([]float64, len(list)), 0.0
	for i, n := range list {
		for d, q := range query {
			weights[i] += float64(scale) * float64(q) * float64(keys[int(n)*dim+d])
		}
		weights[i] = math.Exp(weights[i]) // logits of unit variance: no need to subtract their maximum
		sum += weights[i]
	}
	out := make([]float64, dim)
	for i, n := range list {
		for d := range out {
			out[d] += weights[i] / sum * float64(values[int(n)*dim+d])
		}
	}
	return out
}
