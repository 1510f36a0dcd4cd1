//go:build linux && cgo && cuda

package cuda

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/internal/spec"
	"github.com/twilight-sidecar/twilight/internal/armed"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// armer runs the armed steps of a cache. All that a step does is given to a stream when it is armed: it
// waits for the step's word, brings tables up to date, and for each layer waits, runs its kernels and
// rings, as a graph that serves all steps of a batch's size.
//
// A layer that the kernels cannot finish parks the stream, behind its kernels and before its ring: a
// query was not finite, the fused kernel gave up, heads are to be trained, the step was halted. watch
// looks at it then, from a thread of its own and by a stream of its own, and either runs the layer and
// lets go, or fails the step.
//
// A step that fails before it began leaves the stream waiting, since to ring what the engine waits for
// would race with its beginning. flush makes the stream run dry when the engine is known to be quiet.
type armer struct {
	cache  *cache
	ready  bool      // what follows is there
	stream cu.Stream // of the steps
	help   cu.Stream // of what ends their waits
	signal drv.Signal
	news   staging // kernels.NewsWords, and where found lies
	state  buffer  // see stateGate
	begin  drv.Launch
	check  drv.Launch
	block  drv.Block // kernels.Batch
	lent   lentLaunches

	// The lease's lock guards these.
	slots      [gpu.MaxArmed + 1]armedStep
	given      uint32 // the last step that was given to the stream
	checked    checkedLayers
	layout     []armedLayer
	layouts    int // how often it changed
	graphs     []*stepGraph
	image      buffer
	results    buffer
	scratch    buffer
	shadow     lentShadow
	works      []kv.ChunkWork
	giving     drv.MemOps
	forgetting bool // the tracker knows nothing of what was indexed last
	ended      chan struct{}

	mu     sync.Mutex
	queue  []*armedStep
	closed bool
	// waiting is how many steps the stream still has to get through, those that were answered included.
	waiting int

	// What follows belongs to watch.
	since    time.Time // the step that runs came on, or became the first
	progress int
	first    uint32
	answer   gpu.ArmedResult
	layers   []gpu.LayerResult
	ops      drv.MemOps
	call     layerCall
}

// Offsets of an armer's words: the gate's two, how many layers were rung, how many blocks are over, and the
// level at which the heads of all layers are trained.
const (
	stateGate     = 0
	stateReached  = 8
	stateFinished = 12
	stateTrained  = 16
	stateBytes    = 20
	// foundAt is an index into news.
	foundAt = kernels.NewsWords
)

// armedStep is an armed step. Its memory is reused.
type armedStep struct {
	busy     bool
	id       uint32
	given    uint32
	timeout  time.Duration
	done     func(*gpu.ArmedResult)
	begun    drv.Ptr
	status   drv.Ptr
	extents  []extent // of all that the step uses
	layers   []armedLayer
	batch    lentBatch // of no rows if the batch came with the step
	rows     []kv.SeqRow
	work     []layerWork
	training training
	// crossover is the number of valid tokens from which rows are to be sparse, where costs decide.
	crossover int
	graph     *stepGraph
	image     staging
	back      staging

	// cause, once set, ends the step; the first one counts.
	cause atomic.Pointer[fault.Error]
}

// armedLayer is where a layer has its words and tensors.
type armedLayer struct {
	layer         int // the cache's
	ready, done   drv.Ptr
	query, output tensor
	lists, counts drv.Ptr
	capacity      int
}

// layerWork is what is known of a layer's indexing when its step is armed.
type layerWork struct {
	from, n         int // of armer.works
	training        training
	tokens, claimed uint64
	chain           bool // the host ran it by the chain of kernels
}

func newArmer(c *cache) *armer { return &armer{cache: c} }

// prepare takes what armed steps need, on the owner's thread.
func (a *armer) prepare() error {
	if a.ready {
		return nil
	}
	l := a.cache.lease
	var err error
	if a.signal, err = drv.NewSignal(); err != nil {
		return err
	}
	for _, s := range []*cu.Stream{&a.stream, &a.help} {
		if *s, err = l.device.streams.take(); err != nil {
			return err
		}
	}
	if err := errors.Join(a.news.reserve(4*(kernels.NewsWords+1)), a.state.reserve(stateBytes)); err != nil {
		return err
	}
	clear(a.news.data)
	if err := zero(a.state.ptr, stateBytes, a.help); err != nil {
		return err
	}
	if err := drv.Wrap("cuStreamSynchronize", a.help.Synchronize()); err != nil {
		return err
	}
	k := &l.device.kernels.Armed
	a.begin = drv.NewLaunch(k.Begin, a.stream, 1024, l.block)
	a.check = drv.NewLaunch(l.device.kernels.Check, a.stream, 256, l.block)
	a.block = drv.NewBlock(batchBytes)
	a.lent = newLentLaunches(k, a.stream, a.block)
	a.ended = make(chan struct{})
	started := make(chan error)
	go a.watch(started)
	if err := <-started; err != nil {
		return err
	}
	a.ready = true
	return nil
}

