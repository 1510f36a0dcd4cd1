package gputest

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// armedEngine is an engine that arms its steps: the engine's side of proto/twilight/v1/ARMED.md. Words
// and tensors lie where they lie in every step, as those of a captured graph do.
type armedEngine struct {
	*engine
	t      testing.TB
	memory Buffer // words, queries, outputs, lists
	words  Ringer
	shared gpu.Memory
	rows   int // room in each tensor
	ids    uint32

	mu      sync.Mutex
	results map[uint32]chan armedOutcome
}

// armedOutcome is a copy of an ArmedResult.
type armedOutcome struct {
	err    error
	layers []*gpu.LayerResult
}

func (s *suite) armedEngine(t testing.TB, setup setup) *armedEngine {
	t.Helper()
	if !s.info.ArmedSteps {
		t.Skip("the device arms no steps")
	}
	e := &armedEngine{engine: s.engine(t, setup), t: t, rows: setup.shape.Sequences, results: make(map[uint32]chan armedOutcome)}
	size := e.at(e.geometry.Layers, 0)
	e.memory = s.memory.Alloc(t, size)
	var ok bool
	if e.words, ok = e.memory.(Ringer); !ok {
		t.Fatal("the device arms steps, but the suite's memory rings no words")
	}
	e.shared = must(e.lease.Import(t.Context(), e.memory.Region(t, size, true)))(t)
	return e
}

// The words, by offset.
func (e *armedEngine) status() int      { return 0 }
func (e *armedEngine) ready(i int) int  { return 4 * (1 + i) }
func (e *armedEngine) ringed(i int) int { return 4 * (1 + e.geometry.Layers + i) }
func (e *armedEngine) stepWord() int    { return 4 * (1 + 2*e.geometry.Layers) }
func (e *armedEngine) querySize() int {
	return e.geometry.QueryHeads * e.geometry.KDim * e.geometry.Query.Size()
}

func (e *armedEngine) outputSize() int {
	return e.geometry.QueryHeads * e.geometry.VDim * e.geometry.Output.Size()
}
func (e *armedEngine) listRows() int        { return e.rows * e.geometry.QueryHeads }
func (e *armedEngine) span(at int) gpu.Span { return gpu.Span{Memory: e.shared, Offset: uint64(at)} }

// at is the offset of a layer's query (0), output (1), lists (2) and counts (3).
func (e *armedEngine) at(layer, part int) int {
	sizes := []int{e.rows * e.querySize(), e.rows * e.outputSize(), 4 * e.listRows() * e.tokens, 4 * e.listRows()}
	one := 0
	for i := range sizes {
		sizes[i] = (sizes[i] + 63) &^ 63
		one += sizes[i]
	}
	at := 4096 + layer*one
	for _, size := range sizes[:part] {
		at += size
	}
	return at
}

// describe is a step of all layers, to be armed.
func (e *armedEngine) describe(step *kv.Step) *gpu.ArmedStep {
	e.ids++
	ended := make(chan armedOutcome, 1)
	e.mu.Lock()
	e.results[e.ids] = ended
	e.mu.Unlock()
	a := &gpu.ArmedStep{
		ID: e.ids, Begun: e.span(e.stepWord()), Status: e.span(e.status()), Step: step, WaitTimeout: patience,
		Done: func(r *gpu.ArmedResult) {
			outcome := armedOutcome{err: r.Err}
			for i := range r.Layers {
				outcome.layers = append(outcome.layers, copyResult(&r.Layers[i]))
			}
			ended <- outcome
		},
	}
	for i, model := range e.models {
		a.Layers = append(a.Layers, gpu.ArmedLayer{
			Layer: model, Ready: e.span(e.ready(i)), Done: e.span(e.ringed(i)),
			Query:  gpu.Tensor{Memory: e.shared, Offset: uint64(e.at(i, 0))},
			Output: gpu.Tensor{Memory: e.shared, Offset: uint64(e.at(i, 1))},
			ListBuffer: &gpu.ListBuffer{
				Lists: e.span(e.at(i, 2)), Counts: e.span(e.at(i, 3)), Capacity: e.tokens,
			},
		})
	}
	return a
}

