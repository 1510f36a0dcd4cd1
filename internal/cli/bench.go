package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/internal/replay"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

type benchCmd struct {
	connection
	place
	Config         []string `sep:"none" placeholder:"GLOB" help:"Twilight configs to time, in place of three built-in ones. May be repeated."`
	KVHeads        int      `name:"kv-heads" default:"8" placeholder:"N" help:"KV heads (8)."`
	Group          int      `default:"4" placeholder:"N" help:"Query heads of a KV head (4)."`
	Dim            int      `default:"128" placeholder:"N" help:"Elements of a head (128)."`
	Tokens         int      `default:"32768" placeholder:"N" help:"Tokens of a sequence (32768)."`
	Sequences      int      `placeholder:"N" help:"Sequences that take turns (as many as hold 1 GiB, at least 2)."`
	Layout         string   `enum:"nhd,hnd,packed,slots,contiguous" default:"hnd" help:"How the cache lies in memory: nhd, hnd, packed, slots or contiguous (hnd)."`
	DType          string   `name:"dtype" enum:"fp16,bf16,fp32,fp8" default:"fp16" help:"Element type of the cache: fp16, bf16, fp32 or fp8 (fp16)."`
	Workers        int      `placeholder:"N" help:"Goroutines that compute (all cores)."`
	Rounds         int      `default:"9" placeholder:"N" help:"Times that each config runs each sequence (9)."`
	ThroughService bool     `help:"Also time the way through the SDK and a daemon in this process."`
	Batch          int      `default:"16" placeholder:"N" help:"Sequences of a step on a GPU (16)."`
	PageSize       int      `default:"16" placeholder:"N" help:"Tokens of a page on a GPU (16)."`
	Layers         int      `placeholder:"N" help:"Layers that take turns on a GPU (as many as no cache holds, 16 at most)."`
	Armed          bool     `help:"On a GPU: what a layer costs armed and by messages, beyond its kernels, for 32 and 80 layers unless --layers says."`
	Markdown       bool     `xor:"form" help:"Print the tables as Markdown."`
	JSON           bool     `name:"json" xor:"form" help:"Print the report as JSON, and nothing else, on stdout."`
}

func (*benchCmd) Help() string {
	return `Times a decode layer, dense and by some configs, beside what the machine's memory and arithmetic allow:

    twilight bench
    twilight bench --config 'benchmark/configs/config_quest*.json' --tokens 8192 --through-service

Keys are normal, half of their variance shared by the 16 tokens of a chunk; the query heads of a group
correlate. A layer is one sequence's; sequences take turns, as configs and the machine's measurements do.
Figures are medians (least to most); speedups compare medians of the same round. Stages are the workers'
time, shared out among them. "of limit" is how much of a dense layer's time its bytes at the measured
read rate, or its operations at the measured dot rate, have to take.

With --device cuda a twilightd runs the layers, of an engine's memory on a GPU (twilight-engine, beside
twilight, then runs this), in fp16 and NHD pages:

    twilight bench --device cuda --target unix:///tmp/tw.sock --kv-heads 8 --group 4 --batch 64

"device" is the time between a layer's first and last kernel by the device's events, "service" what the engine
waits for a layer, tensors in lent memory, a message each, and "declare" what it waits for the step's batch, once
for all layers; "of read" is the bytes that a layer has to read over its time, as a share of the measured read
rate. The true mass is that of 16 query heads of a layer.

With --armed the table tells what a layer costs the engine beyond the device's own time, by messages
and armed, under the last config:

    twilight bench --device cuda --armed --target unix:///tmp/tw.sock --batch 2 --tokens 4096`
}

// benchConfig is a Twilight config and its name in the table.
type benchConfig struct {
	name, config string
	session      *client.Session // on the way through the service
}

// builtIn are the configs that are timed unless others are named; candidates are a quarter of the tokens.
var builtIn = []benchConfig{
	{name: "full, INT4, top_p 0.95", config: `{"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`},
	{name: "quest, no pruner", config: `{"selector": {"type": "quest", "sparsity_rate": 0.25}}`},
	{name: "quest, INT4, top_p 0.95", config: `{"selector": {"type": "quest", "sparsity_rate": 0.25},
		"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`},
}

// benchReport is what bench prints as JSON.
type benchReport struct {
	Machine bench.Machine `json:"machine"`
	Shape   bench.Shape   `json:"shape"`
	*bench.Report
}