// Arm implements gpu.Cache.
func (c *cache) Arm(ctx context.Context, step *gpu.ArmedStep) error {
	c.lease.mu.Lock()
	defer c.lease.mu.Unlock()
	if err := c.usable(ctx); err != nil {
		return err
	}
	if err := spec.Armed(step); err != nil {
		return err
	}
	a := c.armed
	n, last := a.settled(gpu.MaxArmed - 1)
	if n == gpu.MaxArmed {
		return fault.Exhaustedf("armed", 1, 0, "%d steps of the cache are armed: wait for the first to end", gpu.MaxArmed)
	}
	s := a.free()
	if err := c.fillArmed(s, step); err != nil {
		return err
	}
	if step.Batch == nil && last != nil && last.batch.rows > 0 {
		return fault.Newf(fault.Precondition, "armed",
			"step %d, which is armed before, brings its batch when it begins: wait for its end", last.id)
	}
	if !a.ready || n == 0 && a.behind() {
		if err := c.lease.device.owner.do(ctx, func() error { return errors.Join(a.prepare(), a.flush()) }); err != nil {
			return explain(err)
		}
	}
	var err error
	s.training, a.works = training{}, a.works[:0]
	if step.Batch == nil {
		err = a.declare(s, step.Step)
	} else {
		s.rows, s.work, s.crossover = sized(s.rows, step.Batch.Rows), sized(s.work, len(s.layers)), 0
		clear(s.rows)
		clear(s.work)
	}
	if err != nil {
		return err
	}
	if err := c.lease.device.owner.do(context.WithoutCancel(ctx), func() error { return a.give(s) }); err != nil {
		a.lose(s, 0)
		return explain(err)
	}
	return nil
}

// settled returns how many steps are armed, and the last of them. If they are more than most, it gives the
// first, which may be over but for its answer, a moment.
func (a *armer) settled(most int) (n int, last *armedStep) {
	for start := time.Now(); ; time.Sleep(20 * time.Microsecond) {
		a.mu.Lock()
		n, last = len(a.queue), nil
		runs := false
		if n > 0 {
			last = a.queue[n-1]
			runs = a.hears(kernels.NewsStep) == a.queue[0].given && a.queue[0].cause.Load() == nil
		}
		a.mu.Unlock()
		const moment = 2 * time.Millisecond
		if n <= most || !runs || time.Since(start) > moment {
			return n, last
		}
	}
}

// behind tells whether the stream still has to get through steps.
func (a *armer) behind() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.waiting > 0
}

// free is a slot that no step has: there is one more than can be armed.
func (a *armer) free() *armedStep {
	for {
		a.mu.Lock()
		for i := range a.slots {
			if s := &a.slots[i]; !s.busy {
				a.mu.Unlock()
				return s
			}
		}
		a.mu.Unlock()
		time.Sleep(time.Millisecond) // until Done of two has returned
	}
}

// hears reads what the device told last.
func (a *armer) hears(what int) uint32 {
	return atomic.LoadUint32(&uint32s(a.news.data)[what])
}

// declare makes a batch current and finds what there is to index.
func (a *armer) declare(s *armedStep, step *kv.Step) error {
	c := a.cache
	if err := c.declare(step); err != nil {
		return err
	}
	s.rows, s.crossover = s.rows[:0], c.batch.crossover
	for _, row := range c.tracker.Rows() {
		s.rows = append(s.rows, kv.SeqRow{Sequence: row.Sequence, First: row.First, Len: row.Len})
	}
	s.work = sized(s.work, len(s.layers))
	for j := range s.layers {
		w, i := &s.work[j], s.layers[j].layer
		*w = layerWork{training: c.pending(i), claimed: c.tracker.Claimed(i)}
		if w.training.level > 0 {
			c.trained[i] = w.training.level
		}
		if j > 0 && slices.Equal(c.work, a.works[s.work[j-1].from:][:s.work[j-1].n]) {
			w.from, w.n, w.tokens = s.work[j-1].from, s.work[j-1].n, s.work[j-1].tokens
			continue
		}
		w.from, w.n = len(a.works), len(c.work)
		for k := range c.work {
			w.tokens += tokensOf(&c.work[k])
		}
		a.works = append(a.works, c.work...)
	}
	return nil
}

