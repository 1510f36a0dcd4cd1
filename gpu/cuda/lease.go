//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"errors"
	"sync"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/kv"
)

// lease is one engine's use of the device. Its lock is held by whatever runs on it, its memories and its
// caches; its stream is idle whenever the lock is free.
type lease struct {
	device   *Device
	geometry kv.Geometry
	method   method

	mu       sync.Mutex
	closed   bool
	memories map[*memory]struct{}
	caches   map[*cache]struct{}

	shadowBytes uint64 // taken; under the device's lock

	// On the owner's thread.
	stream   cu.Stream
	events   [stages + 1]cu.Event
	block    drv.Block // the kernels.Layer that launches pass
	launches launches
	dense    map[kv.DType]drv.Launch // in place of launches.attend, where the tensor cores serve
	fused    fused
	out      staging // to the device
	back     staging // from the device
	scratch  buffer
	results  buffer
	inputs   buffer
	sinks    buffer
}

var _ gpu.Lease = (*lease)(nil)

// launches are the kernels, ready to be launched on the lease's stream.
type launches struct {
	check, train, index, queries                    drv.Launch
	scores, rankQuery, rankKeys, rankLabels, choose drv.Launch
	estimate, estimateCodes, exact, cut, compact    drv.Launch
	attend, combine, audit, expand, lists           drv.Launch
	all                                             []drv.Launch
}

// start takes what a lease needs of the driver, on the owner's thread.
func (l *lease) start() (err error) {
	if l.stream, err = cu.MakeStream(cu.NonBlocking); err != nil {
		return drv.Wrap("cuStreamCreate", err)
	}
	for i := range l.events {
		if l.events[i], err = cu.MakeEvent(cu.DefaultEvent); err != nil {
			return drv.Wrap("cuEventCreate", err)
		}
	}
	l.block = drv.NewBlock(int(unsafe.Sizeof(kernels.Layer{})))
	k, g := l.device.kernels, &l.geometry
	attend, size := k.Attend(l.asking())
	for _, p := range []struct {
		launch  *drv.Launch
		f       cu.Function
		threads int
	}{
		{&l.launches.check, k.Check, 256},
		{&l.launches.train, k.Train, 256},
		{&l.launches.index, k.Index, 128},
		{&l.launches.queries, k.Queries, 128},
		{&l.launches.scores, k.Scores, 128},
		{&l.launches.rankQuery, k.RankQuery, kernels.MaxDim},
		{&l.launches.rankKeys, k.RankKeys, 128},
		{&l.launches.rankLabels, k.RankLabels, 128},
		{&l.launches.choose, k.Select, 512},
		{&l.launches.estimate, k.Estimate, 128},
		{&l.launches.estimateCodes, k.EstimateCodes, 128},
		{&l.launches.exact, k.Exact, 128},
		{&l.launches.cut, k.Cut, 512},
		{&l.launches.compact, k.Compact, 512},
		{&l.launches.attend, attend, 128},
		{&l.launches.combine, k.Combine, 128},
		{&l.launches.audit, k.Audit, 256},
		{&l.launches.expand, k.Expand, 256},
		{&l.launches.lists, k.Lists, 256},
	} {
		*p.launch = drv.NewLaunch(p.f, l.stream, p.threads, l.block)
		l.launches.all = append(l.launches.all, *p.launch)
	}
	l.dense = make(map[kv.DType]drv.Launch)
	for _, v := range k.Dense {
		if v.Dim == g.KDim && v.Dim == g.VDim && suits(v.Heads, l.asking()) {
			launch := drv.NewLaunch(v.Function, l.stream, v.Threads, l.block)
			launch.Shared(v.DenseShared(l.asking()))
			l.dense[v.DType] = launch
			l.launches.all = append(l.launches.all, launch)
		}
	}
	l.fused = newFused(l)
	l.launches.index.Shared(kernels.IndexShared(g.KDim))
	l.launches.attend.Shared(kernels.AttendShared(size, g.KDim, g.VDim))
	if len(g.Sinks) > 0 {
		if err := l.sinks.reserve(4 * len(g.Sinks)); err != nil {
			return err
		}
		return drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(cu.DevicePtr(l.sinks.ptr),
			unsafe.Pointer(unsafe.SliceData(g.Sinks)), int64(4*len(g.Sinks))))
	}
	return nil
}