func (c *benchCmd) Run(ctx context.Context, term *terminal, source *gpuSource) (err error) {
	onGPU, err := c.onGPU(source)
	if err != nil {
		return err
	}
	if onGPU {
		return c.runOnGPU(ctx, term, source)
	}
	if c.Armed {
		return fmt.Errorf("--armed times the streams of a GPU: give --device cuda")
	}
	shape, err := c.shape()
	if err != nil {
		return err
	}
	configs, err := c.configs()
	if err != nil {
		return err
	}
	all, err := methods.New()
	if err != nil {
		return err
	}
	workers := cmp.Or(c.Workers, runtime.GOMAXPROCS(0))
	device := host.New(host.Options{Methods: all, Workers: workers})
	defer func() { err = errors.Join(err, device.Close()) }()
	bar := newProgress(term.err)
	defer bar.clear()
	bar.show("bench: making %d sequences", shape.Sequences)
	data, err := bench.NewData(shape)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, data.Close()) }()

	var conn *client.Client
	if c.ThroughService {
		var stop func() error
		if conn, stop, err = serveHere(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
		defer func() {
			for i := range configs {
				if s := configs[i].session; s != nil {
					err = errors.Join(err, s.Close())
				}
			}
		}()
	}
	contenders := make([]bench.Contender, len(configs))
	for i := range contenders {
		bar.show("bench: %d of %d configs index", i+1, len(configs))
		if err := configs[i].contend(ctx, &contenders[i], device, conn, data); err != nil {
			return fmt.Errorf("%s: %w", configs[i].name, err)
		}
	}
	report, err := bench.Run(ctx, data, contenders, workers, c.Rounds, func(done int) {
		bar.show("bench: %d of %d rounds", done, c.Rounds)
	})
	if err != nil {
		return err
	}
	bar.clear()
	r := benchReport{bench.ThisMachine(device.Info().Name), shape, report}
	if c.JSON {
		return printJSON(term.out, r)
	}
	r.print(term.out, c.Markdown)
	return nil
}

func (c *benchCmd) shape() (bench.Shape, error) {
	s := bench.Shape{
		KVHeads: c.KVHeads, Group: c.Group, Dim: c.Dim, Tokens: c.Tokens, Sequences: c.Sequences,
		Layout: layout.Kind(c.Layout),
	}
	for _, flag := range []struct {
		name  string
		value int
	}{
		{"kv-heads", c.KVHeads}, {"group", c.Group}, {"dim", c.Dim}, {"tokens", c.Tokens}, {"rounds", c.Rounds},
	} {
		if flag.value < 1 {
			return s, fmt.Errorf("--%s is %d: give at least 1", flag.name, flag.value)
		}
	}
	var err error
	if s.DType, err = kv.ParseDType(c.DType); err != nil {
		return s, err
	}
	if s.Sequences < 1 {
		s.Sequences = max(2, 1<<30/s.Bytes())
	}
	return s, nil
}

// configs are dense attention and those asked for.
func (c *benchCmd) configs() ([]benchConfig, error) {
	configs := []benchConfig{{name: "dense", config: "{}"}}
	if len(c.Config) == 0 {
		return append(configs, builtIn...), nil
	}
	for _, glob := range c.Config {
		files, err := filepath.Glob(glob)
		if err != nil {
			return nil, fmt.Errorf("--config %s: %w", glob, err)
		}
		if len(files) == 0 {
			return nil, fmt.Errorf("--config %s: no such file", glob)
		}
		for _, file := range files {
			config, err := readConfig(file, replay.Overrides{}, fromFiles)
			if err != nil {
				return nil, err
			}
			configs = append(configs, benchConfig{name: strings.TrimSuffix(filepath.Base(file), ".json"), config: config})
		}
	}
	return configs, nil
}

// contend makes a contender of the config. What it takes is given back with the device and the session.
func (b *benchConfig) contend(
	ctx context.Context, c *bench.Contender, device *host.Device, conn *client.Client, data *bench.Data,
) error {
	all, err := methods.New()
	if err != nil {
		return err
	}
	cfg, err := all.Parse([]byte(b.config))
	if err != nil {
		return err
	}
	c.Name = b.name
	if c.ReadBytes, err = bench.ReadBytes(cfg, &data.Shape); err != nil {
		return err
	}
	if c.Runner, err = bench.NewDevice(ctx, device, cfg, data); err != nil || conn == nil {
		return err
	}
	g := data.Geometry()
	b.session, err = conn.Open(ctx, client.OpenOptions{EngineName: "twilight bench", Config: b.config, Geometry: client.Geometry{
		Layers: g.Layers, QueryHeads: g.QueryHeads, KVHeads: g.KVHeads, KDim: g.KDim, VDim: g.VDim, Scale: g.Scale,
		Query: g.Query, Output: g.Output,
	}})
	if err != nil {
		return err
	}
	c.Service, err = newThroughService(ctx, b.session, data)
	return err
}

