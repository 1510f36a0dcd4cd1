package replay

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// sequence is the engine's name for the one sequence of a capture.
const sequence = 1

// Options say what to replay, and how the engine holds its cache. Capture is required.
type Options struct {
	Capture *capture.Capture
	// Config is a Twilight JSON config; "" takes the daemon's default.
	Config string
	// EngineName and Device are passed on to the daemon.
	EngineName, Device string
	// Memory is what is lent; shared memory if nil.
	Memory Memory

	Layout   layout.Kind  // NHD if empty
	PageSize int          // tokens; 16 if 0; slots and contiguous have their own
	DType    client.DType // F16 if 0
	// Seed shuffles the cache's pages.
	Seed uint64
	// Armed arms each step's layers, in place of a message a layer.
	Armed bool

	// Pace is the least time from a step to the next, for those who watch.
	Pace time.Duration
	// Tracer, if not nil, makes a span of each step, to which the daemon's hang.
	Tracer trace.Tracer

	// Progress, if not nil, is told after the prefill and after each step how much of all is done.
	Progress func(done, all int)
}

// engine is what an engine has: its cache and the buffers it talks through.
type engine struct {
	*Options
	session       *client.Session
	layout        *layout.Layout
	cache         *client.Cache
	kv            Buffer
	query, output Buffer
	lists         Buffer // of armed steps
	how           client.Arming
	words         Buffer          // of armed steps that a stream runs
	stream        client.Releaser // nil: none does
	prefill       Buffer          // what its observation holds; nil if none is sent
	table         []int32
	facts         Facts
}

// Run replays a capture. The daemon must run on this host.
func Run(ctx context.Context, c *client.Client, o Options) (*Report, error) {
	e, err := open(ctx, c, &o)
	if err != nil {
		return nil, err
	}
	defer e.session.Close()
	j := newJudge(o.Capture, &e.facts)
	if err := e.decode(ctx, j); err != nil {
		return nil, err
	}
	r := j.report()
	r.Config = json.RawMessage(e.session.Config())
	return r, nil
}

// open opens a session and lends it the capture's cache, still empty. It fills in o's defaults.
func open(ctx context.Context, c *client.Client, o *Options) (*engine, error) {
	o.Layout = cmp.Or(o.Layout, layout.NHD)
	o.PageSize = cmp.Or(o.PageSize, kv.ChunkTokens)
	o.DType = cmp.Or(o.DType, client.F16)
	if o.Tracer == nil {
		o.Tracer = noop.Tracer{}
	}
	if o.Memory == nil {
		o.Memory = sharedMemory{}
	}
	io := o.DType // an engine's activations; none has 8 bits here
	if io == client.F8E4M3 {
		io = client.F16
	}
	session, err := c.Open(ctx, client.OpenOptions{
		EngineName: cmp.Or(o.EngineName, "twilight replay"),
		Device:     o.Device,
		Config:     o.Config,
		Geometry: client.Geometry{
			Layers: len(o.Capture.Layers), QueryHeads: o.Capture.QueryHeads, KVHeads: o.Capture.KVHeads,
			KDim: o.Capture.KDim, VDim: o.Capture.VDim, Scale: float32(o.Capture.Scale),
			Query: io, Output: io,
		},
	})
	if err != nil {
		return nil, err
	}
	e := &engine{Options: o, session: session}
	if err := e.lend(ctx); err != nil {
		session.Close()
		return nil, err
	}
	return e, nil
}

// lend makes the cache and the buffers for queries and outputs, and lends them.
func (e *engine) lend(ctx context.Context) error {
	c := e.Capture
	shape := layout.Config{
		Kind: e.Layout, DType: e.DType,
		Layers: len(c.Layers), KVHeads: c.KVHeads, KDim: c.KDim, VDim: c.VDim,
		Sequences: 1, Tokens: c.Tokens(), PageSize: e.PageSize,
	}
	if e.DType == client.F8E4M3 {
		shape.KScales, shape.VScales = scales(c, (*capture.Capture).Keys), scales(c, (*capture.Capture).Values)
	}
	var err error
	if e.layout, err = layout.New(shape); err != nil {
		return err
	}
	pages := make([]int32, e.layout.NumPages)
	shuffled := rand.New(rand.NewPCG(e.Seed, 0)).Perm(len(pages)) //nolint:gosec // to be repeated, not to be guessed
	for i, p := range shuffled {
		pages[i] = int32(p)
	}
	e.table = e.layout.Tables(pages)[0]

	if e.kv, err = e.Memory.Lend(ctx, e.session, int(e.layout.Size()), client.ReadOnly); err != nil {
		return err
	}
	g := e.session.Geometry()
	tensors := 1 // that of the layer that runs
	if e.Armed {
		tensors = len(c.Layers)
	}
	if e.query, err = e.Memory.Lend(ctx, e.session, tensors*c.QueryHeads*c.KDim*g.Query.Size(), client.ReadOnly); err != nil {
		return err
	}
	if e.output, err = e.Memory.Lend(ctx, e.session, tensors*c.QueryHeads*c.VDim*g.Output.Size(), client.ReadWrite); err != nil {
		return err
	}
	if e.Armed {
		if err := e.describe(ctx); err != nil {
			return err
		}
	}
	if err := e.lendPrefill(ctx); err != nil {
		return err
	}
	spec := client.CacheSpec{
		DType: e.DType, PageSize: e.layout.PageSize, NumPages: e.layout.NumPages,
		K: strides(e.layout.K.Page, e.layout.K.Head, e.layout.K.Token),
		V: strides(e.layout.V.Page, e.layout.V.Head, e.layout.V.Token),
	}
	for i := range c.Layers {
		spec.Layers = append(spec.Layers, client.CacheLayer{
			Layer: c.Layers[i].Index,
			K:     client.Location{Buffer: e.kv.Lent(), Offset: int(e.layout.KOffset(i))}, KScales: shape.KScales,
			V: client.Location{Buffer: e.kv.Lent(), Offset: int(e.layout.VOffset(i))}, VScales: shape.VScales,
		})
	}
	if e.cache, err = e.session.RegisterCache(ctx, spec); err != nil {
		return err
	}
	e.facts = Facts{
		Tokens: c.Tokens(), QueryHeads: c.QueryHeads, KVHeads: c.KVHeads,
		DType: e.DType, CacheBytes: int(e.layout.Size()), Shadow: e.cache.Shadow(),
	}
	return nil
}

