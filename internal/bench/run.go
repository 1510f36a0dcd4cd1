package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// Runner runs a layer of one of the sequences.
type Runner interface {
	Run(ctx context.Context, sequence int) (Sample, error)
}

// Sample is what is known of one layer.
type Sample struct {
	Wall             time.Duration
	Stages           pipeline.Timing // summed over rows
	Candidates, Kept float64         // tokens of a row, in the mean
	Allocs           float64         // of the whole process meanwhile
}

// Device runs layers on a device, without the way there. It is to be closed.
type Device struct {
	data   *Data
	lease  gpu.Lease
	cache  gpu.Cache
	known  int // sequences whose tables the device has
	result gpu.LayerResult

	before, after runtime.MemStats
}

// NewDevice lends data to a device and indexes it.
func NewDevice(ctx context.Context, device gpu.Device, cfg *pipeline.Config, data *Data) (_ *Device, err error) {
	d := &Device{data: data}
	if d.lease, err = device.Open(ctx, data.Geometry(), cfg); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	fd, err := unix.FcntlInt(uintptr(data.FD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	memory, err := d.lease.Import(ctx, &gpu.Region{
		Kind: gpu.SharedMemory, Size: data.Layout.Size(), Chunks: []gpu.Chunk{{FD: fd}},
	})
	if err != nil {
		return nil, err
	}
	spec := data.Layout.Spec(memory, 0)
	spec.Layers[0].Layer = Layer
	if d.cache, err = d.lease.NewCache(ctx, spec); err != nil {
		return nil, err
	}
	for s := range data.Tables {
		if err := d.step(ctx, s); err != nil {
			return nil, err
		}
		if _, err := d.cache.Index(ctx); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// step makes a sequence the batch.
func (d *Device) step(ctx context.Context, sequence int) error {
	step := &kv.Step{Sequences: []uint64{uint64(sequence + 1)}, Lengths: []int32{int32(d.data.Tokens)}}
	if sequence >= d.known {
		d.known++
		step.TableEntries = d.data.Tables[sequence]
		step.TableCounts = []uint32{uint32(len(step.TableEntries))}
	}
	return d.cache.Step(ctx, step)
}

// Run implements Runner. The step that goes before the layer is not timed.
func (d *Device) Run(ctx context.Context, sequence int) (Sample, error) {
	if err := d.step(ctx, sequence); err != nil {
		return Sample{}, err
	}
	request := &gpu.LayerRequest{Layer: Layer, Query: &gpu.Tensor{Inline: d.data.Query(sequence)}}
	runtime.ReadMemStats(&d.before)
	start := time.Now()
	err := d.cache.Layer(ctx, request, &d.result)
	wall := time.Since(start)
	runtime.ReadMemStats(&d.after)
	if err != nil {
		return Sample{}, err
	}
	if n := d.result.Index.TokensIndexed; n != 0 {
		return Sample{}, fmt.Errorf("%d tokens were indexed once more", n)
	}
	return Sample{
		Wall: wall, Stages: d.result.Timing.Timing,
		Candidates: mean(d.result.Candidates), Kept: mean(d.result.Kept),
		Allocs: float64(d.after.Mallocs - d.before.Mallocs),
	}, nil
}

// Close ends the lease.
func (d *Device) Close() error { return d.lease.Close() }

// ReadBytes counts what a config reads for a row: the selector's records of all chunks, the estimator's of
// the candidates, and the keys and values that attention needs. Keys that a selector reads itself are left
// out.
func ReadBytes(cfg *pipeline.Config, shape *Shape) (func(candidates, kept float64) float64, error) {
	p, err := pipeline.New(cfg, shape.Geometry())
	if err != nil {
		return nil, err
	}
	selector, estimator := p.Shadows()
	vector := float64(shape.Dim * shape.DType.Size())
	chunks, perCandidate, perKept := 0.0, vector, vector
	if selector != nil {
		chunks = float64((shape.Tokens + kv.ChunkTokens - 1) / kv.ChunkTokens * selector.ChunkBytes(shape.Dim))
	}
	if estimator != nil {
		perCandidate = float64(estimator.ChunkBytes(shape.Dim)) / kv.ChunkTokens
		if !cfg.UseEstimatedWeights {
			perKept = 2 * vector
		}
	}
	return func(candidates, kept float64) float64 { return chunks + perCandidate*candidates + perKept*kept }, nil
}

func mean(x []uint32) float64 {
	sum := 0.0
	for _, n := range x {
		sum += float64(n)
	}
	return sum / float64(len(x))
}

// Spread tells how samples lie.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spread(x []float64) Spread {
	x = slices.Sorted(slices.Values(x))
	return Spread{x[len(x)/2], x[0], x[len(x)-1]}
}

// Contender is a config and the ways to run it.
type Contender struct {
	Name   string
	Runner Runner
	// Service, if not nil, runs it through the service.
	Service Runner
	// ReadBytes counts what a row reads that has so many candidates and kept tokens.
	ReadBytes func(candidates, kept float64) float64
}

// Result is what became of a contender, times in milliseconds a layer.
type Result struct {
	Name         string  `json:"name"`
	Milliseconds Spread  `json:"milliseconds"`
	Service      *Spread `json:"service_milliseconds,omitempty"`
	Speedup      Spread  `json:"speedup"` // over the first contender, round by round
	// Stages are the workers' time, shared out among them.
	Stages     Stages  `json:"stages_milliseconds"`
	Candidates float64 `json:"candidates"`
	Kept       float64 `json:"kept"`
	ReadBytes  float64 `json:"read_bytes"`
	// AllocsPerRow counts what the whole process allocated during the direct runs.
	AllocsPerRow float64 `json:"allocs_per_row"`
}

// Stages are the medians of the parts of a layer.
type Stages struct {
	Select float64 `json:"select"`
	Prune  float64 `json:"prune"`
	Attend float64 `json:"attend"`
}

// Report is what Run found.
type Report struct {
	Workers int    `json:"workers"`
	DType   string `json:"dtype"`
	// ReadRate is in bytes a second, DotRate in floating-point operations a second, of all workers.
	ReadRate Spread `json:"read_bytes_per_second"`
	DotRate  Spread `json:"dot_flops_per_second"`
	// DenseBytes and DenseOperations are those of dense attention; LimitMilliseconds is the time they take
	// at these rates' medians, LimitShare how much of the first contender's time that is.
	DenseBytes        float64  `json:"dense_bytes"`
	DenseOperations   float64  `json:"dense_flops"`
	LimitMilliseconds float64  `json:"limit_milliseconds"`
	MemoryBound       bool     `json:"memory_bound"`
	LimitShare        float64  `json:"limit_share"`
	Results           []Result `json:"results"`
}

// Run runs the contenders, of which the first is dense, and the machine's own measurements in turns, after
// a round that does not count.
func Run(
	ctx context.Context, data *Data, contenders []Contender, workers, rounds int, progress func(done int),
) (*Report, error) {
	var m *measured
	for round := range 1 + rounds {
		if round <= 1 {
			m = newMeasured(len(contenders))
		}
		m.reads = append(m.reads, read(workers, data.memory))
		m.dots = append(m.dots, multiply(workers))
		for i := range contenders {
			if err := m.round(ctx, i, &contenders[i], data.Sequences); err != nil {
				return nil, fmt.Errorf("%s: %w", contenders[i].Name, err)
			}
		}
		progress(round)
	}
	return m.report(data, contenders, workers), nil
}

// measured are samples, by contender where there are several.
type measured struct {
	reads, dots []float64
	direct      [][]Sample
	service     [][]float64
	medians     [][]float64 // of the rounds
}

func newMeasured(contenders int) *measured {
	return &measured{
		direct: make([][]Sample, contenders), service: make([][]float64, contenders),
		medians: make([][]float64, contenders),
	}
}

// round runs contender i on all sequences.
func (m *measured) round(ctx context.Context, i int, c *Contender, sequences int) error {
	var walls []float64
	for s := range sequences {
		sample, err := c.Runner.Run(ctx, s)
		if err != nil {
			return err
		}
		m.direct[i] = append(m.direct[i], sample)
		walls = append(walls, milliseconds(sample.Wall))
	}
	m.medians[i] = append(m.medians[i], spread(walls).Median)
	if c.Service == nil {
		return nil
	}
	for s := range sequences {
		sample, err := c.Service.Run(ctx, s)
		if err != nil {
			return err
		}
		m.service[i] = append(m.service[i], milliseconds(sample.Wall))
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// report sums up.
func (m *measured) report(data *Data, contenders []Contender, workers int) *Report {
	r := &Report{
		Workers: workers, DType: data.DType.String(), ReadRate: spread(m.reads), DotRate: spread(m.dots),
		DenseBytes: float64(data.Bytes()), DenseOperations: data.operations(),
	}
	memory, arithmetic := r.DenseBytes/r.ReadRate.Median, r.DenseOperations/r.DotRate.Median
	r.LimitMilliseconds, r.MemoryBound = 1000*max(memory, arithmetic), memory >= arithmetic
	for i, c := range contenders {
		result := Result{Name: c.Name, Speedup: m.speedup(i)}
		of := func(f func(s *Sample) float64) Spread {
			x := make([]float64, len(m.direct[i]))
			for j := range x {
				x[j] = f(&m.direct[i][j])
			}
			return spread(x)
		}
		result.Milliseconds = of(func(s *Sample) float64 { return milliseconds(s.Wall) })
		stage := func(f func(s *Sample) time.Duration) float64 {
			return of(func(s *Sample) float64 { return milliseconds(f(s)) / float64(workers) }).Median
		}
		result.Stages = Stages{
			Select: stage(func(s *Sample) time.Duration { return s.Stages.Select }),
			Prune:  stage(func(s *Sample) time.Duration { return s.Stages.Prune }),
			Attend: stage(func(s *Sample) time.Duration { return s.Stages.Attend }),
		}
		for _, s := range m.direct[i] {
			result.Candidates += s.Candidates / float64(len(m.direct[i]))
			result.Kept += s.Kept / float64(len(m.direct[i]))
		}
		result.AllocsPerRow = of(func(s *Sample) float64 { return s.Allocs }).Median / float64(data.KVHeads)
		result.ReadBytes = float64(data.KVHeads) * c.ReadBytes(result.Candidates, result.Kept)
		if c.Service != nil {
			through := spread(m.service[i])
			result.Service = &through
		}
		r.Results = append(r.Results, result)
	}
	r.LimitShare = r.LimitMilliseconds / r.Results[0].Milliseconds.Median
	return r
}

// speedup is contender i's over the first, of the rounds' medians.
func (m *measured) speedup(i int) Spread {
	ratios := make([]float64, len(m.medians[i]))
	for round, dense := range m.medians[0] {
		ratios[round] = dense / m.medians[i][round]
	}
	return spread(ratios)
}
