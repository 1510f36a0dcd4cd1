package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// Engine has memory of a GPU, and what lies in it.
type Engine interface {
	Name() string
	UUID() string
	// ReadRate is the bytes a second at which the device reads its memory.
	ReadRate() (float64, error)
	// Load makes the data of a step.
	Load(l *StepLayout) (Load, error)
}

// Load is the data of a step.
type Load interface {
	// Lend lends size bytes at offset.
	Lend(ctx context.Context, s *client.Session, offset, size int, access client.Access) (*client.Buffer, error)
	// Read fills data from offset.
	Read(offset int, data []byte) error
	// Logits are the products of a query head and the keys of all tokens of a sequence in a layer.
	Logits(layer, sequence, head int) ([]float32, error)
	// Close frees the memory.
	Close() error
}

// Step says what a decode step looks like: each sequence, and each layer, has pages of its own. All is fp16.
type Step struct {
	QueryHeads int `json:"query_heads"`
	KVHeads    int `json:"kv_heads"`
	Dim        int `json:"dim"`
	Batch      int `json:"batch"`
	Tokens     int `json:"tokens"`
	PageSize   int `json:"page_size"`
	// Layers is 0 for as many as leave every cache behind, 16 at most.
	Layers int `json:"layers"`
}

// StepLayout says where a step's data lie: layers of keys and values as layout.NHD has them, then the queries
// of all layers, [Batch][QueryHeads][Dim], then room for the outputs of each, for the lists of one, and for the
// words of armed steps.
type StepLayout struct {
	Step
	Cache                   *layout.Layout
	Tables                  [][]int32 // by sequence
	Queries, Outputs, Lists int       // offsets
	Words                   int       // likewise
	TensorBytes             int       // of the queries, and of a layer's outputs
	Bytes                   int       // of all
}

const entryBytes = 4 // of lists and their counts

// listRows is the most that a layer has.
func (s *Step) listRows() int { return s.Batch * s.QueryHeads }

func (s Step) layout() (*StepLayout, error) {
	for _, f := range []struct {
		name  string
		value int
	}{
		{"kv-heads", s.KVHeads},
		{"group", s.QueryHeads / max(s.KVHeads, 1)},
		{"dim", s.Dim},
		{"batch", s.Batch},
		{"tokens", s.Tokens},
		{"page-size", s.PageSize},
	} {
		if f.value < 1 {
			return nil, fmt.Errorf("--%s is %d: give at least 1", f.name, f.value)
		}
	}
	if s.Tokens%s.PageSize != 0 {
		return nil, fmt.Errorf("--tokens is %d: give a multiple of the page size %d", s.Tokens, s.PageSize)
	}
	shape := layout.Config{
		Kind: layout.NHD, DType: kv.F16, Layers: 1, KVHeads: s.KVHeads, KDim: s.Dim, VDim: s.Dim,
		Sequences: s.Batch, Tokens: s.Tokens, PageSize: s.PageSize,
	}
	one, err := layout.New(shape)
	if err != nil {
		return nil, err
	}
	if s.Layers == 0 {
		const enough, most = 4 << 30, 16
		s.Layers = int(max(1, min(most, enough/one.Size())))
	}
	shape.Layers = s.Layers
	l := &StepLayout{Step: s}
	if l.Cache, err = layout.New(shape); err != nil {
		return nil, err
	}
	pages := make([]int32, l.Cache.NumPages)
	for i, page := range rand.New(rand.NewPCG(1, 0)).Perm(len(pages)) { //nolint:gosec // to be repeated, not to be guessed
		pages[i] = int32(page)
	}
	l.Tables = l.Cache.Tables(pages)
	// Shared memory can be lent from a multiple of 4096 on.
	align := func(n int) int { return (n + 4095) &^ 4095 }
	l.TensorBytes = s.Batch * s.QueryHeads * s.Dim * kv.F16.Size()
	l.Queries = align(int(l.Cache.Size()))
	l.Outputs = align(l.Queries + l.TensorBytes)
	l.Lists = align(l.Outputs + s.Layers*l.TensorBytes)
	l.Words = align(l.Lists + s.listRows()*(1+s.Tokens)*entryBytes)
	l.Bytes = l.Words + client.WordBytes(s.Layers)
	return l, nil
}

// shape is that of a row, for ReadBytes.
func (s *Step) shape() *Shape {
	return &Shape{
		KVHeads: s.KVHeads, Group: s.QueryHeads / s.KVHeads, Dim: s.Dim, Tokens: s.Tokens, Sequences: s.Batch,
		Layout: layout.NHD, DType: kv.F16,
	}
}