func copyResult(r *gpu.LayerResult) *gpu.LayerResult {
	c := *r
	c.Candidates, c.Kept = slices.Clone(r.Candidates), slices.Clone(r.Kept)
	c.Paths, c.Reasons = slices.Clone(r.Paths), slices.Clone(r.Reasons)
	c.Truncated = slices.Clone(r.Truncated)
	c.Mass, c.Coverage = slices.Clone(r.Mass), slices.Clone(r.Coverage)
	return &c
}

// arm arms a step and returns its id.
func (e *armedEngine) arm(step *kv.Step) uint32 {
	e.t.Helper()
	a := e.describe(step)
	if err := e.cache.Arm(e.t.Context(), a); err != nil {
		e.t.Fatal(err)
	}
	return a.ID
}

// begin is what starts the replay of an armed step.
func (e *armedEngine) begin(id uint32) {
	for at := e.status(); at < e.stepWord(); at += 4 {
		e.words.Store(at, 0)
	}
	e.words.Ring(e.stepWord(), id)
}

// ring puts a layer's queries in place and rings.
func (e *armedEngine) ring(i int, rows []seq) {
	e.memory.Write(e.at(i, 0), e.request(i, rows).Query.Inline)
	e.words.Ring(e.ready(i), 1)
}

// wait waits for a layer.
func (e *armedEngine) wait(i int) {
	e.t.Helper()
	if !e.words.Await(e.ringed(i), 1, patience) {
		e.t.Fatalf("layer %d is not done", i)
	}
}

// read takes the outputs and lists of a layer into its result.
func (e *armedEngine) read(i int, rows []seq, r *gpu.LayerResult) {
	r.Output = make([]byte, len(rows)*e.outputSize())
	e.memory.Read(e.at(i, 1), r.Output)
	r.Lists = nil
	word := make([]byte, 4)
	for row, kept := range r.Kept {
		e.memory.Read(e.at(i, 3)+4*row, word)
		if n := little(word); n != kept {
			e.t.Errorf("layer %d, list row %d: %d tokens kept, %d listed", i, row, kept, n)
			return
		}
		list := make([]byte, 4*kept)
		e.memory.Read(e.at(i, 2)+4*row*e.tokens, list)
		for j := range kept {
			r.Lists = append(r.Lists, int32(little(list[4*j:])))
		}
	}
}

func little(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// outcome waits until a step is answered.
func (e *armedEngine) outcome(id uint32) armedOutcome {
	e.t.Helper()
	e.mu.Lock()
	ended := e.results[id]
	e.mu.Unlock()
	select {
	case o := <-ended:
		return o
	case <-time.After(patience):
		e.t.Fatalf("step %d is not answered", id)
		return armedOutcome{}
	}
}

// finished is outcome for a step that must have succeeded, whose outputs are still in place.
func (e *armedEngine) finished(id uint32, rows []seq) []*gpu.LayerResult {
	e.t.Helper()
	o := e.outcome(id)
	if status := e.words.Load(e.status()); o.err != nil || status != 0 || len(o.layers) != e.geometry.Layers {
		e.t.Fatalf("step %d: status %d, %d layers, error %v", id, status, len(o.layers), o.err)
	}
	for i, r := range o.layers {
		e.read(i, rows, r)
	}
	return o.layers
}

// replay runs all layers of an armed step.
func (e *armedEngine) replay(id uint32, rows []seq) []*gpu.LayerResult {
	e.t.Helper()
	e.begin(id)
	for i := range e.geometry.Layers {
		e.ring(i, rows)
		e.wait(i)
	}
	return e.finished(id, rows)
}

// failed fails the test unless a step failed by a kind, and, if it had begun, released every layer with
// NaN in the outputs of those that were not done.
func (e *armedEngine) failed(id uint32, kind fault.Kind, field string, begun bool, done, rows int) {
	e.t.Helper()
	o := e.outcome(id)
	refused(e.t, o.err, kind, field)
	if len(o.layers) != done {
		e.t.Errorf("%d layers were done, want %d", len(o.layers), done)
	}
	if !begun {
		return
	}
	if status := e.words.Load(e.status()); status != kind.Code() {
		e.t.Errorf("status is %d, want %d (%v)", status, kind.Code(), kind)
	}
	for i := range e.geometry.Layers {
		e.wait(i)
		data, values := make([]byte, rows*e.outputSize()), make([]float32, rows*e.geometry.QueryHeads*e.geometry.VDim)
		e.memory.Read(e.at(i, 1), data)
		e.geometry.Output.Decode(values, data)
		poisoned := !slices.ContainsFunc(values, func(x float32) bool { return !math.IsNaN(float64(x)) })
		if poisoned != (i >= done) {
			e.t.Errorf("layer %d of which %d are done: poisoned is %v", i, done, poisoned)
		}
	}
}

// testArmed holds armed steps against messages, at several shapes.
func testArmed(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		for name, config := range map[string]string{
			"quest": quest, "per query head": questPerHead, "all": keepAll,
			"remembering": `{"skip_first_two_layers": false, "selector": {"type": "h2o", "token_budget": 100}}`,
			"carrying":    `{"skip_first_two_layers": false, "selector": {"type": "tidal_decode", "token_budget": 100, "reselection_layers": [0]}}`,
		} {
			t.Run(name, func(t *testing.T) {
				setup := setup
				setup.config = config
				e := s.armedEngine(t, setup)
				plain := s.engine(t, setup)
				for n := 300; n < 306; n++ {
					rows := []seq{{0, n, 0}, {2, 0, 0}, {1, n - 100, 3}}
					same(t, "armed", plain.decode(rows...), e.replay(e.arm(e.batch(rows...)), rows))
				}
				// And by messages again, in between.
				rows := []seq{{0, 310, 0}}
				same(t, "after armed steps", plain.decode(rows...), e.decode(rows...))
				same(t, "armed again", plain.decode(rows...), e.replay(e.arm(e.batch(rows...)), rows))
			})
		}
	})
}

