package telemetry

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// askTimeout bounds what somebody who looks waits for other processes.
const askTimeout = 500 * time.Millisecond

// Ask asks another process for its Report.
type Ask func(ctx context.Context, sequence uint64) (report []byte, err error)

// Source is another process that serves leases. What it counts and keeps is told as if it were this one's.
type Source struct {
	t   *Telemetry
	ask Ask

	mu     sync.Mutex
	number uint64 // of the report that last is of
	last   []sample
}

// Gather adds a source. A nil Telemetry returns one that is asked for nothing.
func (t *Telemetry) Gather(ask Ask) *Source {
	s := &Source{t: t, ask: ask}
	if t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.sources[s] = struct{}{}
	}
	return s
}

// Refresh asks for a report, and keeps it for times when there is none.
func (s *Source) Refresh(ctx context.Context) error {
	_, err := s.report(ctx, 0)
	return err
}

// End takes leave of a source. What it counted until its last report, or that given, if any, stays counted.
func (s *Source) End(report []byte) {
	if r, err := decode(report); err == nil {
		s.keep(r)
	}
	if s.t == nil {
		return
	}
	s.t.mu.Lock()
	defer s.t.mu.Unlock()
	if _, known := s.t.sources[s]; !known {
		return
	}
	delete(s.t.sources, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.last {
		if p.Kind == counter || p.Kind == distribution {
			s.t.ended.add(p)
		}
	}
}

func (s *Source) report(ctx context.Context, sequence uint64) (*report, error) {
	data, err := s.ask(ctx, sequence)
	if err != nil {
		return nil, err
	}
	r, err := decode(data)
	if err != nil {
		return nil, err
	}
	s.keep(r)
	return r, nil
}

// keep keeps a report, unless a later one was faster: counters do not go back.
func (s *Source) keep(r *report) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Number > s.number {
		s.number, s.last = r.Number, r.Samples
	}
}

// gather asks all sources at once. Of one that does not answer in time only what it counted last is told.
func (t *Telemetry) gather(ctx context.Context, sequence uint64) (samples []sample, leases []LeaseSnapshot) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	t.mu.Lock()
	sources := slices.Collect(maps.Keys(t.sources))
	t.mu.Unlock()
	reports := make([]*report, len(sources))
	var asking sync.WaitGroup
	for i, s := range sources {
		asking.Go(func() { reports[i], _ = s.report(ctx, sequence) }) // a heartbeat sees to those that fail
	}
	asking.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	samples = t.ended.samples()
	for i, s := range sources {
		if _, known := t.sources[s]; known { // else it is among the ended
			s.mu.Lock()
			samples = append(samples, s.last...)
			s.mu.Unlock()
			var some []LeaseSnapshot
			if reports[i] != nil && json.Unmarshal(reports[i].Leases, &some) == nil {
				leases = append(leases, some...)
			}
		}
	}
	return samples, leases
}

// report is what a process tells of itself.
type report struct {
	Number  uint64 // 1 is the first of the process
	Samples []sample
	Leases  []byte // JSON, in which what is empty stays so
}

// The kinds of metrics.
const (
	gauge = iota
	level // a sum that goes up and down
	counter
	distribution
)

// sample is a data point of a metric, since the process started.
type sample struct {
	Name, Unit, Text string
	Kind             int
	Attributes       []keyValue
	Value            int64 // of all kinds but distribution
	Count            uint64
	Sum              float64
	Bounds           []float64
	Buckets          []uint64
	Exemplars        []seen
}

// seen is an exemplar.
type seen struct {
	At          time.Time
	Value       float64
	Trace, Span []byte
}

// keyValue is an attribute; Value is a string, bool or int64.
type keyValue struct {
	Key   string
	Value any
}

// Report is what another process may Gather: all that is counted here, and the leases, of which sequence
// chooses whose budget is told, as in Snapshot.
func (t *Telemetry) Report(ctx context.Context, sequence uint64) ([]byte, error) {
	var r report
	t.reporting.Lock()
	t.reports++
	r.Number = t.reports
	own, err := t.metrics.Produce(ctx)
	t.reporting.Unlock()
	if err != nil {
		return nil, err
	}
	if r.Leases, err = json.Marshal(t.leaseSnapshots(sequence)); err != nil {
		return nil, err
	}
	for i := range own {
		r.Samples = append(r.Samples, samplesOf(own[i].Metrics)...)
	}
	var buffer bytes.Buffer
	err = gob.NewEncoder(&buffer).Encode(&r)
	return buffer.Bytes(), err
}

func decode(data []byte) (*report, error) {
	var r report
	if err := gob.NewDecoder(bytes.NewReader(data)).Decode(&r); err != nil {
		return nil, fmt.Errorf("report of another process: %w", err)
	}
	return &r, nil
}

