package client

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twilight-sidecar/twilight/internal/armed"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const (
	// maxArmed is how many steps of a cache the daemon lets be armed.
	maxArmed = 2

	defaultWaitTimeout = 5 * time.Second
	maxWaitTimeout     = time.Minute

	// reasonGrace is how long a failed step waits for the daemon to say why.
	reasonGrace = time.Second
)

// Arming is how a step is armed. An engine uses the same for every step of a batch size.
type Arming struct {
	// Layers are those that the step runs, in order, each at most once.
	Layers []ArmedLayer
	// WaitTimeout bounds each wait for the other side, the daemon's and the engine's: more than a layer
	// takes on either. 0 means 5 s; at most a minute.
	WaitTimeout time.Duration
	// Device, if not nil, is where the daemon finds the batch when the step begins, in place of the Batch's
	// sequences and slots.
	Device *DeviceBatch
	// Results asks for the layers' results, which Armed.Results returns.
	Results bool

	// Words, if not nil, is where the layers meet the daemon, in place of words that the SDK makes: for an
	// engine whose stream rings and waits. It is a buffer of the engine's GPU, ReadWrite, of WordBytes at
	// least, for all armed steps of the cache and nothing else. Steps then run by Layer.ReadyOn and WaitOn, or
	// by replays of a graph that does the same (Begun), and end with Finish.
	Words *Buffer
	// Release is a stream with nothing else to do. By it the SDK lets the engine's stream get through a
	// step that failed. It goes with Words.
	Release Releaser
}

// DeviceBatch is a batch in a buffer, for an engine that knows it only when the step begins: rows without
// names, and the slots written since the last step. PageSize must be a multiple of 16. A row that is
// wrong is void, with proto PathReason BAD_ROW.
type DeviceBatch struct {
	Rows        int
	Lengths     Location // int32 [Rows], 0 for a void row
	Table       Location // int32 [Rows, TableStride]: page ids
	TableStride int
	Slots       Location // int64 [NumSlots], -1 for padding
	NumSlots    int
	FirstValid  *Location // int32 [Rows], or nil: 0
	MaxLength   int       // bounds the lengths
}

func (d *DeviceBatch) proto() *twilightv1.DeviceBatch {
	if d == nil {
		return nil
	}
	m := &twilightv1.DeviceBatch{
		Batch: uint32(d.Rows), Lengths: d.Lengths.proto(), Table: d.Table.proto(), TableStride: uint32(d.TableStride),
		Slots: d.Slots.proto(), NumSlots: uint32(d.NumSlots), MaxLength: uint32(d.MaxLength),
	}
	if d.FirstValid != nil {
		m.FirstValid = d.FirstValid.proto()
	}
	return m
}

// ArmedLayer is where one layer of an armed step has its tensors. Query and output lie in buffers.
type ArmedLayer struct {
	Layer      int // the model's layer index
	Query      Tensor
	Output     Tensor
	ListBuffer *ListBuffer
}

// Armed is a step that is armed: its layers meet the daemon at words in shared memory, without messages.
// One goroutine at a time runs it; Cancel and Results may be called by any.
//
// An engine on a CPU runs it by Layer.Ready and Wait. One on a GPU, whose stream rings and waits, sets
// Arming.Words: Layer.ReadyOn and WaitOn give that to a stream, and Finish tells whether the step may be used.
// proto/twilight/v1/ARMED.md tells what a graph captures in their place.
type Armed struct {
	cache   *Cache
	lease   *lease
	id      uint64
	words   words
	timeout time.Duration

	next    int  // the layer to wait for
	begun   bool // the step word was rung
	over    atomic.Bool
	failure atomic.Pointer[Error] // why the step must not be used
	waiting atomic.Pointer[armed.Word]
	stopped func() bool // is there a failure

	// Of a step that a stream runs.
	release     Releaser // nil: of another
	given       atomic.Bool
	overdue     *time.Timer
	finished    chan struct{} // closed by Finish
	released    chan struct{} // closed when no word is released any more
	finishOnce  sync.Once
	releaseOnce sync.Once

	done    chan struct{} // closed once the daemon has let go of the step
	results []*LayerResult
	err     error // with which done was closed
}

// armedKey names an armed step of a lease.
type armedKey struct {
	cache uint32
	step  uint64
}

// armedSteps are the steps of a cache that are armed, in order.
type armedSteps struct {
	mu   sync.Mutex
	open []*Armed // those that the daemon has not let go of
}

// arming is what a cache keeps from step to step. Whoever steps the cache has it.
type arming struct {
	buffer  *Buffer // of the words
	lent    *Buffer // in its place, the engine's
	known   bool    // the daemon knows layers
	layers  []ArmedLayer
	message twilightv1.Armed
}

// words are a cache's: status, ready and done of each layer, then step.
type words struct {
	buffer *Buffer
	layers int
}