// testArmedHistory runs a random history, armed and by messages: both give the same bits. The next step
// is armed before, while or after one runs, and replays that nobody armed come in between.
func testArmedHistory(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		setup.geometry.Layers, setup.models = 4, []int{0, 2, 3, 9}
		e, plain := s.armedEngine(t, setup), s.engine(t, setup)
		r := seeded(11, uint64(setup.shape.PageSize))
		lengths := make([]int, len(e.keys)) // of live sequences
		type planned struct {
			rows  []seq
			step  *kv.Step
			write func()
		}
		plan := func() planned {
			var p planned
			var truncate []int32
			var ended []uint64
			var writes []func(*armedEngine)
			for _, i := range r.Perm(len(lengths))[:1+r.IntN(len(lengths))] {
				to, kept := int32(-1), lengths[i]
				if r.IntN(8) == 0 {
					p.rows, truncate = append(p.rows, seq{i, 0, 0}), append(truncate, to)
					if kept > 0 {
						ended = append(ended, uint64(i+1)) // and a void row of the same name
					}
					lengths[i] = 0
					continue
				}
				switch {
				case kept > 0 && r.IntN(6) == 0 || kept >= e.tokens: // rolled back
					kept = r.IntN(kept)
					to = int32(kept)
				case kept > 0 && r.IntN(10) == 0: // over, and another starts on its pages
					ended = append(ended, uint64(i+1))
					kept = 0
				}
				if to == 0 { // nothing is left to roll back to
					to, ended = -1, append(ended, uint64(i+1))
				}
				lengths[i] = min(e.tokens, kept+1+r.IntN(20))
				p.rows, truncate = append(p.rows, seq{i, lengths[i], 0}), append(truncate, to)
				by, length := r.IntN(len(lengths)), lengths[i]
				writes = append(writes, func(*armedEngine) {
					for _, x := range []*engine{e.engine, plain} {
						x.replace(i, by, kept, length)
					}
				})
			}
			p.step = e.batch(p.rows...)
			p.step.TruncateTo, p.step.Ended = truncate, ended
			p.write = func() {
				for _, w := range writes {
					w(e)
				}
			}
			return p
		}
		next := plan()
		id := e.arm(next.step)
		for range s.historySteps {
			now, nowID := next, id
			now.write()
			early := r.IntN(e.geometry.Layers + 2)
			armNext := func(at int) {
				if at == early {
					next = plan()
					id = e.arm(next.step)
				}
			}
			armNext(0)
			e.begin(nowID)
			for i := range e.geometry.Layers {
				e.ring(i, now.rows)
				e.wait(i)
				armNext(1 + i)
			}
			if r.IntN(10) == 0 { // a replay that nobody armed: it passes its own waits
				for i := range e.geometry.Layers {
					e.words.Ring(e.ringed(i), 1)
					e.words.Ring(e.ready(i), 1)
				}
			}
			got := e.finished(nowID, now.rows)
			plain.step(now.step)
			same(t, "armed", plain.layers(now.rows...), got)
			armNext(1 + e.geometry.Layers)
		}
	})
}

