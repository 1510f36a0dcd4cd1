package host

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// lease is one engine's use of the device. Its lock is held by whatever runs on it, its memories and its
// caches.
type lease struct {
	device              *Device
	geometry            kv.Geometry
	config              *pipeline.Config
	pipeline            *pipeline.Pipeline
	selector, estimator kv.Shadow // nil where a method keeps nothing
	needs               pipeline.Needs
	lists               int // lists of a row: one, or one for each query head of its group

	scratch []scratch // by worker

	mu       sync.Mutex
	closed   bool
	memories map[*memory]struct{}
	caches   map[*cache]struct{}

	shadowBytes uint64 // taken; under the device's lock
}

var _ gpu.Lease = (*lease)(nil)

// scratch is the memory of a worker on a lease.
type scratch struct {
	pipeline            pipeline.Scratch
	row                 pipeline.Row
	selector, estimator records
	keys                []float32
}

// keyBuffer is memory for n elements of keys, of any content.
func (s *scratch) keyBuffer(n int) []float32 {
	s.keys = sized(s.keys, n)
	return s.keys
}

// newLease checks that the device serves g by cfg. The lease is not yet open.
func (d *Device) newLease(g *kv.Geometry, cfg *pipeline.Config) (*lease, error) {
	if err := served.Geometry(g); err != nil {
		return nil, fault.In("geometry", err)
	}
	p, err := pipeline.New(cfg, g)
	if err != nil {
		return nil, fault.In("config", err)
	}
	l := &lease{
		device: d, geometry: *g, config: cfg, pipeline: p, lists: 1,
		scratch:  make([]scratch, d.options.Workers),
		memories: map[*memory]struct{}{}, caches: map[*cache]struct{}{},
	}
	l.geometry.Sinks = slices.Clone(g.Sinks)
	l.selector, l.estimator = p.Shadows()
	l.needs = p.Needs()
	if cfg.Group == pipeline.PerQueryHead {
		l.lists = g.Group()
	}
	return l, nil
}

// Import implements gpu.Lease.
func (l *lease) Import(ctx context.Context, region *gpu.Region) (gpu.Memory, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(ctx); err != nil {
		closeAll(region.Chunks)
		return nil, err
	}
	data, err := mapRegion(region)
	if err != nil {
		return nil, err
	}
	m := &memory{lease: l, size: region.Size, writable: region.Writable, data: data}
	l.memories[m] = struct{}{}
	return m, nil
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
	l.closed = true
	caches := slices.Collect(maps.Keys(l.caches))
	l.mu.Unlock()
	for _, c := range caches {
		c.armed.cancelAll(errClosed) // all at once, then one by one
	}
	for _, c := range caches {
		c.armed.close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for c := range l.caches {
		errs = append(errs, c.free())
	}
	for m := range l.memories {
		errs = append(errs, m.unmap())
	}
	clear(l.memories)
	l.device.mu.Lock()
	delete(l.device.leases, l)
	l.device.mu.Unlock()
	return errors.Join(errs...)
}

// explain turns a crash into what the engine is told. Of extents, the first that holds a faulting
// address is at fault; other errors pass.
func (l *lease) explain(err error, extents ...extent) error {
	var c *crash
	if !errors.As(err, &c) {
		return err
	}
	if c.address != 0 {
		for m := range l.memories {
			extents = append(extents, extent{memory: m, to: m.size})
		}
		for _, e := range extents {
			if e.holds(c.address) {
				return fault.Newf(fault.DataLoss, e.field,
					"the lent memory is gone, its file was cut short: register a region that stays")
			}
		}
	}
	clear(l.scratch) // it may be in any state
	l.device.options.Log.Error("panic in a worker", slog.Any("panic", c.value), slog.String("stack", string(c.stack)))
	return fault.Newf(fault.Internal, "", "a bug of the daemon stopped this request (%v): report it", c.value)
}

// ShadowBytes implements gpu.Lease.
func (l *lease) ShadowBytes(of *gpu.CacheSpec) (total uint64, perToken float64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, 0, errClosed
	}
	p, err := l.plan(of)
	return spec.Add(p.arena, p.state), l.bytesPerToken(p.indexed), err
}

