package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/armed"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// armer runs the armed steps of a cache, one after another, on a goroutine of its own. While that waits
// for a word it holds neither the lease's lock nor a worker, but a thread.
//
// A step that ends leaves the queue in the same hold of the lease's lock in which the last of its words
// is written: whoever has seen that word can arm another and release what this one used.
type armer struct {
	cache *cache
	more  chan struct{} // holds an item when there may be something to do

	// The lease's lock guards these.
	slots   [gpu.MaxArmed + 1]armedStep // for those armed, and one that ends
	running *armedStep                  // the queue's first, or one that has just left it
	ended   chan struct{}               // closed when the goroutine has ended; nil before the first step
	closed  bool

	// mu alone lets one cancel what runs, which has the lease's lock. To write, both are held, the lease's
	// first; to read, either.
	mu    sync.Mutex
	queue []*armedStep
	// ctx ends the layer that runs. It is renewed once it did.
	ctx    context.Context
	cancel context.CancelFunc

	// What follows belongs to the goroutine.
	begun   bool // the step that runs
	results []gpu.LayerResult
	answer  gpu.ArmedResult
}

// armedStep is an armed step. Its memory is reused.
type armedStep struct {
	id            uint32
	rows          int
	batch         kv.Step
	lent          lentBatch // where batch is read from, if its step was armed so
	begun, status *armed.Word
	words         [2]extent // of begun and status
	layers        []armedLayer
	timeout       time.Duration
	done          func(*gpu.ArmedResult)

	// cause, once set, ends the step; the first one counts. It has no lock, as waits look at it.
	cause   atomic.Pointer[fault.Error]
	waiting atomic.Pointer[armed.Word]
	stopped func() bool // is cause set
}

type armedLayer struct {
	ready, done   *armed.Word
	words         [2]extent
	query, output gpu.Tensor
	list          gpu.ListBuffer
	request       gpu.LayerRequest
	queryAt       extent
	outputAt      tensor
	lists, counts extent
}

func newArmer(c *cache) *armer {
	a := &armer{cache: c, more: make(chan struct{}, 1)}
	for i := range a.slots {
		s := &a.slots[i]
		s.stopped = func() bool { return s.cause.Load() != nil }
	}
	return a
}

// idle refuses what cannot be done while steps are armed.
func (a *armer) idle() error {
	if len(a.queue) > 0 {
		return fault.Newf(fault.Precondition, "step_id",
			"step %d of the cache is armed: wait for its end or cancel it", a.queue[0].id)
	}
	return nil
}

// uses tells whether an armed step does anything in m.
func (a *armer) uses(m *memory) bool {
	return slices.ContainsFunc(a.queue, func(s *armedStep) bool {
		uses := s.words[0].memory == m || s.words[1].memory == m || s.lent.uses(m)
		for i := range s.layers {
			l := &s.layers[i]
			for _, e := range [...]extent{l.words[0], l.words[1], l.queryAt, l.outputAt.extent, l.lists, l.counts} {
				uses = uses || e.memory == m
			}
		}
		return uses
	})
}

// Arm implements gpu.Cache.
func (c *cache) Arm(ctx context.Context, step *gpu.ArmedStep) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if err := c.usable(ctx); err != nil {
		return err
	}
	a := c.armed
	switch {
	case a.closed || c.lease.closed:
		return errClosed
	case len(a.queue) == gpu.MaxArmed:
		return fault.Exhaustedf("armed", 1, 0, "%d steps of the cache are armed: wait for the first to end", gpu.MaxArmed)
	}
	if err := spec.Armed(step); err != nil {
		return err
	}
	s := a.free()
	if err := c.fill(s, step); err != nil {
		return err
	}
	if step.Batch == nil {
		if err := a.declare(s, step.Step); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.queue = append(a.queue, s)
	if a.ended == nil {
		a.ended = make(chan struct{})
		a.ctx, a.cancel = context.WithCancel(context.Background())
		go a.work()
	}
	a.signal()
	return nil
}