// lose forgets what the layers of a step from one on should have left, as they did not run.
func (a *armer) lose(s *armedStep, from int) {
	c := a.cache
	c.batch.misplace()
	if s.batch.rows > 0 {
		return // what the device has not done, it has not booked
	}
	for j := from; j < len(s.layers); j++ {
		i := s.layers[j].layer
		c.tracker.Invalidate(i)
		if s.work[j].training.level > 0 {
			c.trained[i] = 0
		}
	}
}

// fillArmed checks all of a step but a batch that came with it.
func (c *cache) fillArmed(s *armedStep, step *gpu.ArmedStep) (err error) {
	s.id, s.timeout, s.done = step.ID, cmp.Or(step.WaitTimeout, gpu.DefaultWaitTimeout), step.Done
	s.cause.Store(nil)
	s.extents = s.extents[:0]
	if s.begun, err = s.word(c.lease, step.Begun, "armed.step"); err != nil {
		return err
	}
	if s.status, err = s.word(c.lease, step.Status, "armed.status"); err != nil {
		return err
	}
	rows := 0
	s.batch = lentBatch{}
	if step.Batch != nil {
		if err := c.locateBatch(s, step.Batch); err != nil {
			return fault.In("device", err)
		}
		rows = step.Batch.Rows
		if len(step.Layers) != len(c.layers) {
			return fault.Newf(fault.Unsupported, "armed.layers",
				"there are %d, and a batch in memory runs all %d layers of the cache: name all", len(step.Layers), len(c.layers))
		}
	} else {
		rows = len(step.Step.Lengths)
	}
	s.layers = sized(s.layers, len(step.Layers))
	if c.armed.checked.is(step.Layers, rows) {
		copy(s.layers, c.armed.checked.layers)
		s.extents = append(s.extents, c.armed.checked.extents...)
		return nil
	}
	words := len(s.extents)
	for i := range step.Layers {
		if err := c.fillLayer(s, step, i, rows); err != nil {
			return fault.In(fmt.Sprintf("armed.layers[%d]", i), armedFields(err))
		}
	}
	c.armed.checked.set(step.Layers, rows, s.layers, s.extents[words:])
	return nil
}

// checkedLayers are layers that were checked last: an engine arms the same again and again.
type checkedLayers struct {
	asked   []gpu.ArmedLayer
	lists   []gpu.ListBuffer // what theirs point to
	rows    int
	layers  []armedLayer
	extents []extent
}

func (k *checkedLayers) set(asked []gpu.ArmedLayer, rows int, layers []armedLayer, extents []extent) {
	k.asked, k.lists, k.rows = append(k.asked[:0], asked...), k.lists[:0], rows
	k.layers, k.extents = append(k.layers[:0], layers...), append(k.extents[:0], extents...)
	for i := range asked {
		if asked[i].ListBuffer == nil {
			k.lists = append(k.lists, gpu.ListBuffer{})
		} else {
			k.lists = append(k.lists, *asked[i].ListBuffer)
		}
	}
}

// is tells whether layers are the same, in memory that is still there.
func (k *checkedLayers) is(asked []gpu.ArmedLayer, rows int) bool {
	if len(asked) != len(k.asked) || rows != k.rows {
		return false
	}
	for i := range asked {
		x, y := &asked[i], &k.asked[i]
		if x.Layer != y.Layer || x.Ready != y.Ready || x.Done != y.Done || !sameTensor(&x.Query, &y.Query) || !sameTensor(&x.Output, &y.Output) ||
			(x.ListBuffer == nil) != (y.ListBuffer == nil) || x.ListBuffer != nil && *x.ListBuffer != k.lists[i] {
			return false
		}
	}
	for i := range k.extents {
		if k.extents[i].memory.base == 0 {
			return false
		}
	}
	return true
}

func sameTensor(a, b *gpu.Tensor) bool {
	return a.Memory == b.Memory && a.Offset == b.Offset && a.RowStride == b.RowStride && a.HeadStride == b.HeadStride
}

func (c *cache) fillLayer(s *armedStep, step *gpu.ArmedStep, i, rows int) (err error) {
	l := c.lease
	g, to, from := &l.geometry, &s.layers[i], &step.Layers[i]
	*to = armedLayer{}
	var ok bool
	if to.layer, ok = c.byModel[from.Layer]; !ok {
		return fault.Newf(fault.NotFound, "layer", "the cache has no layer %d: name one of its own", from.Layer)
	}
	for j := range i {
		if step.Layers[j].Layer == from.Layer {
			return fault.Newf(fault.Invalid, "layer", "layer %d is that of layers[%d] already: name each once", from.Layer, j)
		}
	}
	if to.ready, err = s.word(l, from.Ready, "ready"); err != nil {
		return err
	}
	if to.done, err = s.word(l, from.Done, "done"); err != nil {
		return err
	}
	if from.Query.Memory == nil || from.Output.Memory == nil {
		return fault.Newf(fault.Invalid, "", "query and output must lie in regions")
	}
	var e extent
	if to.query, e, err = l.lentTensor(&from.Query, rows, g.QueryHeads, g.KDim, g.Query, "query"); err != nil {
		return err
	}
	s.extents = append(s.extents, e)
	if to.output, e, err = l.lentTensor(&from.Output, rows, g.QueryHeads, g.VDim, g.Output, "output"); err == nil {
		err = l.writable(e)
	}
	if err != nil {
		return err
	}
	s.extents = append(s.extents, e)
	if from.ListBuffer == nil {
		return nil
	}
	to.capacity = from.ListBuffer.Capacity
	lists, err := l.locateLists(from.ListBuffer, rows*g.QueryHeads/l.asking())
	to.lists, to.counts = lists.lists, lists.counts
	s.extents = append(s.extents, lists.extents[:]...)
	return err
}