// bytesPerToken is what a token takes of some layers that are not skipped.
func (l *lease) bytesPerToken(layers int) float64 {
	g := &l.geometry
	_, selector := recordBytes(l.selector, g.KDim)
	_, estimator := recordBytes(l.estimator, g.KDim)
	records := float64(layers*g.KVHeads*(selector+estimator)) / kv.ChunkTokens
	return records + float64(l.pipeline.StateBytesPerToken(layers))
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
	if err := l.device.take(l, p.taken); err != nil {
		return nil, err
	}
	c, err := l.newCache(p)
	if err != nil {
		l.device.give(l, p.taken)
		return nil, err
	}
	l.caches[c] = struct{}{}
	return c, nil
}

// plan is a cache for which nothing has been taken yet.
type plan struct {
	layers  []layer
	indexed int // layers that are not skipped
	tracker kv.TrackerConfig
	chunks  int

	tokens int    // of live sequences, of which methods remember something
	arena  uint64 // bytes of the records
	state  uint64 // and of what methods remember besides
	taken  uint64 // and of the tracker, about
}

func (l *lease) plan(of *gpu.CacheSpec) (plan, error) {
	g, limits := &l.geometry, &l.device.options.Limits
	p := plan{tracker: kv.TrackerConfig{
		PageSize: of.PageSize, NumPages: of.NumPages, NullPage: of.NullPage,
		Layers: g.Layers, MaxTokens: of.MaxTokens,
		MaxBatch: limits.Batch, MaxSequenceTokens: limits.SequenceTokens,
	}}
	var err error
	if p.chunks, err = p.tracker.NumChunks(); err != nil {
		return p, err
	}
	if p.layers, err = l.layers(of); err != nil {
		return p, err
	}
	p.indexed = indexed(p.layers)
	chunks, heads := uint64(p.chunks), uint64(p.indexed*g.KVHeads)
	for _, method := range []kv.Shadow{l.selector, l.estimator} {
		head, chunk := recordBytes(method, g.KDim)
		p.arena = spec.Add(p.arena, spec.Mul(heads, spec.Add(uint64(head), spec.Mul(chunks, uint64(chunk)))))
	}
	p.tokens = cmp.Or(of.MaxTokens, of.NumPages*of.PageSize)
	p.state = spec.Mul(uint64(p.tokens), uint64(l.pipeline.StateBytesPerToken(p.indexed)))
	p.taken = spec.Add(spec.Add(p.arena, p.state), spec.Mul(chunks, uint64(6*g.Layers+10)))
	return p, nil
}

func (l *lease) newCache(p plan) (*cache, error) {
	tracker, err := kv.NewTracker(p.tracker)
	if err != nil {
		return nil, err
	}
	arena, err := newArena(p.arena)
	if err != nil {
		return nil, err
	}
	g := &l.geometry
	c := &cache{
		lease: l, layers: p.layers, tracker: tracker, paging: p.tracker, arena: arena, taken: p.taken,
		byModel: make(map[int]int, len(p.layers)), job: newJob(), stateBytes: p.state,
	}
	if l.needs.State {
		c.states = newStates(g.Layers*g.KVHeads, p.tokens, l.needs.Mass)
	}
	for i := range p.layers {
		c.byModel[p.layers[i].model] = i
	}
	c.selector, arena = carve(l.selector, g, p.layers, p.chunks, arena)
	c.estimator, _ = carve(l.estimator, g, p.layers, p.chunks, arena)
	c.armed = newArmer(c)
	c.trainTask, c.indexTask = c.trainHead, c.indexChunk
	c.queryTask, c.windowTask, c.observeTask = c.readQuery, c.readObservation, c.observe
	c.weighTask, c.shareTask, c.attendTask = c.weigh, c.share, c.attend
	return c, nil
}
