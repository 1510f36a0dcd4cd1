package telemetry

import (
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
)

// The upper bounds of histograms' buckets.
var (
	tokenBounds   = []float64{16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072}
	shareBounds   = []float64{.5, .6, .7, .75, .8, .85, .9, .95, .975, .99, 1}
	errorBounds   = []float64{.001, .003, .01, .03, .1, .3, 1}
	secondsBounds = []float64{
		1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, .01, .025, .05, .1, .25, .5, 1, 2.5, 10,
	}
)

// maxBuckets is one more than the longest bounds.
const maxBuckets = 19

// histogram counts values by bucket, without allocation but for the first exemplar. Its owner guards it.
type histogram struct {
	bounds    []float64
	exemplars *[maxBuckets]exemplar // nil until there is one
	sum       float64
	count     uint64
	counts    [maxBuckets]uint64 // here, not elsewhere: a layer finds its histograms out of the cache
}

// exemplar is the last value of a bucket that was seen in a sampled span.
type exemplar struct {
	at    time.Time // zero: none
	value float64
	trace trace.TraceID
	span  trace.SpanID
}

func newHistogram(bounds []float64) histogram {
	return histogram{bounds: bounds}
}

// moment is when, and in which sampled span if any, values are seen.
type moment struct {
	at   time.Time
	span trace.SpanContext
}

func (h *histogram) add(value float64, m *moment) {
	i := 0
	for i < len(h.bounds) && value > h.bounds[i] {
		i++
	}
	h.counts[i]++
	h.count++
	h.sum += value
	if m.span.IsSampled() {
		if h.exemplars == nil {
			h.exemplars = new([maxBuckets]exemplar)
		}
		h.exemplars[i] = exemplar{m.at, value, m.span.TraceID(), m.span.SpanID()}
	}
}

// point is a copy of the histogram's state.
func (h *histogram) point(start, now time.Time, set attribute.Set) metricdata.HistogramDataPoint[float64] {
	p := metricdata.HistogramDataPoint[float64]{
		Attributes: set, StartTime: start, Time: now,
		Count: h.count, Sum: h.sum, Bounds: h.bounds, BucketCounts: slices.Clone(h.counts[:len(h.bounds)+1]),
	}
	if h.exemplars == nil {
		return p
	}
	for _, e := range h.exemplars {
		if !e.at.IsZero() {
			p.Exemplars = append(p.Exemplars, metricdata.Exemplar[float64]{
				Time: e.at, Value: e.value, TraceID: e.trace[:], SpanID: e.span[:],
			})
		}
	}
	return p
}