// declare checks a step's batch, and makes it current unless another step still needs its own.
func (a *armer) declare(s *armedStep, step *kv.Step) error {
	declare := a.cache.declare
	if n := len(a.queue); n > 0 {
		if a.queue[n-1].lent.rows > 0 {
			return fault.Newf(fault.Precondition, "armed",
				"step %d, which is armed before, brings its batch when it begins: wait for its end", a.queue[n-1].id)
		}
		declare = a.cache.check
	}
	if err := declare(step); err != nil {
		return err
	}
	s.batch.Copy(step)
	return nil
}

func (a *armer) signal() {
	select {
	case a.more <- struct{}{}:
	default:
	}
}

// free is a slot that no step has.
func (a *armer) free() *armedStep {
	for i := range a.slots {
		if s := &a.slots[i]; s != a.running && !slices.Contains(a.queue, s) {
			return s
		}
	}
	return new(armedStep) // there is one more than steps
}

// fill checks all of a step but its batch.
func (c *cache) fill(s *armedStep, step *gpu.ArmedStep) (err error) {
	s.id, s.timeout, s.done = step.ID, cmp.Or(step.WaitTimeout, gpu.DefaultWaitTimeout), step.Done
	s.cause.Store(nil)
	s.waiting.Store(nil)
	if s.begun, s.words[0], err = c.lease.word(step.Begun, "armed.step"); err != nil {
		return err
	}
	if s.status, s.words[1], err = c.lease.word(step.Status, "armed.status"); err != nil {
		return err
	}
	s.rows, s.lent = 0, lentBatch{bad: s.lent.bad}
	if step.Batch != nil {
		if err := c.locateBatch(&s.lent, step.Batch); err != nil {
			return fault.In("device", err)
		}
		s.rows = step.Batch.Rows
	} else {
		s.rows = len(step.Step.Lengths)
	}
	s.layers = sized(s.layers, len(step.Layers))
	for i := range step.Layers {
		if err := c.fillLayer(s, step, i); err != nil {
			return fault.In(fmt.Sprintf("armed.layers[%d]", i), err)
		}
	}
	return nil
}

func (c *cache) fillLayer(s *armedStep, step *gpu.ArmedStep, i int) (err error) {
	g, l, from, rows := &c.lease.geometry, &s.layers[i], &step.Layers[i], s.rows
	if _, err := c.index(from.Layer, "layer"); err != nil {
		return err
	}
	for j := range i {
		if step.Layers[j].Layer == from.Layer {
			return fault.Newf(fault.Invalid, "layer", "layer %d is that of layers[%d] already: name each once", from.Layer, j)
		}
	}
	if l.ready, l.words[0], err = c.lease.word(from.Ready, "ready"); err != nil {
		return err
	}
	if l.done, l.words[1], err = c.lease.word(from.Done, "done"); err != nil {
		return err
	}
	l.query, l.output = from.Query, from.Output
	l.request = gpu.LayerRequest{Layer: from.Layer, Query: &l.query, Output: &l.output}
	for _, t := range []*gpu.Tensor{&l.query, &l.output} {
		if t.Memory == nil {
			return fault.Newf(fault.Invalid, "", "query and output must lie in regions")
		}
	}
	query, err := c.lease.tensor(&l.query, rows, g.QueryHeads, g.KDim, g.Query, &queryField)
	if err != nil {
		return armedFields(err)
	}
	l.queryAt = query.extent
	if l.outputAt, err = c.lease.tensor(&l.output, rows, g.QueryHeads, g.VDim, g.Output, &outputField); err == nil {
		err = c.lease.writable(l.outputAt.extent)
	}
	if err != nil {
		return armedFields(err)
	}
	l.lists, l.counts = extent{}, extent{}
	if from.ListBuffer != nil {
		l.list = *from.ListBuffer
		l.request.ListBuffer = &l.list
		check := call{request: &l.request}
		if err := c.prepareLists(&check, rows); err != nil {
			return armedFields(err)
		}
		l.lists, l.counts = check.lists, check.counts
	}
	return nil
}

