//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"errors"
	"fmt"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/compressor/none"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/pruner/topp"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

// SelfTest implements gpu.Device: of 64 tokens one has a key that outweighs all others, so all of the
// method must end at its value.
func (d *Device) SelfTest(ctx context.Context) error {
	const dim = selfTestDim
	g := &kv.Geometry{
		Layers: 1, QueryHeads: 1, KVHeads: 1, KDim: dim, VDim: dim, Scale: 1,
		Query: kv.F32, QueryScale: 1, Output: kv.F32,
	}
	cfg := &pipeline.Config{Group: pipeline.Union, POver: pipeline.OverCandidates}
	cfg.Compressor.Type, cfg.Compressor.Config = "none", &none.Config{}
	cfg.Selector.Type, cfg.Selector.Config = "quest", &quest.Config{TokenBudget: 32, SparsityRate: -1, ChunkSize: kv.ChunkTokens}
	cfg.Estimator.Type, cfg.Estimator.Config = "min_max_quant", minmaxquant.Default()
	cfg.Pruner.Type, cfg.Pruner.Config = "top_p", topp.Default()

	opened, err := d.Open(ctx, g, cfg)
	if err != nil {
		return err
	}
	err = opened.(*lease).selfTest(ctx)
	return errors.Join(err, opened.Close())
}

const selfTestDim = 64

func (l *lease) selfTest(ctx context.Context) error {
	const tokens, dim, heavy = 64, selfTestDim, 37
	var keys, values [tokens][dim]float32
	for t := range tokens {
		for i := range dim {
			keys[t][i], values[t][i] = float32((t*7+i*3)%5)/5, float32(t*100+i)
		}
	}
	for i := range dim {
		keys[heavy][i] = 4
	}
	size := unsafe.Sizeof(keys)
	m := &memory{lease: l, size: 2 * uint64(size)}
	err := l.device.owner.do(ctx, func() error {
		at, err := cu.MemAlloc(int64(m.size))
		if err != nil {
			return drv.Wrap("cuMemAlloc", err)
		}
		m.base = drv.Ptr(at)
		m.unmap = func() error { return drv.Wrap("cuMemFree", cu.MemFree(at)) }
		return errors.Join(
			drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(at, unsafe.Pointer(&keys), int64(size))),
			drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(at+cu.DevicePtr(size), unsafe.Pointer(&values), int64(size))))
	})
	if m.base != 0 {
		l.mu.Lock()
		l.memories[m] = struct{}{}
		l.mu.Unlock()
	}
	if err != nil {
		return explain(err)
	}

	stride := gpu.Strides{Page: 16 * dim * 4, Token: dim * 4}
	cache, err := l.NewCache(ctx, &gpu.CacheSpec{
		DType: kv.F32, PageSize: 16, NumPages: tokens / 16, K: stride, V: stride, NullPage: -1,
		Layers: []gpu.CacheLayer{{K: gpu.Span{Memory: m}, V: gpu.Span{Memory: m, Offset: uint64(size)}}},
	})
	if err != nil {
		return err
	}
	err = cache.Step(ctx, &kv.Step{
		Sequences: []uint64{1}, Lengths: []int32{tokens}, TableCounts: []uint32{tokens / 16}, TableEntries: []int32{0, 1, 2, 3},
	})
	if err != nil {
		return err
	}
	query := make([]float32, dim)
	for i := range query {
		query[i] = 1
	}
	var res gpu.LayerResult
	if err := cache.Layer(ctx, &gpu.LayerRequest{Query: &gpu.Tensor{Inline: bytesOf(query)}}, &res); err != nil {
		return err
	}
	if res.Paths[0] != pipeline.Sparse || res.Candidates[0] != 32 || res.Kept[0] != 1 || string(res.Output) != string(bytesOf(values[heavy][:])) {
		return fault.Newf(fault.Internal, "", "the GPU failed its self-test: %s",
			fmt.Sprintf("path %d, %d candidates, %d kept", res.Paths[0], res.Candidates[0], res.Kept[0]))
	}
	return nil
}
