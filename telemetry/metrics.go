package telemetry

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// Request is a kind of message of a lease.
type Request uint8

// The kinds.
const (
	RegisterRegion Request = iota
	ReleaseRegion
	RegisterCache
	ReleaseCache
	StepRequest
	LayerRequest
	CancelStep
	OtherRequest // of a kind that the daemon does not know
	requests
)

var requestNames = [requests]string{
	"register_region", "release_region", "register_cache", "release_cache", "step", "layer", "cancel_step", "other",
}

func (r Request) String() string { return requestNames[r] }

// The phases in which tokens are indexed, and steps are.
const (
	phasePrefill = iota
	phaseDecode
	phases
)

var phaseNames = [phases]string{"prefill", "decode"}

// metrics adds up what is scraped. It is a metric.Producer rather than a set of instruments: a layer
// brings thousands of values, which instruments would take one by one.
type metrics struct {
	start time.Time

	mu     sync.Mutex // guards what follows, but not series themselves
	series map[seriesKey]*series

	requests [requests]histogram
	wait     histogram
	steps    [phases]histogram
	errors   map[errorKey]uint64
	calls    map[callKey]*histogram
	indexed  [phases]indexCounts
	workers  workers

	active, leases, opened, regions, caches, lent, shadow atomic.Int64
	draining                                              atomic.Bool

	spans, spansDropped    atomic.Int64 // ended; of those, dropped since the queue was full
	exported, exportFailed atomic.Int64 // spans handed to the exporter; of those, lost
	pushed, pushFailed     atomic.Int64 // data points likewise
}

type errorKey struct {
	request Request
	code    string // of proto ErrorCode: a bounded set
}

type indexCounts struct{ indexed, claimed, drifted, refreshes uint64 }

var _ sdkmetric.Producer = (*metrics)(nil)

func newMetrics() *metrics {
	m := &metrics{
		start:  time.Now(),
		series: make(map[seriesKey]*series),
		wait:   newHistogram(secondsBounds),
		errors: make(map[errorKey]uint64),
		calls:  make(map[callKey]*histogram),

		workers: newWorkers(),
	}
	for i := range m.requests {
		m.requests[i] = newHistogram(secondsBounds)
	}
	for i := range m.steps {
		m.steps[i] = newHistogram(secondsBounds)
	}
	return m
}

// layer finds the series of a method and layer.
func (m *metrics) layer(method Method, layer int) *series {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := seriesKey{method, layer}
	if m.series[key] == nil && len(m.series) >= maxSeries {
		key = seriesKey{layer: overLayer}
	}
	s := m.series[key]
	if s == nil {
		s = newSeries()
		m.series[key] = s
	}
	return s
}

