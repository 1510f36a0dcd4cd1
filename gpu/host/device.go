package host

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

const (
	maxHeadSize = 1024
	maxGroup    = 1024
)

// dtypes are those of caches and queries.
var dtypes = []kv.DType{kv.F32, kv.F16, kv.BF16, kv.F8E4M3}

var served = spec.Limits{DTypes: dtypes, MaxDim: maxHeadSize, DimStep: 1, MaxGroup: maxGroup}

// Options configure a device.
type Options struct {
	// Methods are what the configs of leases can choose from, and what Info lists.
	Methods *pipeline.Methods
	// Workers is how many goroutines compute; 0 means GOMAXPROCS.
	Workers int
	// ShadowBytes bounds the shadows of all leases together; 0 means half of the memory that the machine has
	// and the process's cgroups (version 2) allow.
	ShadowBytes uint64
	// Limits bound each lease; zero fields mean 4096 rows, 1,048,576 tokens, and all of ShadowBytes.
	Limits gpu.Limits
	// Log takes what an engine is not told: the stacks of panics. Nil discards it.
	Log *slog.Logger
}

// Device is the CPU.
type Device struct {
	options Options
	name    string
	pool    *pool

	mu          sync.Mutex
	closed      bool
	leases      map[*lease]struct{}
	shadowBytes uint64 // taken
}

var _ gpu.Device = (*Device)(nil)

// New starts a device, whose workers run until Close.
func New(o Options) *Device {
	o.Workers = cmp.Or(max(o.Workers, 0), runtime.GOMAXPROCS(0))
	o.ShadowBytes = cmp.Or(o.ShadowBytes, memoryBytes()/2)
	o.Limits.ShadowBytes = min(cmp.Or(o.Limits.ShadowBytes, o.ShadowBytes), o.ShadowBytes)
	o.Limits.Batch = cmp.Or(o.Limits.Batch, 4096)
	o.Limits.SequenceTokens = cmp.Or(o.Limits.SequenceTokens, 1<<20)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Device{options: o, name: cpuName(), pool: newPool(o.Workers), leases: map[*lease]struct{}{}}
}

// Info implements gpu.Device.
func (d *Device) Info() gpu.Info {
	d.mu.Lock()
	taken := d.shadowBytes
	d.mu.Unlock()
	m := d.options.Methods
	return gpu.Info{
		ID: "host", Backend: "host", Name: d.name,
		ShadowBytesTotal: d.options.ShadowBytes, ShadowBytesFree: d.options.ShadowBytes - taken,
		Limits:      d.options.Limits,
		CacheDTypes: slices.Clone(dtypes), QueryDTypes: slices.Clone(dtypes),
		MaxHeadSize: maxHeadSize, MaxGroup: maxGroup,
		Selectors: m.Selectors.Types(), Estimators: m.Estimators.Types(), Pruners: m.Pruners.Types(),
		Compressors: m.Compressors.Types(),
		Kernels:     []string{kernel()},
		Regions:     []gpu.RegionKind{gpu.SharedMemory},
		ArmedSteps:  true, DeviceBatch: true,
	}
}

// ShadowBytesPerToken implements gpu.Device. Head records, which do not grow with tokens, are left out.
func (d *Device) ShadowBytesPerToken(g *kv.Geometry, cfg *pipeline.Config) (float64, error) {
	l, err := d.newLease(g, cfg)
	if err != nil {
		return 0, err
	}
	layers := 0
	for layer := range g.Layers {
		if !l.pipeline.Skips(layer) {
			layers++
		}
	}
	return l.bytesPerToken(layers), nil
}

// Open implements gpu.Device.
func (d *Device) Open(ctx context.Context, g *kv.Geometry, cfg *pipeline.Config) (gpu.Lease, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l, err := d.newLease(g, cfg)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	d.leases[l] = struct{}{}
	return l, nil
}

// Close implements gpu.Device.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed = true
	leases := slices.Collect(maps.Keys(d.leases))
	d.mu.Unlock()
	var errs []error
	for _, l := range leases {
		errs = append(errs, l.Close())
	}
	d.pool.close()
	return errors.Join(errs...)
}

// take books bytes of shadow for l.
func (d *Device) take(l *lease, bytes uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := min(d.options.Limits.ShadowBytes-l.shadowBytes, d.options.ShadowBytes-d.shadowBytes)
	if bytes > left {
		return fault.Exhaustedf("num_pages", bytes, left,
			"the shadow and its bookkeeping take %d bytes, %d are left: register fewer pages or release a cache",
			bytes, left)
	}
	l.shadowBytes += bytes
	d.shadowBytes += bytes
	return nil
}

// give undoes take.
func (d *Device) give(l *lease, bytes uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l.shadowBytes -= bytes
	d.shadowBytes -= bytes
}

// cpuName is the processor's name for people.
func cpuName() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// kernel names the code that does the arithmetic.
func kernel() string {
	if vek32.Info().Acceleration {
		return "vek32 avx2+fma"
	}
	return "vek32 portable"
}
