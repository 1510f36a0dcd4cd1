package telemetry

import (
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

// histogram counts values by bucket, without allocation. Its owner guards it.
type histogram struct {
	bounds    []float64
	counts    []uint64 // one more than bounds
	exemplars []exemplar
	sum       float64
	count     uint64
}

// exemplar is the last value of a bucket that was seen in a sampled span.
type exemplar struct {
	at    time.Time // zero: none
	value float64
	trace trace.TraceID
	span  trace.SpanID
}

func newHistogram(bounds []float64) histogram {
	buckets := len(bounds) + 1
	return histogram{bounds: bounds, counts: make([]uint64, buckets), exemplars: make([]exemplar, buckets)}
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
		h.exemplars[i] = exemplar{m.at, value, m.span.TraceID(), m.span.SpanID()}
	}
}

// point is a copy of the histogram's state.
func (h *histogram) point(start, now time.Time, set attribute.Set) metricdata.HistogramDataPoint[float64] {
	p := metricdata.HistogramDataPoint[float64]{
		Attributes: set, StartTime: start, Time: now,
		Count: h.count, Sum: h.sum, Bounds: h.bounds, BucketCounts: append([]uint64(nil), h.counts...),
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