// Named is a Twilight config and its name.
type Named struct{ Name, Config string }

// StepOptions say what to time. All fields are required but Progress.
type StepOptions struct {
	Step    Step
	Configs []Named // the first is what others are compared with
	Rounds  int
	// Progress is told what happens.
	Progress func(format string, args ...any)
}

// StepReport is how a step went, times in microseconds a layer.
type StepReport struct {
	Device string `json:"device"`
	Step
	Rounds int `json:"rounds"`
	// ReadRate is in bytes a second.
	ReadRate float64      `json:"read_bytes_per_second"`
	Results  []StepResult `json:"results"`
}

// StepResult is what became of a config.
type StepResult struct {
	Name string `json:"name"`
	// Device is the device's own time by its events, from the first kernel of a layer to its last. Service is
	// what the engine waits for a layer, and Declare what it waits, once for all layers, for the step's batch.
	Device  Spread `json:"device_us"`
	Service Spread `json:"service_us"`
	Declare Spread `json:"declare_us"`
	// Speedup is over the first config, round by round.
	Speedup Spread `json:"speedup"`
	// Stages are shares of the device's time.
	Stages StageShares `json:"stages"`
	// ReadBytes are read in a layer, ReadShare is what share of the read rate that makes.
	ReadBytes  float64 `json:"read_bytes"`
	ReadShare  float64 `json:"read_share"`
	Candidates float64 `json:"candidates"` // of a row, in the mean
	Kept       float64 `json:"kept"`       // likewise
	KeptMin    uint32  `json:"kept_min"`
	KeptMax    uint32  `json:"kept_max"`
	// TrueMass is the share of true softmax weight that the kept tokens hold, in the mean of some query heads,
	// and of the worst of them. OutputError is ||out-first||/||first||, against the first config's outputs.
	TrueMass      float64 `json:"true_mass"`
	WorstTrueMass float64 `json:"worst_true_mass"`
	OutputError   float64 `json:"output_error"`
	// ShadowPerToken is in bytes, of a layer and KV head.
	ShadowPerToken float64 `json:"shadow_bytes_per_token"`
	// Dense tells how many rows were not computed sparsely.
	Dense int `json:"dense_rows"`
	Rows  int `json:"rows"`
}

// StageShares add up to 1.
type StageShares struct {
	Index  float64 `json:"index"`
	Select float64 `json:"select"`
	Prune  float64 `json:"prune"`
	Attend float64 `json:"attend"`
}

// RunStep times the layers of a decode step that a daemon runs on an engine's GPU. Configs take turns.
func RunStep(ctx context.Context, c *client.Client, engine Engine, o StepOptions) (_ *StepReport, err error) {
	l, err := o.Step.layout()
	if err != nil {
		return nil, err
	}
	r := &StepReport{Device: engine.Name(), Step: l.Step, Rounds: o.Rounds}
	if r.ReadRate, err = engine.ReadRate(); err != nil {
		return nil, err
	}
	o.Progress("bench: making %d layers", l.Layers)
	load, err := engine.Load(l)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, load.Close()) }()
	var running []*stepper
	defer func() {
		for _, s := range running { // before the memory goes
			err = errors.Join(err, s.session.Close())
		}
	}()
	for _, config := range o.Configs {
		o.Progress("bench: %s indexes", config.Name)
		s, err := newStepper(ctx, c, engine, l, load, config)
		if s != nil {
			running = append(running, s)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", config.Name, err)
		}
	}
	for round := range 1 + o.Rounds { // of which the first does not count
		for _, s := range running {
			if err := s.run(ctx, round > 0); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
		}
		o.Progress("bench: %d of %d rounds", round, o.Rounds)
	}
	for _, s := range running {
		o.Progress("bench: %s is judged", s.name)
		result, err := s.judge(ctx, running[0], r.ReadRate)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		r.Results = append(r.Results, *result)
	}
	return r, nil
}

// stepper runs a step under one config.
type stepper struct {
	*StepLayout
	name                   string
	load                   Load
	config                 *pipeline.Config
	session                *client.Session
	cache                  *client.Cache
	kv, queries            *client.Buffer
	results                *client.Buffer // outputs and lists
	declares               []float64      // of steps
	walls                  []float64      // of layers
	device                 []float64      // of layers
	medians                []float64      // of device's rounds
	stages                 [4]time.Duration
	candidates, kept, rows float64
	least, most            uint32
	dense                  int
}