func (r *benchReport) print(w io.Writer, markdown bool) {
	m, s := &r.Machine, &r.Shape
	fmt.Fprintf(w, "%s, %d workers, %s, last cache %s, load %s\n", m.CPU, r.Workers, m.Kernel, bytesText(m.CacheBytes), m.Load)
	fmt.Fprintf(w, "%d sequences of %d tokens, %d KV heads, group %d, dim %d, %v, %s: %s of keys and values\n",
		s.Sequences, s.Tokens, s.KVHeads, s.Group, s.Dim, s.DType, s.Layout, bytesText(uint64(s.Sequences*s.Bytes())))
	bound := "arithmetic"
	if r.MemoryBound {
		bound = "memory"
	}
	fmt.Fprintf(w, "reads %s GB/s, multiplies %s Gflop/s\n", spread(r.ReadRate, 1e9), spread(r.DotRate, 1e9))
	fmt.Fprintf(w, "a dense layer is %.1f MB and %.2f Gflop, at least %.2f ms, bound by %s: dense reaches %.0f%% of the limit\n\n",
		r.DenseBytes/1e6, r.DenseOperations/1e9, r.LimitMilliseconds, bound, 100*r.LimitShare)

	t := &table{text: 1, header: []string{
		"config", "ms", "speedup", "select", "prune", "attend", "candidates", "kept", "MB read", "GB/s", "allocs/row",
	}}
	through := r.Results[0].Service != nil
	if through {
		t.header = append(t.header, "ms through service")
	}
	for _, run := range r.Results {
		row := []string{
			run.Name, spread(run.Milliseconds, 1), spread(run.Speedup, 1),
			fmt.Sprintf("%.2f", run.Stages.Select), fmt.Sprintf("%.2f", run.Stages.Prune), fmt.Sprintf("%.2f", run.Stages.Attend),
			tokens(run.Candidates), tokens(run.Kept),
			fmt.Sprintf("%.2f", run.ReadBytes/1e6), fmt.Sprintf("%.1f", run.ReadBytes/1e6/run.Milliseconds.Median),
			fmt.Sprintf("%.2f", run.AllocsPerRow),
		}
		if through {
			row = append(row, spread(*run.Service, 1))
		}
		t.add(row...)
	}
	if markdown {
		t.markdown(w)
	} else {
		t.print(w)
	}
}

// spread is a median (least to most) in units.
func spread(s bench.Spread, unit float64) string {
	return fmt.Sprintf("%.2f (%.2f-%.2f)", s.Median/unit, s.Min/unit, s.Max/unit)
}

// throughService runs layers as an engine does.
type throughService struct {
	data          *bench.Data
	cache         *client.Cache
	query, output *client.Buffer
}

var _ bench.Runner = (*throughService)(nil)

// newThroughService lends data to a daemon and has it indexed.
func newThroughService(ctx context.Context, session *client.Session, data *bench.Data) (*throughService, error) {
	g := data.Geometry()
	t := &throughService{data: data}
	lent, err := session.ShareFD(ctx, client.Share{FD: data.FD, Size: int(data.Layout.Size()), Access: client.ReadOnly})
	if err != nil {
		return nil, err
	}
	if t.query, err = session.NewBuffer(ctx, g.QueryHeads*g.KDim*g.Query.Size(), client.ReadOnly); err != nil {
		return nil, err
	}
	if t.output, err = session.NewBuffer(ctx, g.QueryHeads*g.VDim*g.Output.Size(), client.ReadWrite); err != nil {
		return nil, err
	}
	l := data.Layout
	t.cache, err = session.RegisterCache(ctx, client.CacheSpec{
		DType: l.DType, PageSize: l.PageSize, NumPages: l.NumPages,
		K: client.Strides{Page: int(l.K.Page), Head: int(l.K.Head), Token: int(l.K.Token)},
		V: client.Strides{Page: int(l.V.Page), Head: int(l.V.Head), Token: int(l.V.Token)},
		Layers: []client.CacheLayer{{
			Layer: bench.Layer,
			K:     client.Location{Buffer: lent, Offset: int(l.KOffset(0))},
			V:     client.Location{Buffer: lent, Offset: int(l.VOffset(0))},
		}},
	})
	if err != nil {
		return nil, err
	}
	for s := range data.Tables {
		if _, err := t.cache.Step(ctx, t.batch(s, true)); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func (t *throughService) batch(sequence int, indexOnly bool) client.Batch {
	return client.Batch{
		Sequences: []client.Sequence{{ID: uint64(sequence + 1), Len: t.data.Tokens, Table: t.data.Tables[sequence]}},
		IndexOnly: indexOnly,
	}
}

// Run implements bench.Runner. The step that goes before the layer is not timed.
func (t *throughService) Run(ctx context.Context, sequence int) (bench.Sample, error) {
	step, err := t.cache.Step(ctx, t.batch(sequence, false))
	if err != nil {
		return bench.Sample{}, err
	}
	copy(t.query.Bytes(), t.data.Query(sequence))
	start := time.Now()
	_, err = step.Layer(ctx, client.Layer{
		Layer:   bench.Layer,
		QueryAt: &client.Tensor{Location: client.Location{Buffer: t.query}},
		Output:  &client.Tensor{Location: client.Location{Buffer: t.output}},
	})
	return bench.Sample{Wall: time.Since(start)}, err
}
