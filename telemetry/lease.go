package telemetry

import (
	"context"
	"sync"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
)

// LeaseInfo says what a lease is.
type LeaseInfo struct {
	ID       uint64
	Engine   string // the engine's name for itself
	Device   string
	Geometry *kv.Geometry
	Method   Method
	// ListHeads are the lists of a sequence: KV heads under "union", query heads under "per_query_head".
	ListHeads int
}

// Lease hears what becomes of a lease. A nil Lease hears nothing. Methods may be called from any
// goroutine; requests are served one at a time: Begin, then End.
type Lease struct {
	t      *Telemetry
	info   LeaseInfo
	opened trace.SpanContext // of the OpenLease call
	since  time.Time

	mu      sync.Mutex
	closed  bool
	caches  map[uint32]*cache
	regions int
	lent    uint64
	shadow  uint64
	call    call
	budget  budget
}

// call is the request that is being served.
type call struct {
	kind            Request
	received, begun time.Time
	ctx             context.Context
	span            trace.Span
	cache           uint32
	layer           int
	step            *Step // a StepRequest's message, and what it becomes
	pending         step
}

// cache is a registered cache and its current step.
type cache struct {
	id         uint32
	shadow     uint64
	tokenBytes uint64 // K and V of a token, all KV heads
	layers     map[int]*layer
	step       step
}

// layer is a layer of a cache.
type layer struct {
	series   *series
	budget   *layerBudget
	answered uint64 // the last step that was
}

// step is a step that a cache has been told.
type step struct {
	open     bool // its last layer is still to come
	id       uint64
	phase    int
	ctx      context.Context
	span     trace.Span
	begun    time.Time
	last     time.Time // when its last layer ended
	valid    []int32   // by sequence
	tokens   uint64    // sum of valid
	tracks   []*track  // by sequence, nil for those that are not followed
	answered int       // layers
	totals   totals
}

// totals are sums over a step's layers.
type totals struct{ kept, valid, cache, shadow, dense uint64 }

// Failure is why a request was refused.
type Failure struct {
	Code    string // of proto ErrorCode, in lower case: "invalid_argument"
	Field   string
	Message string // without handles, addresses and data
}

// OpenLease tells of a new lease. ctx is that of the call that opened it. A nil Telemetry returns a nil
// Lease.
func (t *Telemetry) OpenLease(ctx context.Context, info LeaseInfo) *Lease {
	if t == nil {
		return nil
	}
	l := &Lease{
		t: t, info: info, since: time.Now(), caches: make(map[uint32]*cache),
		opened: trace.SpanContextFromContext(ctx), budget: newBudget(),
	}
	t.metrics.leases.Add(1)
	t.metrics.opened.Add(1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leases[l] = struct{}{}
	return l
}

// Close tells that the lease ended, with all it held. It may be called twice.
func (l *Lease) Close() {
	if l == nil {
		return
	}
	l.t.mu.Lock()
	delete(l.t.leases, l)
	l.t.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	for id := range l.caches {
		l.removeCache(id)
	}
	m := l.t.metrics
	m.regions.Add(-int64(l.regions))
	m.lent.Add(-int64(l.lent))
	m.leases.Add(-1)
}

// Lent tells that regions more, of bytes together, are lent; both may be negative.
func (l *Lease) Lent(regions int, bytes int64) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.regions += regions
	l.lent += uint64(bytes)
	l.t.metrics.regions.Add(int64(regions))
	l.t.metrics.lent.Add(bytes)
}

// AddCache tells of a new cache, whose shadow takes so many bytes.
func (l *Lease) AddCache(id uint32, spec *gpu.CacheSpec, shadow uint64) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.info.Geometry
	c := &cache{
		id: id, shadow: shadow, layers: make(map[int]*layer),
		tokenBytes: uint64(g.KVHeads * (g.KDim + g.VDim) * spec.DType.Size()),
	}
	for i := range spec.Layers {
		model := spec.Layers[i].Layer
		c.layers[model] = &layer{
			series: l.t.metrics.layer(l.info.Method, model),
			budget: l.budget.layer(model, l.info.ListHeads, g.QueryHeads),
		}
	}
	l.removeCache(id)
	l.caches[id] = c
	l.shadow += shadow
	l.t.metrics.caches.Add(1)
	l.t.metrics.shadow.Add(int64(shadow))
}

// RemoveCache tells that a cache is gone, and its step with it.
func (l *Lease) RemoveCache(id uint32) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removeCache(id)
}

func (l *Lease) removeCache(id uint32) {
	c := l.caches[id]
	if c == nil {
		return
	}
	l.finish(c)
	delete(l.caches, id)
	l.shadow -= c.shadow
	l.t.metrics.caches.Add(-1)
	l.t.metrics.shadow.Add(-int64(c.shadow))
}