func (w words) at(i int) *armed.Word { return armed.At(w.buffer.data[i*armed.WordBytes:]) }

func (w words) status() *armed.Word     { return w.at(0) }
func (w words) ready(i int) *armed.Word { return w.at(1 + i) }
func (w words) rung(i int) *armed.Word  { return w.at(1 + w.layers + i) }
func (w words) step() *armed.Word       { return w.at(1 + 2*w.layers) }
func (w words) offset(i int) int        { return i * armed.WordBytes }
func (w words) location(i int) *Location {
	return &Location{Buffer: w.buffer, Offset: w.offset(i)}
}

// Arm declares a batch and arms its layers. It can be called while another armed step of the cache runs,
// which the new one then follows; a third waits until the daemon has let go of the first. After a
// failure it waits until the daemon has let go of what was armed. A refused step changes nothing.
func (c *Cache) Arm(ctx context.Context, b Batch, how Arming) (*Armed, error) {
	if err := how.check(); err != nil {
		return nil, err
	}
	if d := c.session.Device(); d.GetBackend() == "cuda" && how.Words == nil {
		return nil, errorf(ErrUnsupported, "step.armed", "device %s is a GPU, whose rings wake no CPU: set Arming.Words and Release", d.GetId())
	}
	select {
	case c.stepping <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	call, a, err := c.startArmed(ctx, &b, &how)
	if err != nil {
		<-c.stepping
		return nil, err
	}
	if _, err := call.wait(ctx); err != nil {
		a.fail(err, true) // if it is armed nevertheless
		return nil, err
	}
	return a, nil
}

func (how *Arming) check() error {
	if how.WaitTimeout < 0 || how.WaitTimeout > maxWaitTimeout {
		return errorf(ErrOutOfRange, "step.armed.wait_timeout_ms", "is %v; at most %v", how.WaitTimeout, maxWaitTimeout)
	}
	if len(how.Layers) == 0 {
		return errorf(ErrInvalid, "step.armed.layers", "is empty; name the layers that the step runs")
	}
	if (how.Words == nil) != (how.Release == nil) {
		return errorf(ErrInvalid, "", "Arming.Words and Arming.Release go together: set both or none")
	}
	if need := WordBytes(len(how.Layers)); how.Words != nil && how.Words.Size() < need {
		return errorf(ErrInvalid, "", "Arming.Words has %d bytes, %d layers need %d", how.Words.Size(), len(how.Layers), need)
	}
	return nil
}

// startArmed sends a step to be armed, which releases c.stepping once its outcome is known.
func (c *Cache) startArmed(ctx context.Context, b *Batch, how *Arming) (*call, *Armed, error) {
	if err := c.roomToArm(ctx); err != nil {
		return nil, nil, err
	}
	w, err := c.arming.words(ctx, c.session, how)
	if err != nil {
		return nil, nil, err
	}
	l, m, err := c.buildStep(b)
	if err != nil {
		return nil, nil, err
	}
	timeout := cmp.Or(how.WaitTimeout, defaultWaitTimeout)
	m.Armed, m.Device = c.arming.set(how, w, timeout), how.Device.proto()
	a := &Armed{
		cache: c, lease: l, id: m.GetStepId(), words: w, timeout: timeout, done: make(chan struct{}),
		release: how.Release, finished: make(chan struct{}), released: make(chan struct{}),
	}
	a.stopped = func() bool { return a.failure.Load() != nil }
	if err := l.expect(a); err != nil {
		return nil, nil, err
	}
	c.steps.add(a)
	refused := func(err error) {
		c.arming.known = false
		if l.forget(a) {
			a.end(nil, err)
		}
	}
	c.arming.known = true
	call, err := c.sendStep(ctx, l, m, refused)
	if err != nil {
		refused(err)
	}
	return call, a, err
}

// roomToArm waits until another step can be armed.
func (c *Cache) roomToArm(ctx context.Context) error {
	for {
		first, n := c.steps.first()
		switch {
		case n == 0 || n < maxArmed && !first.stopped():
			return nil
		case !first.over.Load() && !first.stopped():
			return errorf(ErrPrecondition, "step.armed", "%d steps of the cache are armed; run the first before the next is armed", n)
		}
		select {
		case <-first.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// words are those of a cache, made when first needed and when more are.
func (x *arming) words(ctx context.Context, s *Session, how *Arming) (words, error) {
	layers := len(how.Layers)
	if how.Words != nil {
		x.known = x.known && x.lent == how.Words
		x.lent = how.Words
		return words{how.Words, layers}, nil
	}
	x.known, x.lent = x.known && x.lent == nil, nil
	size := WordBytes(layers)
	if x.buffer == nil || x.buffer.Size() < size {
		if err := x.close(ctx); err != nil {
			return words{}, err
		}
		var err error
		if x.buffer, err = s.NewBuffer(ctx, max(size, 4096), ReadWrite); err != nil {
			return words{}, err
		}
		x.known = false
	}
	return words{x.buffer, layers}, nil
}

func (x *arming) close(ctx context.Context) error {
	b := x.buffer
	if x.buffer = nil; b == nil {
		return nil
	}
	return b.Close(ctx)
}

// set makes the message say how a step is armed: as before, if the daemon knows.
func (x *arming) set(how *Arming, w words, timeout time.Duration) *twilightv1.Armed {
	m := &x.message
	m.WaitTimeoutMs, m.LayerResults = uint32(timeout.Milliseconds()), how.Results
	if x.known && slices.EqualFunc(x.layers, how.Layers, sameLayer) {
		m.AsBefore, m.Layers, m.Step, m.Status = true, nil, nil, nil
		return m
	}
	m.AsBefore, m.Step, m.Status = false, w.location(1+2*w.layers).proto(), w.location(0).proto()
	m.Layers = make([]*twilightv1.ArmedLayer, len(how.Layers))
	x.layers = make([]ArmedLayer, len(how.Layers))
	for i, layer := range how.Layers {
		m.Layers[i] = &twilightv1.ArmedLayer{
			Layer: uint32(layer.Layer),
			Ready: w.location(1 + i).proto(), Done: w.location(1 + w.layers + i).proto(),
			Query: layer.Query.proto(), Output: layer.Output.proto(),
		}
		x.layers[i] = layer
		if layer.ListBuffer != nil {
			list := *layer.ListBuffer
			x.layers[i].ListBuffer = &list
			m.Layers[i].Lists = &twilightv1.ListBuffer{
				Lists: list.Lists.proto(), Counts: list.Counts.proto(), Capacity: uint32(list.Capacity),
			}
		}
	}
	return m
}

func (t *Tensor) proto() *twilightv1.Tensor {
	return &twilightv1.Tensor{At: t.Location.proto(), RowStride: uint64(t.RowStride), HeadStride: uint64(t.HeadStride)}
}

func sameLayer(a, b ArmedLayer) bool {
	if (a.ListBuffer == nil) != (b.ListBuffer == nil) || a.ListBuffer != nil && *a.ListBuffer != *b.ListBuffer {
		return false
	}
	a.ListBuffer, b.ListBuffer = nil, nil
	return a == b
}

func (s *armedSteps) add(a *Armed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = append(s.open, a)
}

func (s *armedSteps) remove(a *Armed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.open, a); i >= 0 {
		s.open = slices.Delete(s.open, i, i+1)
	}
}

func (s *armedSteps) first() (a *Armed, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) == 0 {
		return nil, 0
	}
	return s.open[0], len(s.open)
}

// from returns a and the steps behind it.
func (s *armedSteps) from(a *Armed) []*Armed {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.open, a); i >= 0 {
		return slices.Clone(s.open[i:])
	}
	return []*Armed{a}
}

// before tells whether another step must be over before a begins.
func (s *armedSteps) before(a *Armed) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.open {
		if other == a {
			return false
		}
		if !other.over.Load() {
			return true
		}
	}
	return false
}