// asking is how many query heads ask a list row.
func (l *lease) asking() int {
	if l.method.perQueryHead {
		return 1
	}
	return l.geometry.Group()
}

// wait returns once the stream has done everything.
func (l *lease) wait() error { return drv.Wrap("cuStreamSynchronize", l.stream.Synchronize()) }

// Import implements gpu.Lease.
func (l *lease) Import(ctx context.Context, region *gpu.Region) (gpu.Memory, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(ctx); err != nil {
		closeAll(region.Chunks)
		return nil, err
	}
	var m *memory
	err := l.device.owner.do(context.WithoutCancel(ctx), func() (err error) {
		m, err = mapRegion(l.device.device, l.device.uuid, region)
		return err
	})
	if err != nil {
		return nil, err
	}
	m.lease = l
	l.memories[m] = struct{}{}
	return m, nil
}

// release unmaps a memory that nothing uses.
func (l *lease) release(m *memory) error {
	delete(l.memories, m)
	m.base = 0
	return explain(l.device.owner.do(context.Background(), m.unmap))
}

// usable tells why the lease cannot be used, if it cannot.
func (l *lease) usable(ctx context.Context) error {
	if l.closed {
		return errClosed
	}
	return ctx.Err()
}

// Close implements gpu.Lease.
func (l *lease) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	for c := range l.caches {
		errs = append(errs, c.close())
	}
	for m := range l.memories {
		errs = append(errs, l.release(m))
	}
	errs = append(errs, explain(l.device.owner.do(context.Background(), l.stop)))
	l.device.mu.Lock()
	delete(l.device.leases, l)
	l.device.mu.Unlock()
	return errors.Join(errs...)
}

// stop gives back what start took, on the owner's thread.
func (l *lease) stop() error {
	errs := []error{
		l.out.free(), l.back.free(), l.scratch.free(), l.results.free(), l.inputs.free(), l.sinks.free(),
		drv.Wrap("cuStreamDestroy", l.stream.Destroy()),
	}
	for i := range l.events {
		errs = append(errs, drv.Wrap("cuEventDestroy", cu.DestroyEvent(&l.events[i])))
	}
	for _, launch := range l.launches.all {
		launch.Free()
	}
	l.fused.free()
	l.block.Free()
	return errors.Join(errs...)
}

// plan is a cache before anything is taken for it.
type plan struct {
	spec    *gpu.CacheSpec
	layers  []layer
	tracker kv.TrackerConfig
	chunks  int
	shadow  uint64
}

func (l *lease) plan(of *gpu.CacheSpec) (*plan, error) {
	g, limits := &l.geometry, &l.device.options.Limits
	p := &plan{spec: of, tracker: kv.TrackerConfig{
		PageSize: of.PageSize, NumPages: of.NumPages, NullPage: of.NullPage, Layers: g.Layers,
		MaxTokens: of.MaxTokens, MaxBatch: limits.Batch, MaxSequenceTokens: limits.SequenceTokens,
	}}
	var err error
	if p.chunks, err = p.tracker.NumChunks(); err != nil {
		return nil, err
	}
	if p.layers, err = l.layers(of); err != nil {
		return nil, err
	}
	head, chunk := uint64(l.method.headBytes(g.KDim)), uint64(l.method.chunkBytes(g.KDim))
	p.shadow = spec.Mul(uint64(indexed(p.layers)*g.KVHeads), spec.Add(head, spec.Mul(uint64(p.chunks), chunk)))
	return p, nil
}

// ShadowBytes implements gpu.Lease.
func (l *lease) ShadowBytes(of *gpu.CacheSpec) (total uint64, perToken float64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, 0, errClosed
	}
	p, err := l.plan(of)
	if err != nil {
		return 0, 0, err
	}
	return p.shadow, l.method.bytesPerToken(&l.geometry, indexed(p.layers)), nil
}

// NewCache implements gpu.Lease.
func (l *lease) NewCache(ctx context.Context, of *gpu.CacheSpec) (gpu.Cache, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(ctx); err != nil {
		return nil, err
	}
	p, err := l.plan(of)
	if err != nil {
		return nil, err
	}
	if err := l.device.take(l, p.shadow); err != nil {
		return nil, err
	}
	c, err := l.newCache(ctx, p)
	if err != nil {
		l.device.give(l, p.shadow)
		return nil, explain(err)
	}
	l.caches[c] = struct{}{}
	return c, nil
}