// samplesOf are the data points of metrics as page makes them.
func samplesOf(all []metricdata.Metrics) (samples []sample) {
	for i := range all {
		m := &all[i]
		p := sample{Name: m.Name, Unit: m.Unit, Text: m.Description}
		add := func(kind int, set attribute.Set, more func(*sample)) {
			q := p
			q.Kind = kind
			for _, kv := range set.ToSlice() {
				q.Attributes = append(q.Attributes, keyValue{string(kv.Key), kv.Value.AsInterface()})
			}
			more(&q)
			samples = append(samples, q)
		}
		switch data := m.Data.(type) {
		case metricdata.Gauge[int64]:
			for _, d := range data.DataPoints {
				add(gauge, d.Attributes, func(q *sample) { q.Value = d.Value })
			}
		case metricdata.Sum[int64]:
			kind := level
			if data.IsMonotonic {
				kind = counter
			}
			for _, d := range data.DataPoints {
				add(kind, d.Attributes, func(q *sample) { q.Value = d.Value })
			}
		case metricdata.Histogram[float64]:
			for _, d := range data.DataPoints {
				add(distribution, d.Attributes, func(q *sample) {
					q.Count, q.Sum, q.Bounds, q.Buckets = d.Count, d.Sum, d.Bounds, d.BucketCounts
					for _, e := range d.Exemplars {
						q.Exemplars = append(q.Exemplars, seen{e.Time, e.Value, e.TraceID, e.SpanID})
					}
				})
			}
		}
	}
	return samples
}

func (p *sample) set() attribute.Set {
	list := make([]attribute.KeyValue, len(p.Attributes))
	for i, kv := range p.Attributes {
		switch value := kv.Value.(type) {
		case string:
			list[i] = attribute.String(kv.Key, value)
		case bool:
			list[i] = attribute.Bool(kv.Key, value)
		case int64:
			list[i] = attribute.Int64(kv.Key, value)
		}
	}
	return attribute.NewSet(list...)
}

// sums adds up samples that have the name and the attributes in common.
type sums struct {
	byName map[sampleKey]*sample
	order  []*sample
}

type sampleKey struct {
	name string
	set  attribute.Distinct
}

func (s *sums) add(p sample) {
	set := p.set()
	key := sampleKey{p.Name, set.Equivalent()}
	sum := s.byName[key]
	if sum == nil {
		if s.byName == nil {
			s.byName = make(map[sampleKey]*sample)
		}
		p.Buckets, p.Exemplars = slices.Clone(p.Buckets), slices.Clone(p.Exemplars)
		s.byName[key] = &p
		s.order = append(s.order, &p)
		return
	}
	if sum.Kind != p.Kind || len(sum.Buckets) != len(p.Buckets) {
		return // of another build
	}
	sum.Value += p.Value
	sum.Count += p.Count
	sum.Sum += p.Sum
	for i, n := range p.Buckets {
		sum.Buckets[i] += n
	}
	sum.Exemplars = latest(append(sum.Exemplars, p.Exemplars...), sum.Bounds)
}

// latest keeps the last exemplar of each bucket.
func latest(all []seen, bounds []float64) []seen {
	byBucket := make(map[int]seen)
	for _, e := range all {
		i, _ := slices.BinarySearch(bounds, e.Value)
		if old, known := byBucket[i]; !known || e.At.After(old.At) {
			byBucket[i] = e
		}
	}
	kept := all[:0]
	for _, i := range slices.Sorted(maps.Keys(byBucket)) {
		kept = append(kept, byBucket[i])
	}
	return kept
}

// samples are copies.
func (s *sums) samples() []sample {
	list := make([]sample, len(s.order))
	for i, p := range s.order {
		list[i] = *p
		list[i].Buckets, list[i].Exemplars = slices.Clone(p.Buckets), slices.Clone(p.Exemplars)
	}
	return list
}

// producer tells what this process and its sources count.
type producer struct{ *Telemetry }

var _ sdkmetric.Producer = producer{}

// Produce implements metric.Producer.
func (p producer) Produce(ctx context.Context) ([]metricdata.ScopeMetrics, error) {
	own, err := p.metrics.Produce(ctx)
	if err != nil {
		return nil, err
	}
	others, _ := p.gather(ctx, 0)
	if len(others) == 0 {
		return own, nil
	}
	var all sums
	for _, s := range samplesOf(own[0].Metrics) {
		all.add(s)
	}
	for _, s := range others {
		if s.Kind != gauge { // those are of the process
			all.add(s)
		}
	}
	page := &page{start: p.metrics.start, now: time.Now(), byName: make(map[string]int)}
	for _, s := range all.order {
		page.add(s)
	}
	own[0].Metrics = page.metrics
	return own, nil
}

// add adds a sample of any kind.
func (p *page) add(q *sample) {
	d := metric{q.Name, q.Unit, q.Text}
	set := q.set()
	switch q.Kind {
	case gauge:
		p.gauge(d, q.Value, set.ToSlice()...)
	case level, counter:
		p.sum(d, q.Kind == counter, q.Value, set.ToSlice()...)
	case distribution:
		point := metricdata.HistogramDataPoint[float64]{
			Attributes: set, StartTime: p.start, Time: p.now, Count: q.Count, Sum: q.Sum, Bounds: q.Bounds, BucketCounts: q.Buckets,
		}
		for _, e := range q.Exemplars {
			point.Exemplars = append(point.Exemplars, metricdata.Exemplar[float64]{Time: e.At, Value: e.Value, TraceID: e.Trace, SpanID: e.Span})
		}
		p.distribution(d, point)
	}
}