// testArmedFailures fails steps at each point, and goes on after each.
func testArmedFailures(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}, {1, 300, 0}}
	e := s.armedEngine(t, standard())
	want := s.engine(t, standard()).decode(rows...)
	step := func() *kv.Step { return e.batch(rows...) }
	check := func() {
		t.Helper()
		same(t, "afterwards", want, e.replay(e.arm(step()), rows))
	}
	check()

	t.Run("cancelled", func(t *testing.T) {
		for done := -1; done <= 1; done++ { // layers; -1: not begun
			id := e.arm(step())
			behind := e.arm(step())
			if done >= 0 {
				e.begin(id)
			}
			for i := range done {
				e.ring(i, rows)
				e.wait(i)
			}
			e.cache.CancelArmed(id)
			e.failed(id, fault.Cancelled, "", done >= 0, max(done, 0), len(rows))
			e.failed(behind, fault.Cancelled, "", false, 0, len(rows))
			e.cache.CancelArmed(id) // which is over
			check()
		}
		id := e.arm(step())
		behind := e.arm(step())
		e.cache.CancelArmed(behind)
		same(t, "before a cancelled step", want, e.replay(id, rows))
		e.failed(behind, fault.Cancelled, "", false, 0, len(rows))
		check()
	})

	t.Run("timed out", func(t *testing.T) {
		const soon = 20 * time.Millisecond
		for done := -1; done <= 1; done++ {
			a := e.describe(step())
			a.WaitTimeout = soon
			if err := e.cache.Arm(t.Context(), a); err != nil {
				t.Fatal(err)
			}
			behind := e.arm(step())
			field := "armed.step"
			if done >= 0 {
				e.begin(a.ID)
				field = fmt.Sprintf("armed.layers[%d].ready", done)
			}
			for i := range done {
				e.ring(i, rows)
				e.wait(i)
			}
			e.failed(a.ID, fault.Deadline, field, done >= 0, max(done, 0), len(rows))
			e.failed(behind, fault.Cancelled, "", false, 0, len(rows))
			e.ring(max(done, 0), rows) // too late
			check()
		}
	})

	t.Run("bad query", func(t *testing.T) {
		id := e.arm(step())
		e.begin(id)
		e.memory.Write(e.at(0, 0), bytes.Repeat([]byte{0xff}, e.querySize())) // NaN
		e.words.Ring(e.ready(0), 1)
		e.failed(id, fault.Invalid, "armed.layers[0].query[0][0][0]", true, 0, len(rows))
		check()
	})

	t.Run("given up by the engine", func(t *testing.T) {
		id := e.arm(step())
		e.begin(id)
		e.words.Store(e.status(), fault.Deadline.Code())
		e.ring(0, rows)
		refused(t, e.outcome(id).err, fault.Cancelled, "armed.status")
		check()
	})

	t.Run("rung out of order", func(t *testing.T) {
		id := e.arm(step())
		e.begin(id)
		e.ring(1, rows)
		if e.words.Await(e.ringed(1), 1, 20*time.Millisecond) {
			t.Error("layer 1 was done before layer 0")
		}
		e.ring(0, rows)
		e.wait(0)
		e.wait(1)
		same(t, "out of order", want, e.finished(id, rows))
		check()
	})

	t.Run("rings that nobody waits for", func(t *testing.T) {
		for i := range e.geometry.Layers {
			e.words.Ring(e.ready(i), 1)
		}
		check()
		// A ring of a replay that has not begun the armed step.
		id := e.arm(step())
		e.words.Ring(e.ready(0), 1)
		e.words.Store(e.ringed(0), 0)
		if e.words.Await(e.ringed(0), 1, 20*time.Millisecond) {
			t.Error("a step ran that has not begun")
		}
		same(t, "after a ring too early", want, e.replay(id, rows))
	})
}