func newStepper(ctx context.Context, c *client.Client, engine Engine, l *StepLayout, load Load, config Named) (*stepper, error) {
	all, err := methods.New()
	if err != nil {
		return nil, err
	}
	s := &stepper{StepLayout: l, name: config.Name, load: load, least: math.MaxUint32}
	if s.config, err = all.Parse([]byte(config.Config)); err != nil {
		return nil, err
	}
	s.session, err = c.Open(ctx, client.OpenOptions{
		EngineName: "twilight bench", Device: engine.UUID(), Config: config.Config,
		Geometry: client.Geometry{
			Layers: l.Layers, QueryHeads: l.QueryHeads, KVHeads: l.KVHeads, KDim: l.Dim, VDim: l.Dim,
			Scale: s.scale(), Query: client.F16, Output: client.F16,
		},
	})
	if err != nil {
		return nil, err
	}
	return s, s.register(ctx)
}

func (s *stepper) scale() float32 { return 1 / float32(math.Sqrt(float64(s.Dim))) }

// register lends the data and has them indexed.
func (s *stepper) register(ctx context.Context) (err error) {
	if s.kv, err = s.load.Lend(ctx, s.session, 0, int(s.Cache.Size()), client.ReadOnly); err != nil {
		return err
	}
	if s.queries, err = s.load.Lend(ctx, s.session, s.Queries, s.TensorBytes, client.ReadOnly); err != nil {
		return err
	}
	if s.results, err = s.load.Lend(ctx, s.session, s.Outputs, s.Words-s.Outputs, client.ReadWrite); err != nil {
		return err
	}
	k := s.Cache.K
	spec := client.CacheSpec{
		DType: client.F16, PageSize: s.PageSize, NumPages: s.Cache.NumPages,
		K: client.Strides{Page: int(k.Page), Head: int(k.Head), Token: int(k.Token)},
	}
	for i := range s.Layers {
		spec.Layers = append(spec.Layers, client.CacheLayer{
			Layer: Layer + i,
			K:     client.Location{Buffer: s.kv, Offset: int(s.Cache.KOffset(i))},
			V:     client.Location{Buffer: s.kv, Offset: int(s.Cache.VOffset(i))},
		})
	}
	if s.cache, err = s.session.RegisterCache(ctx, spec); err != nil {
		return err
	}
	batch := s.batch()
	batch.IndexOnly = true
	_, err = s.cache.Step(ctx, batch)
	return err
}

func (s *stepper) batch() (b client.Batch) {
	for i, table := range s.Tables {
		b.Sequences = append(b.Sequences, client.Sequence{ID: uint64(i + 1), Len: s.Tokens, Table: table})
	}
	return b
}

// run runs the step.
func (s *stepper) run(ctx context.Context, counts bool) error {
	batch := s.batch()
	start := time.Now()
	step, err := s.cache.Step(ctx, batch)
	if err != nil {
		return err
	}
	declare := time.Since(start)
	results := make([]*client.LayerResult, s.Layers)
	walls := make([]float64, s.Layers)
	for i := range results {
		start = time.Now()
		if results[i], err = step.Layer(ctx, s.layer(i)); err != nil {
			return err
		}
		walls[i] = microseconds(time.Since(start))
	}
	if !counts {
		return nil
	}
	s.declares, s.walls = append(s.declares, microseconds(declare)), append(s.walls, walls...)
	var times []float64
	for _, r := range results {
		if n := r.Index.TokensIndexed; n != 0 {
			return fmt.Errorf("%d tokens were indexed once more", n)
		}
		t := r.Timing
		for i, stage := range []time.Duration{t.Index, t.Select, t.Prune, t.Attend} {
			s.stages[i] += stage
		}
		times = append(times, microseconds(t.Index+t.Select+t.Prune+t.Attend))
		for row, kept := range r.Kept {
			s.rows++
			s.candidates, s.kept = s.candidates+float64(r.Candidates[row]), s.kept+float64(kept)
			s.least, s.most = min(s.least, kept), max(s.most, kept)
		}
	}
	s.device = append(s.device, times...)
	s.medians = append(s.medians, spread(times).Median)
	s.dense = 0
	for _, path := range results[0].Paths {
		if path != client.PathSparse {
			s.dense++
		}
	}
	return nil
}