// armedFields names fields as ArmedLayer does, not as Layer.
func armedFields(err error) error {
	var e *fault.Error
	if !errors.As(err, &e) {
		return err
	}
	if rest, ok := strings.CutPrefix(e.Field, "list_buffer"); ok {
		renamed := *e
		renamed.Field = "lists" + rest
		return &renamed
	}
	return err
}

// word finds a word that both sides write.
func (s *armedStep) word(l *lease, at gpu.Span, field string) (drv.Ptr, error) {
	e, p, err := l.locate(at.Memory, at.Offset, armed.WordBytes, armed.WordBytes, field)
	if err != nil {
		return 0, err
	}
	s.extents = append(s.extents, e)
	return p, l.writable(e)
}

// idle refuses what cannot be done while steps are armed.
func (a *armer) idle() error {
	if n, last := a.settled(0); n > 0 {
		return fault.Newf(fault.Precondition, "step_id", "step %d of the cache is armed: wait for its end or cancel it", last.id)
	}
	return nil
}

// uses tells whether an armed step does anything in m.
func (a *armer) uses(m *memory) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.queue, func(s *armedStep) bool {
		return slices.ContainsFunc(s.extents, func(e extent) bool { return e.memory == m })
	})
}

// letGoOf sees that nothing of m is used by steps that were answered. The lease's lock is held.
func (a *armer) letGoOf(m *memory) error {
	a.mu.Lock()
	uses := false
	for i := range a.slots {
		s := &a.slots[i]
		uses = uses || s.busy && slices.ContainsFunc(s.extents, func(e extent) bool { return e.memory == m })
	}
	a.mu.Unlock()
	if !uses {
		return nil
	}
	return explain(a.cache.lease.device.owner.do(context.Background(), a.flush))
}

// CancelArmed implements gpu.Cache.
func (c *cache) CancelArmed(id uint32) {
	c.armed.cancelFrom(func(s *armedStep) bool { return s.id == id }, errCancelled)
}

var errCancelled = fault.Newf(fault.Cancelled, "", "the step was cancelled")

func (a *armer) cancelAll(cause *fault.Error) {
	a.cancelFrom(func(*armedStep) bool { return true }, cause)
}

// cancelFrom ends the first step that is one, and those behind it.
func (a *armer) cancelFrom(is func(*armedStep) bool, cause *fault.Error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := slices.IndexFunc(a.queue, is)
	if first < 0 {
		return
	}
	for _, s := range a.queue[first:] {
		s.cause.CompareAndSwap(nil, cause)
	}
	a.signal.Wake()
}

// close fails what is armed and waits until nothing runs. The lease's lock is free.
func (a *armer) close() {
	a.cancelAll(errClosed)
	l := a.cache.lease
	l.mu.Lock()
	a.cache.closing = true
	ready := a.ready
	l.mu.Unlock()
	if !ready {
		return
	}
	a.cancelAll(errClosed) // what came meanwhile
	a.mu.Lock()
	a.closed = true
	a.signal.Wake()
	a.mu.Unlock()
	<-a.ended
}

// release gives back what prepare and steps took, on the owner's thread. Nothing is armed.
func (a *armer) release() error {
	if !a.ready {
		return nil
	}
	a.ready = false
	errs := []error{a.flush()}
	for _, g := range a.graphs {
		errs = append(errs, g.destroy())
	}
	for i := range a.slots {
		errs = append(errs, a.slots[i].image.free(), a.slots[i].back.free())
	}
	errs = append(errs, a.news.free(), a.state.free(), a.image.free(), a.results.free(), a.scratch.free(), a.shadow.free())
	a.begin.Free()
	a.check.Free()
	a.lent.free()
	a.block.Free()
	a.cache.lease.device.streams.give(a.stream, a.help)
	a.signal.Close()
	return errors.Join(errs...)
}

// sized returns n elements, in s if there is room.
func sized[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }
