//go:build linux && cgo && cuda

package cuda

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

var (
	cacheDTypes = []kv.DType{kv.F32, kv.F16, kv.BF16, kv.F8E4M3}
	queryDTypes = cacheDTypes
)

// Options configure a device. Zero fields take the defaults that their comments name.
type Options struct {
	// UUID names the GPU; the only one.
	UUID string
	// ShadowBytes bounds the shadows of all leases together; half of the GPU's memory.
	ShadowBytes uint64
	// FusedFrom is the length in tokens from which a batch runs in the fused kernel, where one serves it;
	// 2048. Negative: never. That kernel does not estimate mass and coverage.
	FusedFrom int
	// Limits bound each lease; 4096 rows, 2^20 tokens of a sequence, all of ShadowBytes.
	Limits gpu.Limits
	// Lost, if not nil, is called with what engines are told, once, when an error has ended the context: only
	// a new process can go on. It must not block.
	Lost func(error)
}

// Device is one GPU.
type Device struct {
	options Options
	device  cu.Device
	uuid    string
	name    string
	sms     int
	// bandwidth of the memory, in bytes a second: what reading reaches.
	bandwidth float64
	owner     *owner
	kernels   *kernels.Kernels

	mu          sync.Mutex
	closed      bool
	leases      map[*lease]struct{}
	shadowBytes uint64 // taken
}

var _ gpu.Device = (*Device)(nil)

// New takes a GPU, whose primary context stays until Close.
func New(o Options) (*Device, error) {
	device, uuid, err := drv.Find(o.UUID)
	if err != nil {
		return nil, err
	}
	d := &Device{options: o, device: device, uuid: uuid, leases: map[*lease]struct{}{}}
	total, err := device.TotalMem()
	if err == nil {
		d.name, err = device.Name()
	}
	if err == nil {
		d.sms, err = device.Attribute(cu.MultiprocessorCount)
	}
	if err == nil {
		d.bandwidth, err = bandwidth(device)
	}
	if err != nil {
		return nil, drv.Wrap("cuDeviceGet", err)
	}
	d.options.FusedFrom = cmp.Or(o.FusedFrom, 2048)
	l := &d.options.Limits
	d.options.ShadowBytes = cmp.Or(o.ShadowBytes, uint64(total)/2)
	l.ShadowBytes = min(cmp.Or(l.ShadowBytes, d.options.ShadowBytes), d.options.ShadowBytes)
	l.Batch = cmp.Or(l.Batch, 4096)
	l.SequenceTokens = cmp.Or(l.SequenceTokens, 1<<20)
	if d.owner, err = newOwner(device, o.Lost); err != nil {
		return nil, explain(err)
	}
	err = d.owner.do(context.Background(), func() (err error) {
		d.kernels, err = kernels.Load(device)
		return err
	})
	if err != nil {
		d.owner.close()
		return nil, fmt.Errorf("load the kernels: %w", err)
	}
	return d, nil
}

// bandwidth is what reading reaches, in bytes a second.
func bandwidth(device cu.Device) (float64, error) {
	clock, err := device.Attribute(cu.MemoryClockRate) // kHz
	if err != nil {
		return 0, err
	}
	width, err := device.Attribute(cu.GlobalMemoryBusWidth) // bits
	const both, reached = 2, .92                            // edges of the clock; of the peak
	return both * float64(clock) * 1e3 * float64(width) / 8 * reached, err
}

// Info implements gpu.Device.
func (d *Device) Info() gpu.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	var sizes []int
	for dim := kernels.DimStep; dim <= kernels.MaxDim; dim += kernels.DimStep {
		sizes = append(sizes, dim)
	}
	return gpu.Info{
		ID: d.uuid, Backend: "cuda", Name: d.name,
		ShadowBytesTotal: d.options.ShadowBytes,
		ShadowBytesFree:  d.options.ShadowBytes - d.shadowBytes,
		Limits:           d.options.Limits,
		CacheDTypes:      slices.Clone(cacheDTypes),
		QueryDTypes:      slices.Clone(queryDTypes),
		HeadSizes:        sizes,
		MaxHeadSize:      kernels.MaxDim,
		MaxGroup:         kernels.MaxGroup,
		Selectors:        slices.Clone(selectors),
		Estimators:       slices.Clone(estimators),
		Pruners:          slices.Clone(pruners),
		Compressors:      []string{"none"},
		Kernels:          d.kernelNames(),
		Regions:          []gpu.RegionKind{gpu.CUDAIPC, gpu.CUDAVMM, gpu.CUDAFabric},
	}
}

func (d *Device) kernelNames() []string {
	names := []string{"chain"}
	if len(d.kernels.Fused) > 0 && d.options.FusedFrom >= 0 {
		names = append(names, "fused")
	}
	return names
}

// take reserves shadow memory for a lease.
func (d *Device) take(l *lease, size uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := min(d.options.ShadowBytes-d.shadowBytes, d.options.Limits.ShadowBytes-l.shadowBytes)
	if size > left {
		return fault.Exhaustedf("num_pages", size, left,
			"the cache's shadow takes %d bytes and %d are left: register fewer pages", size, left)
	}
	d.shadowBytes += size
	l.shadowBytes += size
	return nil
}

// give takes back what take gave.
func (d *Device) give(l *lease, size uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.shadowBytes -= size
	l.shadowBytes -= size
}

// ShadowBytesPerToken implements gpu.Device. Head records, which do not grow with tokens, are left out.
func (d *Device) ShadowBytesPerToken(g *kv.Geometry, cfg *pipeline.Config) (float64, error) {
	m, err := newMethod(g, cfg)
	if err != nil {
		return 0, err
	}
	layers := 0
	for layer := range g.Layers {
		if !m.pipeline.Skips(layer) {
			layers++
		}
	}
	return m.bytesPerToken(g, layers), nil
}

// bytesPerToken is what a token takes of some layers that are not skipped.
func (m *method) bytesPerToken(g *kv.Geometry, layers int) float64 {
	return float64(layers*g.KVHeads*m.chunkBytes(g.KDim)) / kv.ChunkTokens
}

// Open implements gpu.Device.
func (d *Device) Open(ctx context.Context, g *kv.Geometry, cfg *pipeline.Config) (gpu.Lease, error) {
	m, err := newMethod(g, cfg)
	if err != nil {
		return nil, err
	}
	l := &lease{
		device: d, geometry: *g, method: m,
		memories: map[*memory]struct{}{}, caches: map[*cache]struct{}{},
	}
	l.geometry.Sinks = slices.Clone(g.Sinks)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	if err := d.owner.do(ctx, l.start); err != nil {
		return nil, explain(err)
	}
	d.leases[l] = struct{}{}
	return l, nil
}

// Close implements gpu.Device.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	leases := slices.Collect(maps.Keys(d.leases))
	d.mu.Unlock()
	var errs []error
	for _, l := range leases {
		errs = append(errs, l.Close())
	}
	d.owner.close()
	return errors.Join(errs...)
}