// testArmedRefusals asks for steps that cannot be armed.
func testArmedRefusals(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}}
	e := s.armedEngine(t, standard())
	want := s.engine(t, standard()).decode(rows...)
	for _, tc := range []struct {
		field string
		kind  fault.Kind
		edit  func(a *gpu.ArmedStep)
	}{
		{"step_id", fault.Invalid, func(a *gpu.ArmedStep) { a.ID = 0 }},
		{"armed.wait_timeout_ms", fault.OutOfRange, func(a *gpu.ArmedStep) { a.WaitTimeout = gpu.MaxWaitTimeout + 1 }},
		{"armed.step.offset", fault.Invalid, func(a *gpu.ArmedStep) { a.Begun.Offset++ }},
		{"armed.step.offset", fault.OutOfRange, func(a *gpu.ArmedStep) { a.Begun.Offset = e.shared.Size() }},
		{"armed.status", fault.Permission, func(a *gpu.ArmedStep) { a.Status = gpu.Span{Memory: e.lent} }},
		{"armed.status", fault.NotFound, func(a *gpu.ArmedStep) { a.Status = gpu.Span{} }},
		{"armed.layers[1].ready.offset", fault.OutOfRange, func(a *gpu.ArmedStep) { a.Layers[1].Ready.Offset = math.MaxUint64 - 3 }},
		{"armed.layers[1].done.offset", fault.Invalid, func(a *gpu.ArmedStep) { a.Layers[1].Done.Offset += 2 }},
		{"armed.layers[1].layer", fault.NotFound, func(a *gpu.ArmedStep) { a.Layers[1].Layer = 77 }},
		{"armed.layers[1].layer", fault.Invalid, func(a *gpu.ArmedStep) { a.Layers[1].Layer = a.Layers[0].Layer }},
		{"armed.layers[0].query.at.offset", fault.OutOfRange, func(a *gpu.ArmedStep) { a.Layers[0].Query.Offset = e.shared.Size() }},
		{"armed.layers[0].output.at", fault.Permission, func(a *gpu.ArmedStep) { a.Layers[0].Output = gpu.Tensor{Memory: e.lent} }},
		{"armed.layers[0].lists.capacity", fault.Invalid, func(a *gpu.ArmedStep) { a.Layers[0].ListBuffer.Capacity = 0 }},
		{"lengths[0]", fault.Exhausted, func(a *gpu.ArmedStep) { a.Step.Lengths[0] = math.MaxInt32 }},
		{"table.entries[0]", fault.OutOfRange, func(a *gpu.ArmedStep) { a.Step.TableEntries[0] = math.MaxInt32 }},
	} {
		for _, busy := range []bool{false, true} { // alone, and behind another
			var before uint32
			if busy {
				before = e.arm(e.batch(rows...))
			}
			a := e.describe(e.batch(rows...))
			tc.edit(a)
			err := e.cache.Arm(t.Context(), a)
			var f *fault.Error
			if ok := asFault(err, &f); !ok || f.Kind != tc.kind && tc.field != "lengths[0]" || f.Field != tc.field {
				t.Errorf("%v: want %v at %s", err, tc.kind, tc.field)
			}
			if busy {
				same(t, "before a refused step", want, e.replay(before, rows))
			}
		}
	}

	first, second := e.arm(e.batch(rows...)), e.arm(e.batch(rows...))
	refused(t, e.cache.Arm(t.Context(), e.describe(e.batch(rows...))), fault.Exhausted, "armed")
	refused(t, e.cache.Step(t.Context(), e.batch(rows...)), fault.Precondition, "step_id")
	refused(t, e.cache.Layer(t.Context(), e.request(0, rows), &gpu.LayerResult{}), fault.Precondition, "step_id")
	_, err := e.cache.Index(t.Context())
	refused(t, err, fault.Precondition, "step_id")
	refused(t, e.shared.Release(), fault.Precondition, "region_id")
	same(t, "first", want, e.replay(first, rows))
	same(t, "second", want, e.replay(second, rows))
}

// testArmedLifetimes closes things under armed steps.
func testArmedLifetimes(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}}
	for name, close := range map[string]func(e *armedEngine) error{
		"cache":  func(e *armedEngine) error { return e.cache.Close() },
		"lease":  func(e *armedEngine) error { return e.lease.Close() },
		"device": func(*armedEngine) error { return s.device.Close() },
	} {
		if name == "device" {
			continue // last
		}
		t.Run(name, func(t *testing.T) { armedClose(t, s, rows, close) })
	}
	t.Run("device", func(t *testing.T) {
		armedClose(t, s, rows, func(*armedEngine) error { return s.device.Close() })
	})
}

