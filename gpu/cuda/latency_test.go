//go:build linux && cgo && cuda

package cuda

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

var (
	latency      = flag.Bool("latency", false, "print what meeting the engine costs a layer")
	latencySteps = flag.Int("latency-steps", 200, "steps of each row of that table")
)

// replayRequest is a step of the engine's side: all layers' queries, and words around each unless Bare.
type replayRequest struct {
	Tensors     engine.Tensors
	Keys        []int // offsets of planes to fill, V's behind
	Memory      int   // of the queries
	Queries     []int // their offsets
	Step        uint32
	Bare, Eager bool
	Until       int // layers that are rung; the next is waited for all the same. 0: all
}

// replayer is what the engine keeps of a kind of step.
type replayer struct {
	stream  *engine.Stream
	rest    *engine.Memory // what words are copied from
	queries []*engine.Queries
	graphs  map[bool]*engine.Graph // by Bare
}

var replayers = map[int]*replayer{}

// serveReplay is the engine's, which captures as proto/twilight/v1/ARMED.md says.
func serveReplay(device *engine.GPU, all map[int]*engine.Memory, req *engineRequest) (reply engineReply, fds []int, err error) {
	words, from := all[req.ID], &req.Replay
	if req.Op == "fill" {
		for i, at := range from.Keys {
			err = errors.Join(err, words.FillPlanes(&from.Tensors, at, at+from.Tensors.PlaneBytes(), uint64(i+1)))
		}
		return reply, nil, err
	}
	r := replayers[req.ID]
	layers := len(from.Queries)
	stepAt := 4 * (1 + 2*layers)
	if r == nil {
		r = &replayer{graphs: map[bool]*engine.Graph{}}
		replayers[req.ID] = r
		if r.stream, err = device.NewStream(); err != nil {
			return reply, nil, err
		}
		if r.rest, err = device.Alloc(gpu.CUDAIPC, stepAt+4, 0); err != nil {
			return reply, nil, err
		}
		for i, at := range from.Queries {
			q, err := r.stream.Queries(all[from.Memory], &from.Tensors, at, uint64(i+1))
			if err != nil {
				return reply, nil, err
			}
			r.queries = append(r.queries, q)
		}
	}
	body := func() error {
		if !from.Bare {
			err := errors.Join(r.stream.Copy(words, 0, r.rest, 0, stepAt), r.stream.Copy(words, stepAt, r.rest, stepAt, 4))
			if err != nil {
				return err
			}
		}
		for i, q := range r.queries {
			if err := q.Launch(); err != nil {
				return err
			}
			if from.Bare {
				continue
			}
			rings := []engine.Word{{Memory: words, Offset: 4 * (1 + i), Value: 1}}
			if from.Until > 0 && i >= from.Until {
				rings = nil
			}
			err := r.stream.Words(append(rings, engine.Word{Memory: words, Offset: 4 * (1 + layers + i), Value: 1, Wait: true})...)
			if err != nil {
				return err
			}
		}
		return nil
	}
	run := body
	if !from.Eager {
		g := r.graphs[from.Bare]
		if g == nil {
			if g, err = r.stream.Capture(body); err != nil {
				return reply, nil, err
			}
			r.graphs[from.Bare] = g
		}
		run = g.Launch
	}
	err = r.stream.Words(engine.Word{Memory: r.rest, Offset: stepAt, Value: from.Step})
	if err == nil {
		err = r.stream.Synchronize()
	}
	start := time.Now()
	err = errors.Join(err, run(), r.stream.Synchronize())
	reply.Took = time.Since(start)
	if err != nil || from.Bare {
		return reply, nil, err
	}
	word := make([]byte, 4)
	err = words.Read(0, word)
	reply.Status = uint32s(word)[0]
	return reply, nil, err
}

const meetingConfig = `{"skip_first_two_layers": false, "dense_below": 0, "selector": {"type": "quest", "token_budget": 1024},
	"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`

func meetingGeometry(layers int) kv.Geometry {
	return kv.Geometry{
		Layers: layers, QueryHeads: 32, KVHeads: 8, KDim: 128, VDim: 128, Scale: 1 / float32(math.Sqrt(128)),
		Query: kv.F16, QueryScale: 1, Output: kv.F16,
	}
}

// meeting is an engine and a cache that meet at words.
type meeting struct {
	t       *testing.T
	process *engineProcess
	words   *lent
	cache   *cache
	armed   gpu.ArmedStep
	request engineRequest
	step    kv.Step
	tokens  int
	batch   int
	ended   chan error
	close   func()
}