func strides(page, head, token uint64) client.Strides {
	return client.Strides{Page: int(page), Head: int(head), Token: int(token)}
}

// scales are those that bring each KV head's largest value, over all layers, to the largest of fp8.
func scales(c *capture.Capture, of func(c *capture.Capture, layer, kvHead int) []float32) []float32 {
	const largest = 448
	scales := make([]float32, c.KVHeads)
	for head := range scales {
		for layer := range c.Layers {
			for _, x := range of(c, layer, head) {
				scales[head] = max(scales[head], float32(math.Abs(float64(x)))/largest)
			}
		}
		if scales[head] == 0 {
			scales[head] = 1
		}
	}
	return scales
}

// decode prefills, then decodes step by step, each judged before the next.
func (e *engine) decode(ctx context.Context, j *judge) error {
	c := e.Capture
	if err := e.write(0, c.N); err != nil {
		return err
	}
	start := time.Now()
	if _, err := e.cache.Step(ctx, e.batch(c.N, true)); err != nil {
		return fmt.Errorf("prefill: %w", err)
	}
	e.facts.Prefill = time.Since(start)
	e.progress(1)
	for step := range c.Steps {
		next := time.After(e.Pace)
		if err := e.step(ctx, j, step); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
		if err := j.judge(step); err != nil {
			return fmt.Errorf("step %d: %w", step, err)
		}
		e.progress(2 + step)
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// step decodes one step, in a span of its own.
func (e *engine) step(ctx context.Context, j *judge, step int) error {
	c := e.Capture
	ctx, span := e.Tracer.Start(ctx, telemetry.SpanReplay, trace.WithAttributes(attribute.Int(telemetry.AttrReplayStep, step)))
	defer span.End()
	if err := e.write(c.N+step, c.N+step+1); err != nil {
		return err
	}
	if e.Armed && (step > 0 || e.prefill == nil) { // an observation goes by a message
		return e.decodeArmed(ctx, j, step)
	}
	return e.decodeByMessages(ctx, j, step)
}

// decodeByMessages runs a step whose token is in the cache, a message a layer.
func (e *engine) decodeByMessages(ctx context.Context, j *judge, step int) error {
	c, g := e.Capture, e.session.Geometry()
	start := time.Now()
	batch := e.batch(c.N+step+1, false)
	batch.Trace = client.TraceOf(ctx)
	declared, err := e.cache.Step(ctx, batch)
	if err != nil {
		return err
	}
	e.facts.Decode += time.Since(start)
	for layer := range c.Layers {
		result, err := e.layer(ctx, declared, step, layer)
		if err == nil {
			err = j.take(layer, result, g.DecodeOutput(nil, e.output.Bytes()[:c.QueryHeads*c.VDim*g.Output.Size()]))
		}
		if err != nil {
			return fmt.Errorf("layer %d: %w", c.Layers[layer].Index, err)
		}
	}
	return nil
}

func (e *engine) progress(done int) {
	if e.Progress != nil {
		e.Progress(done, 1+e.Capture.Steps)
	}
}

// write stores the tokens [from, to) of every layer, as the model's projections would.
func (e *engine) write(from, to int) error {
	for i := range e.Capture.Layers {
		l := &e.Capture.Layers[i]
		e.layout.Write(e.kv.Bytes(), i, e.table, l.K, l.V, from, to)
	}
	return e.kv.Push()
}

func (e *engine) batch(length int, indexOnly bool) client.Batch {
	return client.Batch{
		Sequences: []client.Sequence{{ID: sequence, Len: length, Table: e.table}},
		IndexOnly: indexOnly,
	}
}

// layer runs one layer; its output is then in e.output.
func (e *engine) layer(ctx context.Context, step *client.Step, s, layer int) (*client.LayerResult, error) {
	c, g := e.Capture, e.session.Geometry()
	g.EncodeQuery(e.query.Bytes()[:0], c.Layers[layer].Q[s*c.QueryHeads*c.KDim:][:c.QueryHeads*c.KDim])
	clear(e.output.Bytes())
	var observation *client.Observation
	var err error
	if s == 0 {
		observation, err = e.observe(layer)
	}
	if err := errors.Join(err, e.query.Push(), e.output.Push()); err != nil {
		return nil, err
	}
	start := time.Now()
	result, err := step.Layer(ctx, client.Layer{
		Layer:       c.Layers[layer].Index,
		QueryAt:     &client.Tensor{Location: client.Location{Buffer: e.query.Lent()}},
		Output:      &client.Tensor{Location: client.Location{Buffer: e.output.Lent()}},
		Lists:       true,
		Observation: observation,
	})
	e.facts.Decode += time.Since(start)
	return result, errors.Join(err, e.output.Pull())
}