// expect makes the lease tell a of its end.
func (l *lease) expect(a *Armed) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.armed == nil {
		return l.err
	}
	l.armed[armedKey{a.cache.id, a.id}] = a
	return nil
}

// forget makes the lease tell a nothing, and tells whether it has not yet.
func (l *lease) forget(a *Armed) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := armedKey{a.cache.id, a.id}
	_, expected := l.armed[key]
	delete(l.armed, key)
	return expected
}

// armedDone is told that the daemon has let go of a step.
func (l *lease) armedDone(m *twilightv1.ArmedStepDone) {
	key := armedKey{m.GetCacheId(), m.GetStepId()}
	l.mu.Lock()
	a := l.armed[key]
	delete(l.armed, key)
	l.mu.Unlock()
	if a == nil {
		return
	}
	var err error
	if refused := m.GetError(); refused != nil {
		err = fromProto(refused)
	}
	a.end(m.GetLayers(), err)
}

// end books that the daemon has let go of the step. It is called once.
func (a *Armed) end(layers []*twilightv1.LayerResult, err error) {
	for _, layer := range layers {
		a.results = append(a.results, layerResult(layer))
	}
	if a.err = err; err != nil {
		a.fail(err, false)
	}
	a.cache.steps.remove(a)
	close(a.done)
}