// answered takes a request that was answered, by an error if code is not "".
func (m *metrics) answered(r Request, code string, wait, whole time.Duration, at *moment) {
	m.active.Add(-1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[r].add(whole.Seconds(), at)
	m.wait.add(wait.Seconds(), at)
	if code != "" {
		m.errors[errorKey{r, code}]++
	}
}

func (m *metrics) step(phase int, duration time.Duration, at *moment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.steps[phase].add(duration.Seconds(), at)
}

func (m *metrics) index(phase int, indexed, claimed, drifted uint64, refreshes uint32) {
	if indexed|claimed|drifted|uint64(refreshes) == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &m.indexed[phase]
	c.indexed += indexed
	c.claimed += claimed
	c.drifted += drifted
	c.refreshes += uint64(refreshes)
}

// page gathers data points of metrics as they come up.
type page struct {
	start, now time.Time
	metrics    []metricdata.Metrics
	byName     map[string]int
}

func (p *page) data(d metric, empty metricdata.Aggregation) *metricdata.Metrics {
	i, ok := p.byName[d.name]
	if !ok {
		i = len(p.metrics)
		p.byName[d.name] = i
		p.metrics = append(p.metrics, metricdata.Metrics{Name: d.name, Unit: d.unit, Description: d.text, Data: empty})
	}
	return &p.metrics[i]
}

func (p *page) histogram(d metric, h *histogram, attributes ...attribute.KeyValue) {
	if h.count > 0 {
		p.distribution(d, h.point(p.start, p.now, attribute.NewSet(attributes...)))
	}
}

func (p *page) distribution(d metric, point metricdata.HistogramDataPoint[float64]) {
	m := p.data(d, metricdata.Histogram[float64]{Temporality: metricdata.CumulativeTemporality})
	data := m.Data.(metricdata.Histogram[float64])
	data.DataPoints = append(data.DataPoints, point)
	m.Data = data
}

// sum adds a point of a counter, or of an up-down counter.
func (p *page) sum(d metric, monotonic bool, value int64, attributes ...attribute.KeyValue) {
	m := p.data(d, metricdata.Sum[int64]{Temporality: metricdata.CumulativeTemporality, IsMonotonic: monotonic})
	data := m.Data.(metricdata.Sum[int64])
	data.DataPoints = append(data.DataPoints, metricdata.DataPoint[int64]{
		Attributes: attribute.NewSet(attributes...), StartTime: p.start, Time: p.now, Value: value,
	})
	m.Data = data
}

func (p *page) gauge(d metric, value int64, attributes ...attribute.KeyValue) {
	m := p.data(d, metricdata.Gauge[int64]{})
	data := m.Data.(metricdata.Gauge[int64])
	data.DataPoints = append(data.DataPoints, metricdata.DataPoint[int64]{
		Attributes: attribute.NewSet(attributes...), Time: p.now, Value: value,
	})
	m.Data = data
}

// Produce implements metric.Producer.
func (m *metrics) Produce(context.Context) ([]metricdata.ScopeMetrics, error) {
	p := &page{start: m.start, now: time.Now(), byName: make(map[string]int)}
	m.mu.Lock()
	all := maps.Clone(m.series)
	m.pageRequests(p)
	m.workers.page(p)
	m.mu.Unlock()
	for key, s := range all {
		s.page(p, key)
	}
	m.pageState(p)
	scopeMetrics := metricdata.ScopeMetrics{Metrics: p.metrics}
	scopeMetrics.Scope.Name = scope
	return []metricdata.ScopeMetrics{scopeMetrics}, nil
}

func (m *metrics) pageRequests(p *page) {
	for i := range m.requests {
		p.histogram(metricRequest, &m.requests[i], attribute.String(attrRequest, Request(i).String()))
	}
	m.pageCalls(p)
	p.histogram(metricQueue, &m.wait)
	for i := range m.steps {
		p.histogram(metricStep, &m.steps[i], attribute.String(attrPhase, phaseNames[i]))
	}
	for key, n := range m.errors {
		p.sum(metricErrors, true, int64(n), attribute.String(attrRequest, key.request.String()), attribute.String(attrError, key.code))
	}
	var drifted, refreshes uint64
	for i, c := range m.indexed {
		phase := attribute.String(attrPhase, phaseNames[i])
		p.sum(metricIndexed, true, int64(c.indexed), phase, attribute.String(attrOutcome, "indexed"))
		p.sum(metricIndexed, true, int64(c.claimed), phase, attribute.String(attrOutcome, "claimed"))
		drifted += c.drifted
		refreshes += c.refreshes
	}
	p.sum(metricDrifted, true, int64(drifted))
	p.sum(metricRefreshes, true, int64(refreshes))
}

func (m *metrics) pageState(p *page) {
	p.sum(metricActive, false, m.active.Load())
	p.sum(metricLeases, false, m.leases.Load())
	p.sum(metricOpened, true, m.opened.Load())
	p.sum(metricRegions, false, m.regions.Load())
	p.sum(metricCaches, false, m.caches.Load())
	p.sum(metricLent, false, m.lent.Load())
	p.sum(metricShadow, false, m.shadow.Load())
	p.gauge(metricDraining, number(m.draining.Load()))

	lossy := func(d metric, part string, all, lost int64, why string) {
		component := attribute.String(attrPart, part)
		p.sum(d, true, all-lost, component)
		p.sum(d, true, lost, component, attribute.String(attrError, why))
	}
	lossy(metricSpans, "batching_span_processor", m.spans.Load(), m.spansDropped.Load(), "queue_full")
	lossy(metricExported, "otlp_span_exporter", m.exported.Load(), m.exportFailed.Load(), "export_failed")
	lossy(metricPushed, "otlp_metric_exporter", m.pushed.Load(), m.pushFailed.Load(), "export_failed")
}

func (s *series) page(p *page, key seriesKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	series := []attribute.KeyValue{attribute.Bool(attrOver, true)}
	if key.layer != overLayer {
		series = []attribute.KeyValue{
			attribute.Int(attrLayer, key.layer),
			attribute.String(attrSelector, key.Selector),
			attribute.String(attrEstimator, key.Estimator),
			attribute.String(attrPruner, key.Pruner),
		}
	}
	with := func(more ...attribute.KeyValue) []attribute.KeyValue { return append(slices.Clip(series), more...) }
	for _, h := range []struct {
		metric
		*histogram
	}{
		{metricKept, &s.kept},
		{metricCandidates, &s.candidates},
		{metricValid, &s.valid},
		{metricMass, &s.mass},
		{metricCoverage, &s.coverage},
		{metricTrueMass, &s.trueMass},
		{metricError, &s.outError},
		{metricLayer, &s.duration},
	} {
		p.histogram(h.metric, h.histogram, series...)
	}
	for i := range s.stages {
		p.histogram(metricStage, &s.stages[i], with(attribute.String(attrStage, stageNames[i]))...)
	}
	for path := range s.rows {
		for reason, n := range s.rows[path] {
			if n > 0 {
				p.sum(metricRows, true, int64(n), with(
					attribute.String(attrPath, name(pathNames[:], uint8(path))),
					attribute.String(attrReason, name(reasonNames[:], uint8(reason))),
				)...)
			}
		}
	}
	p.sum(metricRead, true, int64(s.readCache), with(attribute.String(attrSource, "cache"))...)
	p.sum(metricRead, true, int64(s.readShadow), with(attribute.String(attrSource, "shadow"))...)
	p.sum(metricReadDense, true, int64(s.readDense), series...)
}