func armedClose(t *testing.T, s *suite, rows []seq, close func(e *armedEngine) error) {
	t.Helper()
	e := s.armedEngine(t, standard())
	id := e.arm(e.batch(rows...))
	behind := e.arm(e.batch(rows...))
	e.begin(id)
	e.ring(0, rows)
	e.wait(0)
	if err := close(e); err != nil {
		t.Error(err)
	}
	e.failed(id, fault.Unavailable, "", true, 1, len(rows))
	e.failed(behind, fault.Cancelled, "", false, 0, len(rows))
	refused(t, e.cache.Arm(t.Context(), e.describe(e.batch(rows...))), fault.Unavailable, "")
}

// testArmedNeighbours has engines that arm and never ring beside one that works, on leases of their own
// and on its own lease.
func testArmedNeighbours(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}}
	e := s.armedEngine(t, standard())
	want := s.engine(t, standard()).decode(rows...)
	silent := make([]*armedEngine, 8)
	for i := range silent {
		silent[i] = s.armedEngine(t, standard())
		id := silent[i].arm(silent[i].batch(rows...))
		if i%2 == 0 {
			silent[i].begin(id)
		}
	}
	beside := must(e.lease.NewCache(t.Context(), e.spec))(t)
	a := e.describe(e.batch(rows...))
	words := s.memory.Alloc(t, 4096)
	lent := must(e.lease.Import(t.Context(), words.Region(t, 4096, true)))(t)
	a.Begun, a.Status = gpu.Span{Memory: lent}, gpu.Span{Memory: lent, Offset: 4}
	if err := beside.Arm(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		same(t, "beside silent engines", want, e.replay(e.arm(e.batch(rows...)), rows))
	}
	plain := s.engine(t, standard())
	same(t, "by messages beside silent engines", want, plain.decode(rows...))
}

