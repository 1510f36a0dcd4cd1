package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/twilight-sidecar/twilight/client"
)

// StreamEngine is an engine whose GPU's streams run armed steps.
type StreamEngine interface {
	Engine
	// NewStream makes a stream that writes and waits for words of what loads lend.
	NewStream() (client.Releaser, error)
}

// ArmedOptions say what to time. All fields are required.
type ArmedOptions struct {
	Step   Step
	Config Named
	// Steps are timed of each way, behind a few that are not.
	Steps    int
	Progress func(format string, args ...any)
}

// ArmedReport is what it costs an engine to have a step's layers run by the daemon, times in microseconds a layer.
type ArmedReport struct {
	Device string `json:"device"`
	Step
	Config string `json:"config"`
	Steps  int    `json:"steps"`
	// Kernels is the device's own time, the median of the steps by messages.
	Kernels float64 `json:"kernels_us"`
	Ways    []Way   `json:"ways"`
}

// Way is how engine and daemon meet, and what a layer takes the engine beyond Kernels. The engine computes
// nothing between layers.
type Way struct {
	Name string  `json:"name"`
	P50  float64 `json:"added_p50_us"`
	P99  float64 `json:"added_p99_us"`
}

// warmSteps are not timed: they train, and make graphs.
const warmSteps = 10

// RunArmed times a step's layers by messages and armed. Its sequences do not grow.
func RunArmed(ctx context.Context, c *client.Client, engine StreamEngine, o ArmedOptions) (_ *ArmedReport, err error) {
	if o.Steps < 1 {
		return nil, fmt.Errorf("%d steps are to be timed: give at least 1", o.Steps)
	}
	l, err := o.Step.layout()
	if err != nil {
		return nil, err
	}
	o.Progress("bench: making %d layers", l.Layers)
	load, err := engine.Load(l)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, load.Close()) }()
	s, err := newStepper(ctx, c, engine, l, load, o.Config)
	if s != nil {
		defer func() { err = errors.Join(err, s.session.Close()) }() // before the memory goes
	}
	if err != nil {
		return nil, err
	}
	m := &meeting{stepper: s}
	if err := m.describe(ctx, engine); err != nil {
		return nil, err
	}
	r := &ArmedReport{Device: engine.Name(), Step: l.Step, Config: o.Config.Name, Steps: o.Steps}
	for _, way := range []struct {
		name string
		run  func(context.Context) (time.Duration, error)
	}{
		{"by messages, inline", func(ctx context.Context) (time.Duration, error) { return m.messages(ctx, true) }},
		{"by messages, shared buffers", func(ctx context.Context) (time.Duration, error) { return m.messages(ctx, false) }},
		{"armed, arming counted", m.counted},
		{"armed, pipelined", m.pipelined},
	} {
		o.Progress("bench: %s", way.name)
		took := make([]float64, 0, o.Steps)
		for i := range warmSteps + o.Steps {
			d, err := way.run(ctx)
			if err != nil {
				return nil, err
			}
			if i >= warmSteps {
				took = append(took, microseconds(d)/float64(l.Layers))
			}
		}
		slices.Sort(took)
		r.Ways = append(r.Ways, Way{way.name, took[len(took)/2], took[len(took)*99/100]})
	}
	r.Kernels = spread(m.kernels).Median
	for i := range r.Ways {
		r.Ways[i].P50 -= r.Kernels
		r.Ways[i].P99 -= r.Kernels
	}
	return r, m.end(ctx)
}

// meeting is a stepper that also meets the daemon at words.
type meeting struct {
	*stepper
	inline  []byte // queries
	stream  client.Releaser
	how     client.Arming
	next    *client.Armed // armed while the step before it ran
	kernels []float64     // of a layer, by steps
}

func (m *meeting) describe(ctx context.Context, engine StreamEngine) (err error) {
	m.inline = make([]byte, m.TensorBytes)
	if err = m.load.Read(m.Queries, m.inline); err != nil {
		return err
	}
	if m.how.Words, err = m.load.Lend(ctx, m.session, m.Words, client.WordBytes(m.Layers), client.ReadWrite); err != nil {
		return err
	}
	if m.how.Release, err = engine.NewStream(); err != nil {
		return err
	}
	if m.stream, err = engine.NewStream(); err != nil {
		return err
	}
	for i := range m.Layers {
		layer := m.layer(i)
		m.how.Layers = append(m.how.Layers, client.ArmedLayer{Layer: layer.Layer, Query: *layer.QueryAt, Output: *layer.Output})
	}
	return nil
}

// messages runs a step by a message a layer; inline, queries and outputs travel in it.
func (m *meeting) messages(ctx context.Context, inline bool) (time.Duration, error) {
	start := time.Now()
	step, err := m.cache.Step(ctx, m.batch())
	if err != nil {
		return 0, err
	}
	var kernels time.Duration
	for i := range m.Layers {
		layer := m.layer(i)
		if inline {
			layer.Query, layer.QueryAt, layer.Output = m.inline, nil, nil
		}
		r, err := step.Layer(ctx, layer)
		if err != nil {
			return 0, err
		}
		kernels += r.Timing.Index + r.Timing.Select + r.Timing.Prune + r.Timing.Attend
	}
	m.kernels = append(m.kernels, microseconds(kernels)/float64(m.Layers))
	return time.Since(start), nil
}

// counted arms a step and runs it.
func (m *meeting) counted(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	a, err := m.cache.Arm(ctx, m.batch(), m.how)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(m.give(a), m.stream.Synchronize()); err != nil {
		return 0, m.finish(ctx, a, err)
	}
	took := time.Since(start)
	return took, m.finish(ctx, a, nil)
}

// pipelined runs the step that is armed, and arms the next while it runs.
func (m *meeting) pipelined(ctx context.Context) (time.Duration, error) {
	var err error
	if m.next == nil {
		if m.next, err = m.cache.Arm(ctx, m.batch(), m.how); err != nil {
			return 0, err
		}
	}
	a := m.next
	start := time.Now()
	err = m.give(a)
	if err == nil {
		m.next, err = m.cache.Arm(ctx, m.batch(), m.how)
	}
	err = errors.Join(err, m.stream.Synchronize())
	took := time.Since(start)
	return took, m.finish(ctx, a, err)
}

// end runs the last step that was armed.
func (m *meeting) end(ctx context.Context) error {
	return m.finish(ctx, m.next, errors.Join(m.give(m.next), m.stream.Synchronize()))
}

// give gives the stream all layers of a step.
func (m *meeting) give(a *client.Armed) error {
	for i := range m.Layers {
		if err := errors.Join(a.Layer(i).ReadyOn(m.stream), a.Layer(i).WaitOn(m.stream)); err != nil {
			a.Cancel()
			return err
		}
	}
	return nil
}

// finish ends a step that the stream is through with.
func (m *meeting) finish(ctx context.Context, a *client.Armed, err error) error {
	var status [4]byte
	err = errors.Join(err, m.load.Read(m.Words, status[:]))
	return errors.Join(err, a.Finish(ctx, binary.LittleEndian.Uint32(status[:])))
}