// fail makes sure that neither the step nor those behind it are used, and that nobody waits for them. If
// the daemon does not know, it is told.
func (a *Armed) fail(err error, tell bool) {
	e, ok := err.(*Error) //nolint:errorlint // what is wrapped is kept
	if !ok {
		e = &Error{Code: ErrCancelled, Message: err.Error(), cause: err}
	}
	for i, s := range a.cache.steps.from(a) {
		if i > 0 {
			e = errorf(e.Code, "", "the step before it failed: %v", err)
		}
		if !s.failure.CompareAndSwap(nil, e) {
			continue
		}
		if w := s.waiting.Load(); w != nil {
			w.Stop()
		}
		s.startRelease()
		if tell {
			go s.lease.post(cancelRequest(s.cache.id, s.id)) // ends with the lease at the latest
		}
	}
}

// Cancel gives the step up, and with it what is armed behind it. It does not wait.
func (a *Armed) Cancel() {
	if !a.over.Load() {
		a.fail(errorf(ErrCancelled, "", "the step was cancelled"), true)
	}
}

// Results waits until the daemon has let go of the step and returns the layers' results, if Arming asked
// for them, without outputs. An error is why the step failed. The engine need not wait for it to go on.
func (a *Armed) Results(ctx context.Context) ([]*LayerResult, error) {
	select {
	case <-a.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if e := a.failure.Load(); e != nil {
		return a.results, e
	}
	return a.results, nil
}

// LayerWords is where one layer of an armed step meets the daemon.
type LayerWords struct {
	armed *Armed
	layer int
}

// Layer is layer i of Arming.Layers.
func (a *Armed) Layer(i int) LayerWords { return LayerWords{a, i} }

// Ready tells the daemon that the layer's query and its tokens' K and V are in place. The first layer's
// begins the step, whose tables and lengths then hold.
func (w LayerWords) Ready() {
	a := w.armed
	a.words.buffer.using.RLock()
	defer a.words.buffer.using.RUnlock()
	if a.words.buffer.data != nil && a.begin() { // else Wait tells
		a.words.ready(w.layer).Ring(1)
	}
}

// begin begins the step unless it has begun, and tells whether it may go on.
func (a *Armed) begin() bool {
	switch {
	case a.stopped():
		return false
	case a.begun:
		return true
	case a.cache.steps.before(a):
		a.fail(errorf(ErrPrecondition, "", "the step was begun before the one that was armed before it is over"), true)
		return false
	}
	for i := range 1 + 2*a.words.layers {
		a.words.at(i).Store(0)
	}
	a.words.step().Ring(uint32(a.id))
	a.begun = true
	return true
}

// Wait waits until the layer's output is in place. Layers are waited for in order. An error says that the
// step failed and none of its outputs may be used: the engine attends by itself, and arms anew. Only if
// ctx ends first the step goes on; wait again, or Cancel it.
//
// Wait ends without the daemon's help: when the lease is lost, and at the latest after
// Arming.WaitTimeout, by ErrDeadline.
func (w LayerWords) Wait(ctx context.Context) error {
	a := w.armed
	a.words.buffer.using.RLock()
	defer a.words.buffer.using.RUnlock()
	if a.words.buffer.data == nil {
		return errorf(ErrClosed, "", "the session or cache is closed")
	}
	if w.layer != a.next {
		a.fail(errorf(ErrPrecondition, "", "layer %d of the step is waited for, layer %d is next", w.layer, a.next), true)
	}
	rung := a.begin() && a.wait(ctx, a.words.rung(w.layer))
	switch e := a.failure.Load(); {
	case e != nil:
		return e
	case !rung && ctx.Err() != nil:
		return ctx.Err()
	case !rung:
		a.fail(errorf(ErrDeadline, "", "layer %d of the step was not done within %v", w.layer, a.timeout), true)
		return a.failure.Load()
	case a.words.status().Load() != 0:
		return a.reason(ctx)
	}
	if a.next++; a.next == a.words.layers {
		a.over.Store(true)
	}
	return nil
}

// wait waits until a word is rung and tells whether it was.
func (a *Armed) wait(ctx context.Context, word *armed.Word) bool {
	a.waiting.Store(word)
	defer a.waiting.Store(nil)
	if ctx.Done() == nil {
		return word.Await(1, a.timeout, a.stopped)
	}
	if word.Await(1, 0, a.stopped) {
		return true
	}
	defer context.AfterFunc(ctx, word.Stop)()
	return word.Await(1, a.timeout, func() bool { return a.stopped() || ctx.Err() != nil })
}

// reason is why the daemon failed the step: its message follows the status word.
func (a *Armed) reason(ctx context.Context) error {
	a.awaitReason(ctx)
	a.fail(&Error{Code: Code(a.words.status().Load()), Message: "the step failed"}, true)
	return a.failure.Load()
}

func (a *Armed) awaitReason(ctx context.Context) {
	grace := time.NewTimer(reasonGrace)
	defer grace.Stop()
	select {
	case <-a.done:
	case <-grace.C:
	case <-ctx.Done():
	}
}