// testDeviceBatches arms steps whose batches the device reads when they begin: they give what the same
// batches give by message, and rows that are wrong harm nobody.
func testDeviceBatches(t *testing.T, s *suite) {
	if !s.info.DeviceBatch {
		t.Skip("the device reads no batches")
	}
	setup := standard()
	setup.config = unequalized
	e, plain := s.armedEngine(t, setup), s.engine(t, setup)
	size, numPages := setup.shape.PageSize, e.layout.NumPages
	stride := (e.tokens + size - 1) / size
	const lengthsAt, firstAt, tableAt, slotsAt = 0, 256, 512, 1 << 14
	memory := s.memory.Alloc(t, 1<<17)
	lent := must(e.lease.Import(t.Context(), memory.Region(t, 1<<17, false)))(t)
	span := func(at uint64) gpu.Span { return gpu.Span{Memory: lent, Offset: at} }
	describe := func(rows, slots int) *gpu.ArmedStep {
		a := e.describe(&kv.Step{Lengths: make([]int32, rows)})
		a.Step = nil
		a.Batch = &gpu.DeviceBatch{
			Rows: rows, Lengths: span(lengthsAt), FirstValid: span(firstAt), Table: span(tableAt), TableStride: stride,
			Slots: span(slotsAt), NumSlots: slots, MaxLength: e.tokens,
		}
		return a
	}
	arm := func(rows, slots int) uint32 {
		t.Helper()
		a := describe(rows, slots)
		if err := e.cache.Arm(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		return a.ID
	}
	put := func(at int, values ...int32) {
		for i, v := range values {
			memory.Write(at+4*i, []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)})
		}
	}
	slot := func(sequence, n int) int64 { return int64(e.tables[sequence][n/size])*int64(size) + int64(n%size) }
	// write puts a batch in place, and returns it as a message says it.
	write := func(rows []seq, slots []int64) *kv.Step {
		step := e.batch(rows...)
		step.Sequences, step.BySlots, step.Slots = nil, true, slots
		entries := step.TableEntries
		for b, row := range rows {
			put(lengthsAt+4*b, int32(row.length))
			put(firstAt+4*b, int32(row.first))
			n := int(step.TableCounts[b])
			put(tableAt+4*b*stride, entries[:n]...)
			entries = entries[n:]
		}
		for i, x := range slots {
			put(slotsAt+8*i, int32(x), int32(x>>32))
		}
		return step
	}

	// All tokens, then decode steps whose batch is armed before it is known, rows in any order.
	var slots []int64
	for sequence := range e.keys {
		for n := range 200 {
			slots = append(slots, slot(sequence, n))
		}
	}
	rows := []seq{{0, 200, 0}, {1, 200, 0}, {2, 200, 0}}
	next := arm(len(rows), len(slots))
	plain.step(write(rows, slots))
	want := plain.layers(rows...)
	same(t, "all tokens", want, e.replay(next, rows))
	for n := 201; n < 240; n++ {
		id := arm(3, 3)
		if n%2 == 0 {
			rows[0], rows[2] = rows[2], rows[0]
		}
		for i := range rows {
			rows[i].length = n
		}
		if n == 220 {
			rows[1].length = 0
		}
		slots := make([]int64, len(rows))
		for i, row := range rows {
			slots[i] = slot(row.sequence, n-1)
		}
		plain.step(write(rows, slots))
		same(t, fmt.Sprint("at length ", n), plain.layers(rows...), e.replay(id, rows))
	}

	// Wrong rows are void, and their neighbours what they are beside void rows.
	step := write(rows, []int64{-1})
	plain.step(step)
	whole := plain.layers(rows...)
	for name, spoil := range map[string]func(){
		"negative length": func() { put(lengthsAt+4, -1) },
		"length":          func() { put(lengthsAt+4, int32(e.tokens+1)) },
		"first":           func() { put(firstAt+4, int32(rows[1].length)) },
		"negative first":  func() { put(firstAt+4, -5) },
		"page":            func() { put(tableAt+4*stride, int32(numPages)) },
		"negative page":   func() { put(tableAt+4*stride+4, -1) },
	} {
		write(rows, []int64{-1})
		spoil()
		id := arm(len(rows), 1)
		got := e.replay(id, rows)
		heads := e.geometry.KVHeads
		for i, r := range got {
			for row := heads; row < 2*heads; row++ {
				if r.Paths[row] != pipeline.Void || r.Reasons[row] != pipeline.BadRow || r.Kept[row] != 0 {
					t.Errorf("%s: layer %d, row %d: path %d, reason %d, %d kept", name, i, row, r.Paths[row], r.Reasons[row], r.Kept[row])
				}
			}
			size := e.outputSize()
			if !bytes.Equal(r.Output[:size], whole[i].Output[:size]) || !bytes.Equal(r.Output[2*size:], whole[i].Output[2*size:]) ||
				bytes.ContainsFunc(r.Output[size:2*size], func(c rune) bool { return c != 0 }) {
				t.Errorf("%s: layer %d: outputs are not those beside a void row", name, i)
			}
		}
	}
	write(rows, []int64{int64(numPages * size)})
	id := arm(len(rows), 1)
	e.begin(id)
	e.failed(id, fault.OutOfRange, "device.slots.slots[0]", true, 0, len(rows))
	write(rows, []int64{-1})
	same(t, "afterwards", whole, e.replay(arm(len(rows), 1), rows))

	// Refusals.
	for _, tc := range []struct {
		field string
		kind  fault.Kind
		edit  func(b *gpu.DeviceBatch)
	}{
		{"device.batch", fault.Exhausted, func(b *gpu.DeviceBatch) { b.Rows = 0 }},
		{"device.batch", fault.Exhausted, func(b *gpu.DeviceBatch) { b.Rows = s.info.Limits.Batch + 1 }},
		{"device.max_length", fault.Exhausted, func(b *gpu.DeviceBatch) { b.MaxLength = math.MaxInt32 }},
		{"device.table_stride", fault.Invalid, func(b *gpu.DeviceBatch) { b.TableStride-- }},
		{"device.slots", fault.Invalid, func(b *gpu.DeviceBatch) { b.Slots = gpu.Span{} }},
		{"device.slots.offset", fault.OutOfRange, func(b *gpu.DeviceBatch) { b.NumSlots = math.MaxInt32 }},
		{"device.lengths.offset", fault.Invalid, func(b *gpu.DeviceBatch) { b.Lengths.Offset++ }},
		{"device.table", fault.NotFound, func(b *gpu.DeviceBatch) { b.Table = gpu.Span{} }},
	} {
		a := describe(len(rows), 1)
		tc.edit(a.Batch)
		refused(t, e.cache.Arm(t.Context(), a), tc.kind, tc.field)
	}
	first := arm(len(rows), 1)
	refused(t, e.cache.Arm(t.Context(), e.describe(e.batch(rows...))), fault.Precondition, "armed")
	refused(t, lent.Release(), fault.Precondition, "region_id")
	second := arm(len(rows), 1)
	same(t, "one", whole, e.replay(first, rows))
	same(t, "and the next", whole, e.replay(second, rows))
}