// Received tells that a message has arrived, and returns when. It is to be served or Dropped.
func (l *Lease) Received() time.Time {
	if l == nil {
		return time.Time{}
	}
	l.t.metrics.active.Add(1)
	return time.Now()
}

// Dropped tells that a message will not be served, since the lease ends.
func (l *Lease) Dropped() {
	if l != nil {
		l.t.metrics.active.Add(-1)
	}
}

// Begin tells that a message is being served that is neither a step nor a layer. The context returned
// is for what serves it.
func (l *Lease) Begin(ctx context.Context, kind Request, received time.Time) context.Context {
	if l == nil {
		return ctx
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.call = call{kind: kind, received: received, begun: time.Now()}
	if l.opened.IsValid() {
		ctx = trace.ContextWithSpanContext(ctx, l.opened)
		ctx, l.call.span = l.t.tracer.Start(ctx, spanRequest+kind.String(), trace.WithTimestamp(l.call.begun),
			trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(l.attributes()...))
	}
	return ctx
}

// End tells that the message is answered, by an error if failure is not nil.
func (l *Lease) End(failure *Failure) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	m := moment{at: now}
	if span := l.call.span; span != nil {
		m.span = span.SpanContext()
		fail(span, failure)
		span.End(trace.WithTimestamp(now))
	}
	l.answered(failure, &m)
}

func (l *Lease) answered(failure *Failure, m *moment) {
	code := ""
	if failure != nil {
		code = failure.Code
	}
	l.t.metrics.answered(l.call.kind, code, l.call.begun.Sub(l.call.received), m.at.Sub(l.call.received), m)
	l.call = call{}
}

func fail(span trace.Span, failure *Failure) {
	if failure == nil || !span.IsRecording() {
		return
	}
	span.SetStatus(codes.Error, failure.Message)
	span.SetAttributes(failureAttributes(failure)...)
}

// Step is what a step's message says.
type Step struct {
	Cache               uint32
	ID                  uint64
	IndexOnly           bool
	Sequences           []uint64 // may be empty
	Lengths, FirstValid []int32  // the latter may be empty
	// TraceParent and TraceState are the W3C trace context of the engine's step.
	TraceParent, TraceState string
}

// carrier holds a step's trace context.
type carrier Step

var (
	_          propagation.TextMapCarrier = (*carrier)(nil)
	propagator propagation.TraceContext
)

func (c *carrier) Get(key string) string {
	switch key {
	case "traceparent":
		return c.TraceParent
	case "tracestate":
		return c.TraceState
	}
	return ""
}

func (*carrier) Set(string, string) {}
func (*carrier) Keys() []string     { return []string{"traceparent", "tracestate"} }

// BeginStep is Begin for a step.
func (l *Lease) BeginStep(ctx context.Context, received time.Time, s *Step) context.Context {
	if l == nil {
		return ctx
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.call = call{kind: StepRequest, received: received, begun: time.Now(), cache: s.Cache, step: s}
	p := &l.call.pending
	p.id, p.phase, p.begun = s.ID, phaseDecode, received
	if s.IndexOnly {
		p.phase = phasePrefill
	}
	p.ctx, p.span = l.startStep(ctx, s)
	return p.ctx
}

// EndStep is End for a step. stats are what an index-only step did.
func (l *Lease) EndStep(stats *kv.IndexStats, failure *Failure) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s, p := l.call.step, &l.call.pending
	m := moment{at: time.Now(), span: p.span.SpanContext()}
	c := l.caches[s.Cache]
	if failure != nil || c == nil {
		fail(p.span, failure)
		p.span.End(trace.WithTimestamp(m.at))
		l.answered(failure, &m)
		return
	}
	l.finish(c)
	p.open, p.last = true, m.at
	p.valid, p.tracks = c.step.valid[:0], c.step.tracks[:0]
	for i, n := range s.Lengths {
		if len(s.FirstValid) > 0 && n > 0 {
			n = max(n-s.FirstValid[i], 0)
		}
		p.valid = append(p.valid, n)
		p.tokens += uint64(n)
	}
	if p.phase == phaseDecode {
		p.tracks = l.budget.follow(p.tracks, s)
	}
	c.step = *p
	if m.span.IsSampled() {
		l.budget.trace = m.span.TraceID()
	}
	l.t.metrics.index(p.phase, stats.TokensIndexed, stats.TokensClaimed, stats.ChunksDrifted, stats.StatisticsRefreshed)
	if p.phase == phasePrefill {
		if p.span.IsRecording() {
			p.span.SetAttributes(indexAttributes(stats)...)
		}
		l.finish(c)
	}
	l.answered(nil, &m)
}