func (s *stepper) layer(i int) client.Layer {
	return client.Layer{
		Layer:   Layer + i,
		QueryAt: &client.Tensor{Location: client.Location{Buffer: s.queries}},
		Output:  &client.Tensor{Location: client.Location{Buffer: s.results, Offset: i * s.TensorBytes}},
	}
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// judge sums up, and looks at the first layer once more.
func (s *stepper) judge(ctx context.Context, first *stepper, readRate float64) (*StepResult, error) {
	r := &StepResult{
		Name: s.name, Device: spread(s.device), Service: spread(s.walls), Declare: spread(s.declares),
		Candidates: s.candidates / s.rows, Kept: s.kept / s.rows, KeptMin: s.least, KeptMax: s.most,
		ShadowPerToken: s.cache.Shadow().PerToken / float64(s.Layers*s.KVHeads),
		Dense:          s.dense, Rows: int(s.rows) / len(s.walls),
	}
	ratios := make([]float64, len(s.medians))
	for i, m := range s.medians {
		ratios[i] = first.medians[i] / m
	}
	r.Speedup = spread(ratios)
	if all := s.stages[0] + s.stages[1] + s.stages[2] + s.stages[3]; all > 0 {
		of := func(i int) float64 { return float64(s.stages[i]) / float64(all) }
		r.Stages = StageShares{of(0), of(1), of(2), of(3)}
	}
	bytes, err := ReadBytes(s.config, s.shape())
	if err != nil {
		return nil, err
	}
	r.ReadBytes = float64(r.Rows) * bytes(r.Candidates, r.Kept)
	r.ReadShare = r.ReadBytes / (r.Device.Median / 1e6) / readRate

	mine, err := s.firstLayer(ctx)
	if err != nil {
		return nil, err
	}
	if r.TrueMass, r.WorstTrueMass, err = s.mass(mine); err != nil || first == s {
		return r, err
	}
	theirs, err := first.firstLayer(ctx)
	if err != nil {
		return nil, err
	}
	var e capture.RelErr
	e.Add(mine.outputs, theirs.doubles())
	r.OutputError = e.Value()
	return r, nil
}

// answer is that of a layer.
type answer struct {
	outputs []float32
	kept    []uint32 // by list row
}

func (a *answer) doubles() []float64 {
	x := make([]float64, len(a.outputs))
	for i, y := range a.outputs {
		x[i] = float64(y)
	}
	return x
}

// firstLayer runs the first layer for its outputs and lists, which stay in the memory.
func (s *stepper) firstLayer(ctx context.Context) (*answer, error) {
	step, err := s.cache.Step(ctx, s.batch())
	if err != nil {
		return nil, err
	}
	layer := s.layer(0)
	counts := client.Location{Buffer: s.results, Offset: s.Lists - s.Outputs}
	lists := counts
	lists.Offset += s.listRows() * entryBytes
	layer.ListBuffer = &client.ListBuffer{Counts: counts, Lists: lists, Capacity: s.Tokens}
	r, err := step.Layer(ctx, layer)
	if err != nil {
		return nil, err
	}
	data := make([]byte, s.TensorBytes)
	if err := s.load.Read(s.Outputs, data); err != nil {
		return nil, err
	}
	a := &answer{outputs: make([]float32, len(data)/kv.F16.Size()), kept: r.Kept}
	kv.F16.Decode(a.outputs, data)
	return a, nil
}

// mass is the true mass of some query heads, spread over the batch: mean and worst.
func (s *stepper) mass(a *answer) (mean, worst float64, err error) {
	const some = 16
	heads := s.listRows()
	perRow := heads / len(a.kept) // query heads of a list row
	n := min(some, heads)
	worst = math.Inf(1)
	for i := range n {
		head := i * heads / n
		row := head / perRow
		data := make([]byte, int(a.kept[row])*entryBytes)
		if err := s.load.Read(s.Lists+(s.listRows()+row*s.Tokens)*entryBytes, data); err != nil {
			return 0, 0, err
		}
		list := make([]int32, a.kept[row])
		for i := range list {
			list[i] = int32(binary.LittleEndian.Uint32(data[i*entryBytes:]))
		}
		logits, err := s.load.Logits(0, head/s.QueryHeads, head%s.QueryHeads)
		if err != nil {
			return 0, 0, err
		}
		mass, err := capture.Mass(softmax(logits, float64(s.scale())), list)
		if err != nil {
			return 0, 0, err
		}
		mean, worst = mean+mass/float64(n), min(worst, mass)
	}
	return mean, worst, nil
}

func softmax(logits []float32, scale float64) []float64 {
	most, sum := float64(slices.Max(logits)), 0.0
	weights := make([]float64, len(logits))
	for i, x := range logits {
		weights[i] = math.Exp(scale * (float64(x) - most))
		sum += weights[i]
	}
	for i := range weights {
		weights[i] /= sum
	}
	return weights
}