// armedFields names fields as ArmedLayer does, not as Layer.
func armedFields(err error) error {
	var e *fault.Error
	if !errors.As(err, &e) {
		return err
	}
	renamed := *e
	for _, name := range [...]struct{ layer, armed string }{
		{"query_tensor", "query"}, {"output_tensor", "output"}, {"list_buffer", "lists"},
	} {
		if rest, ok := strings.CutPrefix(e.Field, name.layer); ok {
			renamed.Field = name.armed + rest
		}
	}
	return &renamed
}

// word finds a word that both sides write.
func (l *lease) word(at gpu.Span, field string) (*armed.Word, extent, error) {
	e, data, err := l.locate(at.Memory, at.Offset, armed.WordBytes, armed.WordBytes, field)
	if err != nil {
		return nil, e, err
	}
	return armed.At(data), e, l.writable(e)
}

// close fails what is armed and waits until nothing runs.
func (a *armer) close() {
	a.cancelAll(errClosed) // or the layer that runs would be waited for
	l := a.cache.lease
	l.mu.Lock()
	a.closed = true
	ended := a.ended
	a.signal()
	l.mu.Unlock()
	a.cancelAll(errClosed)
	if ended != nil {
		<-ended
	}
}

func (a *armer) cancelAll(cause *fault.Error) {
	a.cancelFrom(func(*armedStep) bool { return true }, cause)
}

// CancelArmed implements gpu.Cache.
func (c *cache) CancelArmed(id uint32) {
	c.armed.cancelFrom(func(s *armedStep) bool { return s.id == id }, errCancelled)
}

// cancelFrom ends the first step that is one, and those behind it.
func (a *armer) cancelFrom(is func(*armedStep) bool, cause *fault.Error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := slices.IndexFunc(a.queue, is)
	if first < 0 {
		return
	}
	for i, s := range a.queue[first:] {
		if !s.cause.CompareAndSwap(nil, cause) {
			continue
		}
		if first+i == 0 {
			a.cancel()
		}
		if w := s.waiting.Load(); w != nil {
			w.Stop()
		}
	}
}

var errCancelled = fault.Newf(fault.Cancelled, "", "the step was cancelled")

// work is the goroutine that runs the cache's armed steps.
func (a *armer) work() {
	defer close(a.ended)
	debug.SetPanicOnFault(true) // lent memory can vanish
	for {
		a.cache.lease.mu.Lock()
		a.running = nil
		if len(a.queue) > 0 {
			a.running = a.queue[0]
		}
		s, closed := a.running, a.closed
		a.cache.lease.mu.Unlock()
		switch {
		case s != nil:
			a.begun, a.answer = false, gpu.ArmedResult{ID: s.id}
			if err := a.try(func() error { return a.run(s) }); err != nil {
				a.fail(s, err)
			} else {
				s.done(&a.answer) // s is not free while it is what runs
			}
		case closed:
			a.cancel()
			return
		default:
			<-a.more
		}
	}
}

// run runs a step. After an error it has to be failed.
func (a *armer) run(s *armedStep) error {
	if !a.await(s, s.begun, s.id) {
		return s.overdue("armed.step")
	}
	a.begun = true
	if s.lent.rows > 0 {
		if err := a.readBatch(s); err != nil {
			return err
		}
	}
	for i := range s.layers {
		if !a.await(s, s.layers[i].ready, 1) {
			return s.overdue(fmt.Sprintf("armed.layers[%d].ready", i))
		}
		if err := a.layer(s, i); err != nil {
			return err
		}
	}
	return nil
}