// finish ends a cache's step.
func (l *Lease) finish(c *cache) {
	s := &c.step
	if !s.open {
		return
	}
	s.open = false
	if s.span.IsRecording() {
		s.span.SetAttributes(s.attributes()...)
	}
	s.span.End(trace.WithTimestamp(s.last))
	m := moment{at: s.last, span: s.span.SpanContext()}
	l.t.metrics.step(s.phase, s.last.Sub(s.begun), &m)
	l.budget.stepped(s)
}

// CancelStep tells that no layer of a cache's step follows.
func (l *Lease) CancelStep(cache uint32) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.caches[cache]; c != nil {
		l.finish(c)
	}
}

// BeginLayer is Begin for a layer. It allocates nothing.
func (l *Lease) BeginLayer(ctx context.Context, received time.Time, cache uint32, layer int) context.Context {
	if l == nil {
		return ctx
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.call = call{kind: LayerRequest, received: received, begun: time.Now(), cache: cache, layer: layer, ctx: ctx}
	if c := l.caches[cache]; c != nil && c.step.ctx != nil {
		l.call.ctx, l.call.span = c.step.ctx, c.step.span
	}
	return l.call.ctx
}

// EndLayer is End for a layer; r is its result, unless there is a failure. It allocates nothing but for
// a sampled step.
func (l *Lease) EndLayer(r *gpu.LayerResult, failure *Failure) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	m := moment{at: time.Now()}
	if l.call.span != nil {
		m.span = l.call.span.SpanContext()
	}
	if failure == nil {
		l.ran(r, &m)
	}
	if m.span.IsSampled() || failure != nil {
		l.layerSpan(r, failure, &m)
	}
	l.answered(failure, &m)
}

// ArmedDone tells that an armed step is over: layers are the model's indices, results what became of
// them, as far as it came. It may be called beside Begin and End. A step that is not the cache's last
// has been told as over already.
func (l *Lease) ArmedDone(cache uint32, id uint64, layers []int, results []gpu.LayerResult, failure *Failure) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.caches[cache]
	if c == nil || c.step.id != id || c.step.span == nil {
		return
	}
	serving := l.call
	defer func() { l.call = serving }()
	m := moment{at: time.Now(), span: c.step.span.SpanContext()}
	begun := m.at
	for i := range results {
		begun = begun.Add(-results[i].Timing.Wall)
	}
	for i := range min(len(layers), len(results)) {
		r := &results[i]
		l.call = call{kind: LayerRequest, cache: cache, layer: layers[i], ctx: c.step.ctx, begun: begun}
		begun = begun.Add(r.Timing.Wall)
		m.at = begun
		l.ran(r, &m)
		if m.span.IsSampled() {
			l.layerSpan(r, nil, &m)
		}
	}
	if failure != nil {
		fail(c.step.span, failure)
	}
	l.finish(c)
}

// ran takes a layer's result.
func (l *Lease) ran(r *gpu.LayerResult, m *moment) {
	c := l.caches[l.call.cache]
	if c == nil {
		return
	}
	at := c.layers[l.call.layer]
	if at == nil {
		return
	}
	s := &c.step
	var dense uint64
	lists := listsOf(r, len(s.valid))
	if lists > 0 {
		dense = s.tokens * c.tokenBytes
	}
	at.series.add(r, s.valid, dense, m)
	phase := phaseDecode
	if lists == 0 { // no query
		phase = phasePrefill
	}
	l.t.metrics.index(phase, r.Index.TokensIndexed, r.Index.TokensClaimed, r.Index.ChunksDrifted, r.Index.StatisticsRefreshed)
	if lists == 0 || !s.open {
		return
	}
	at.budget.add(r, s.valid)
	s.add(r, lists, dense)
	s.last = m.at
	if at.answered != s.id {
		at.answered = s.id
		s.answered++
	}
	if s.answered == len(c.layers) {
		l.finish(c)
	}
}

// add takes the result of a layer of the step.
func (s *step) add(r *gpu.LayerResult, lists int, dense uint64) {
	s.totals.cache += r.Read.Cache
	s.totals.shadow += r.Read.Shadow
	s.totals.dense += dense
	for b, valid := range s.valid {
		var kept, candidates uint64
		for i := b * lists; i < (b+1)*lists; i++ {
			kept += uint64(r.Kept[i])
			candidates += uint64(r.Candidates[i])
		}
		s.totals.kept += kept
		s.totals.valid += uint64(valid) * uint64(lists)
		if b < len(s.tracks) && s.tracks[b] != nil {
			s.tracks[b].add(uint64(lists), kept, candidates)
		}
	}
}
