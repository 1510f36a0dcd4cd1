package service

import (
	"context"
	"crypto/sha256"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// fakeDevice computes nothing, counts what is open on it, and does as a test says.
type fakeDevice struct {
	info gpu.Info

	// What a test may set before the device serves; nil does what is right.
	selfTest func(context.Context) error
	onOpen   func() error
	onImport func(*gpu.Region) error
	onStep   func(*kv.Step) error
	onLayer  func(context.Context, *gpu.LayerRequest, *gpu.LayerResult) error

	leases, memories, caches atomic.Int64
	closed                   atomic.Bool
}

func newFake() *fakeDevice {
	return &fakeDevice{info: gpu.Info{
		ID: "fake", Backend: "fake", Name: "Fake",
		ShadowBytesTotal: 1 << 30, ShadowBytesFree: 1 << 30,
		Limits:      gpu.Limits{Batch: 8, SequenceTokens: 1 << 20, ShadowBytes: 1 << 20},
		CacheDTypes: []kv.DType{kv.F16, kv.F32}, QueryDTypes: []kv.DType{kv.F16, kv.F32},
		MaxHeadSize: 256, MaxGroup: 16,
		Regions: []gpu.RegionKind{gpu.SharedMemory},
	}}
}

func (d *fakeDevice) Info() gpu.Info { return d.info }

func (d *fakeDevice) ShadowBytesPerToken(*kv.Geometry, *pipeline.Config) (float64, error) {
	return 12.5, nil
}

func (d *fakeDevice) Open(context.Context, *kv.Geometry, *pipeline.Config) (gpu.Lease, error) {
	if d.onOpen != nil {
		if err := d.onOpen(); err != nil {
			return nil, err
		}
	}
	d.leases.Add(1)
	return &fakeLease{device: d}, nil
}

func (d *fakeDevice) SelfTest(ctx context.Context) error {
	if d.selfTest != nil {
		return d.selfTest(ctx)
	}
	return nil
}

func (d *fakeDevice) Close() error {
	d.closed.Store(true)
	return nil
}

// fakeLease's lock is held while something runs on it, so that Close waits, as it must.
type fakeLease struct {
	device   *fakeDevice
	mu       sync.Mutex
	closed   bool
	memories []*fakeMemory
	caches   []*fakeCache
}

func (l *fakeLease) Import(_ context.Context, region *gpu.Region) (gpu.Memory, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer func() {
		for _, chunk := range region.Chunks {
			if chunk.FD >= 0 {
				unix.Close(chunk.FD)
			}
		}
	}()
	if l.device.onImport != nil {
		if err := l.device.onImport(region); err != nil {
			return nil, err
		}
	}
	m := &fakeMemory{lease: l, size: region.Size, writable: region.Writable}
	l.memories = append(l.memories, m)
	l.device.memories.Add(1)
	return m, nil
}

func (l *fakeLease) ShadowBytes(spec *gpu.CacheSpec) (total uint64, perToken float64, err error) {
	return uint64(spec.NumPages * spec.PageSize), 12.5, nil
}

func (l *fakeLease) NewCache(context.Context, *gpu.CacheSpec) (gpu.Cache, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &fakeCache{lease: l}
	l.caches = append(l.caches, c)
	l.device.caches.Add(1)
	return c, nil
}

func (l *fakeLease) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	for _, c := range l.caches {
		c.close()
	}
	for _, m := range l.memories {
		m.release()
	}
	l.device.leases.Add(-1)
	return nil
}

type fakeMemory struct {
	lease    *fakeLease
	size     uint64
	writable bool
	released bool
}

func (m *fakeMemory) Size() uint64   { return m.size }
func (m *fakeMemory) Writable() bool { return m.writable }

func (m *fakeMemory) Digest(context.Context, uint64, uint32) ([32]byte, error) {
	return sha256.Sum256([]byte("fake")), nil
}

func (m *fakeMemory) Release() error {
	m.lease.mu.Lock()
	defer m.lease.mu.Unlock()
	m.release()
	return nil
}

func (m *fakeMemory) release() {
	if !m.released {
		m.released = true
		m.lease.device.memories.Add(-1)
	}
}

type fakeCache struct {
	lease  *fakeLease
	closed bool
}

func (c *fakeCache) ShadowBytes() uint64 { return 1 }

func (c *fakeCache) Step(_ context.Context, step *kv.Step) error {
	if c.lease.device.onStep != nil {
		return c.lease.device.onStep(step)
	}
	return nil
}

func (c *fakeCache) Arm(context.Context, *gpu.ArmedStep) error {
	return fault.Newf(fault.Unsupported, "armed", "the fake arms nothing")
}

func (c *fakeCache) CancelArmed(uint32) {}

func (c *fakeCache) Index(context.Context) (kv.IndexStats, error) {
	return kv.IndexStats{TokensIndexed: 7}, nil
}

func (c *fakeCache) Layer(ctx context.Context, req *gpu.LayerRequest, res *gpu.LayerResult) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	*res = gpu.LayerResult{}
	if c.lease.device.onLayer != nil {
		return c.lease.device.onLayer(ctx, req, res)
	}
	if req.Query != nil {
		res.Kept = []uint32{uint32(len(req.Query.Inline))}
		res.Output = append(res.Output, req.Query.Inline...)
	}
	return nil
}

func (c *fakeCache) Close() error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	c.close()
	return nil
}

func (c *fakeCache) close() {
	if !c.closed {
		c.closed = true
		c.lease.device.caches.Add(-1)
	}
}