// layer runs layer i of a step and rings.
func (a *armer) layer(s *armedStep, i int) error {
	c, l := a.cache, &s.layers[i]
	if more := len(s.layers) - len(a.results); more > 0 {
		a.results = append(a.results, make([]gpu.LayerResult, more)...)
	}
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if cause := s.cause.Load(); cause != nil {
		return cause
	}
	if s.status.Load() != 0 {
		return fault.Newf(fault.Cancelled, "armed.status", "the engine gave the step up")
	}
	if err := c.layer(a.ctx, &l.request, &a.results[i]); err != nil {
		if cause := s.cause.Load(); cause != nil {
			return cause
		}
		return fault.In(fmt.Sprintf("armed.layers[%d]", i), armedFields(err))
	}
	s.lent.mark(&a.results[i], c.lease)
	a.answer.Layers = a.results[:i+1]
	if i == len(s.layers)-1 {
		a.leave()
	}
	l.done.Ring(1)
	return nil
}

// leave takes the first step out of the queue and makes the next one's batch current.
func (a *armer) leave() {
	a.mu.Lock()
	a.queue = slices.Delete(a.queue, 0, 1)
	if a.ctx.Err() != nil {
		a.ctx, a.cancel = context.WithCancel(context.Background())
	}
	a.mu.Unlock()
	if len(a.queue) > 0 && a.queue[0].lent.rows == 0 {
		next := a.queue[0]
		// It was checked against what this step left, which nothing has changed since.
		if err := a.cache.declare(&next.batch); err != nil {
			next.cause.CompareAndSwap(nil, fault.Newf(fault.Internal, "", "the batch is refused after it was accepted (%v): report it", err))
		}
	}
}

// await waits until a word is v, and tells whether it is.
func (a *armer) await(s *armedStep, w *armed.Word, v uint32) bool {
	s.waiting.Store(w)
	defer s.waiting.Store(nil)
	return w.Await(v, s.timeout, s.stopped)
}

// overdue is why a wait for a word ended.
func (s *armedStep) overdue(field string) error {
	if cause := s.cause.Load(); cause != nil {
		return cause
	}
	return fault.Newf(fault.Deadline, field, "was not rung within %v", s.timeout)
}

// fail ends a step and all behind it.
func (a *armer) fail(s *armedStep, err error) {
	c := a.cache
	c.lease.mu.Lock()
	err = c.lease.explain(err, s.allWords()...)
	if a.begun {
		kind := fault.Internal
		errors.As(err, &kind)
		// It fails again if the lent memory is gone, and nobody is there to be told.
		_ = a.try(func() error { c.poison(s, len(a.answer.Layers), kind.Code()); return nil })
	}
	type ended struct {
		id   uint32
		done func(*gpu.ArmedResult)
	}
	var behind []ended
	for len(a.queue) > 0 {
		if next := a.queue[0]; next != s {
			behind = append(behind, ended{next.id, next.done})
		}
		a.leave()
	}
	c.lease.mu.Unlock() // from here on, those behind are free

	a.answer.Err = err
	s.done(&a.answer)
	for _, b := range behind {
		b.done(&gpu.ArmedResult{
			ID: b.id, Err: fault.Newf(fault.Cancelled, "", "step %d, which was armed before it, failed", s.id),
		})
	}
}

// allWords are where a step's words lie.
func (s *armedStep) allWords() []extent {
	all := append(s.words[:], s.lent.extents[:]...)
	for i := range s.layers {
		for _, e := range s.layers[i].words {
			e.field = fmt.Sprintf("armed.layers[%d].%s", i, e.field)
			all = append(all, e)
		}
	}
	return all
}

// poison says that a step failed and releases the engine from the layers that are not done.
func (c *cache) poison(s *armedStep, done int, code uint32) {
	s.status.Fail(code)
	g := &c.lease.geometry
	vector := make([]byte, g.VDim*g.Output.Size())
	g.Output.Encode(vector, slices.Repeat([]float32{float32(math.NaN())}, g.VDim))
	for i := done; i < len(s.layers); i++ {
		for b := range s.rows {
			for h := range g.QueryHeads {
				copy(s.layers[i].outputAt.at(b, h), vector)
			}
		}
	}
	for i := done; i < len(s.layers); i++ {
		s.layers[i].done.Ring(1)
	}
}

// try calls f and makes an error of its panic.
func (a *armer) try(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = newCrash(r)
		}
	}()
	return f()
}