// newMeeting makes one of a geometry for batch sequences of so many tokens.
func newMeeting(t *testing.T, d *Device, process *engineProcess, g kv.Geometry, kind gpu.RegionKind, batch, tokens, room int) *meeting {
	t.Helper()
	const page = 16
	l, err := layout.New(layout.Config{
		Kind: layout.NHD, DType: kv.F16, Layers: g.Layers, KVHeads: g.KVHeads, KDim: g.KDim, VDim: g.VDim,
		Sequences: batch, Tokens: tokens + room, PageSize: page,
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := all.Parse([]byte(meetingConfig))
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	opened, err := d.Open(ctx, &g, cfg)
	if err != nil {
		t.Fatal(err)
	}
	lender := lender{kind: gpu.CUDAIPC, process: process}
	data := lender.Alloc(t, int(l.Size())).(*lent)
	each := (batch*g.QueryHeads*g.KDim*2 + 255) &^ 255
	tensors := lender.Alloc(t, 2*g.Layers*each).(*lent)
	lender.kind = kind
	words := lender.Alloc(t, 8*(g.Layers+1)).(*lent)
	closed := sync.OnceFunc(func() {
		if err := opened.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(closed)
	lend := func(b *lent, size int, writable bool) gpu.Memory {
		m, err := opened.Import(ctx, b.Region(t, size, writable))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	tables := make([][]int32, batch)
	pages := (tokens + room) / page
	m := &meeting{t: t, close: closed, process: words.engine, words: words, tokens: tokens, batch: batch, ended: make(chan error, 4)}
	fill := engineRequest{Op: "fill", ID: data.id}
	for b := range tables {
		for i := range pages {
			tables[b] = append(tables[b], int32(i*batch+b))
		}
		m.step.Sequences = append(m.step.Sequences, uint64(b+1))
	}
	fill.Replay.Tensors = engine.Tensors{PageSize: page, KVHeads: g.KVHeads, Dim: g.KDim, QueryHeads: g.QueryHeads, Tables: tables}
	for i := range g.Layers {
		fill.Replay.Keys = append(fill.Replay.Keys, int(l.KOffset(i)))
	}
	m.process.call(t, &fill)
	made, err := opened.NewCache(ctx, l.Spec(lend(data, int(l.Size()), false), 0))
	if err != nil {
		t.Fatal(err)
	}
	m.cache = made.(*cache)
	shared, meet := lend(tensors, 2*g.Layers*each, true), lend(words, 8*(g.Layers+1), true)
	at := func(word int) gpu.Span { return gpu.Span{Memory: meet, Offset: uint64(4 * word)} }
	m.armed = gpu.ArmedStep{Status: at(0), Begun: at(1 + 2*g.Layers), WaitTimeout: 10 * time.Second, Step: &m.step}
	m.armed.Done = func(r *gpu.ArmedResult) { m.ended <- r.Err }
	m.request = engineRequest{Op: "replay", ID: words.id, Replay: replayRequest{Memory: tensors.id, Tensors: fill.Replay.Tensors}}
	for i := range g.Layers {
		m.request.Replay.Queries = append(m.request.Replay.Queries, 2*i*each)
		m.armed.Layers = append(m.armed.Layers, gpu.ArmedLayer{
			Layer: i, Ready: at(1 + i), Done: at(1 + g.Layers + i),
			Query:  gpu.Tensor{Memory: shared, Offset: uint64(2 * i * each)},
			Output: gpu.Tensor{Memory: shared, Offset: uint64((2*i + 1) * each)},
		})
	}
	m.step.TableCounts = make([]uint32, batch)
	for b := range tables {
		m.step.TableEntries = append(m.step.TableEntries, tables[b]...)
		m.step.TableCounts[b] = uint32(pages)
	}
	m.step.Lengths = make([]int32, batch)
	return m
}

// next makes the step that has another token.
func (m *meeting) next() *kv.Step {
	m.tokens++
	for b := range m.step.Lengths {
		m.step.Lengths[b] = int32(m.tokens)
	}
	return &m.step
}

// known spares the steps that follow from naming tables again.
func (m *meeting) known() { m.step.TableCounts, m.step.TableEntries = nil, nil }

func (m *meeting) arm() {
	m.t.Helper()
	m.armed.ID++
	m.next()
	if err := m.cache.Arm(context.Background(), &m.armed); err != nil {
		m.t.Fatal(err)
	}
	m.known()
}

// replay lets the engine run a step, and returns how long it took it.
func (m *meeting) replay(id uint32, bare, eager bool) time.Duration {
	m.t.Helper()
	req := m.request
	req.Replay.Step, req.Replay.Bare, req.Replay.Eager = id, bare, eager
	reply, _ := m.process.call(m.t, &req)
	if reply.Status != 0 {
		m.t.Fatalf("step %d: status %d", id, reply.Status)
	}
	return reply.Took
}

func (m *meeting) end() {
	m.t.Helper()
	select {
	case err := <-m.ended:
		if err != nil {
			m.t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		m.t.Fatal("a step does not end")
	}
}

// pipelined arms each step while the one before runs.
func (m *meeting) pipelined(steps int, eager bool) (took []time.Duration) {
	m.t.Helper()
	m.arm()
	for range steps {
		id := m.armed.ID
		armed := make(chan struct{})
		go func() {
			defer close(armed)
			m.arm()
		}()
		took = append(took, m.replay(id, false, eager))
		<-armed
		m.end()
	}
	m.replay(m.armed.ID, false, eager)
	m.end()
	return took[min(len(took)-1, 5):]
}

// counted arms each step when the one before is over; the time to arm counts.
func (m *meeting) counted(steps int) (took []time.Duration) {
	m.t.Helper()
	for range steps {
		start := time.Now()
		m.arm()
		arming := time.Since(start)
		took = append(took, arming+m.replay(m.armed.ID, false, false))
		m.end()
	}
	return took[min(len(took)-1, 5):]
}

// bare is what the layers' kernels alone take, as one graph.
func (m *meeting) bare() time.Duration {
	m.t.Helper()
	c := m.cache
	l, g := c.lease, c.armed.graphs[len(c.armed.graphs)-1]
	for _, other := range c.armed.graphs {
		if other.used > g.used {
			g = other
		}
	}
	var ms []float64
	err := l.device.owner.do(context.Background(), func() error {
		c.batch.current = true
		graph, err := drv.Capture(l.stream, func() error {
			for j := range g.calls {
				c.call = g.calls[j]
				c.call.captured = true
				*(*kernels.Layer)(l.block.Pointer()) = c.call.desc
				if err := c.launch(j); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for range 20 {
			us, err := timed(l.stream, func() error { return graph.Launch(l.stream) })
			if err != nil {
				return err
			}
			ms = append(ms, us)
		}
		c.batch.current = false
		return graph.Destroy()
	})
	if err != nil {
		m.t.Fatal(err)
	}
	slices.Sort(ms)
	return time.Duration(ms[len(ms)/2] * float64(time.Microsecond))
}

// messages runs layers one by one, from this process.
func (m *meeting) messages(steps int) (took []time.Duration) {
	m.t.Helper()
	var res gpu.LayerResult
	for range steps {
		start := time.Now()
		if err := m.cache.Step(context.Background(), m.next()); err != nil {
			m.t.Fatal(err)
		}
		m.known()
		for i := range m.armed.Layers {
			layer := &m.armed.Layers[i]
			err := m.cache.Layer(context.Background(), &gpu.LayerRequest{Layer: i, Query: &layer.Query, Output: &layer.Output}, &res)
			if err != nil {
				m.t.Fatal(err)
			}
		}
		took = append(took, time.Since(start))
	}
	return took[min(len(took)-1, 5):]
}

// TestLatency prints what it costs a layer to meet the engine, beyond the kernels of both.
func TestLatency(t *testing.T) {
	if !*latency {
		t.Skip("no -latency")
	}
	d := newDevice(t)
	mps := "no MPS"
	if os.Getenv("CUDA_MPS_PIPE_DIRECTORY") != "" {
		mps = "MPS"
	}
	fmt.Printf("%s, %s: us a layer; %d steps each\n", d.name, mps, *latencySteps)
	fmt.Println("layers batch tokens  words   how                     step p50     p99  engine  kernels   added p50     p99")
	for _, layers := range []int{32, 80} {
		for _, kind := range []gpu.RegionKind{gpu.CUDAIPC, gpu.SharedMemory} {
			const batch, tokens = 2, 4096
			g := meetingGeometry(layers)
			m := newMeeting(t, d, nil, g, kind, batch, tokens, 8**latencySteps)
			m.messages(6) // which index and train
			m.pipelined(10, false)
			alone, engineAlone := m.bare(), []time.Duration{}
			for range 20 {
				engineAlone = append(engineAlone, m.replay(0, true, false))
			}
			name := cmp.Or(map[gpu.RegionKind]string{gpu.SharedMemory: "host"}[kind], "device")
			row := func(how string, took []time.Duration, engine time.Duration) {
				slices.Sort(took)
				us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) / float64(layers) }
				p50, p99 := took[len(took)/2], took[len(took)*99/100]
				fmt.Printf("%6d %5d %6d  %-6s  %-22s %9.1f %7.1f %7.1f %8.1f %11.1f %7.1f\n", layers, batch, tokens, name, how,
					us(p50), us(p99), us(engine), us(alone), us(p50-engine-alone), us(p99-engine-alone))
			}
			slices.Sort(engineAlone)
			engine := engineAlone[len(engineAlone)/2]
			row("armed, engine a graph", m.pipelined(*latencySteps, false), engine)
			row("armed, engine eager", m.pipelined(*latencySteps, true), engine)
			row("armed, arming counted", m.counted(*latencySteps), engine)
			if kind == gpu.CUDAIPC {
				row("by calls, no messages", m.messages(*latencySteps/4), 0)
			}
		}
	}
}
