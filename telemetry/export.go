package telemetry

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync/atomic"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// spanQueue hands spans to the SDK's batch processor for as long as its queue has room, and counts those
// for which it has none: the processor drops them without a word.
type spanQueue struct {
	sdktrace.SpanProcessor
	metrics *metrics
	limit   int64
	queued  atomic.Int64 // not yet exported
}

// newSpanQueue makes a queue of OTEL_BSP_MAX_QUEUE_SIZE spans in front of an exporter.
func newSpanQueue(spans sdktrace.SpanExporter, m *metrics, complain func(error)) *spanQueue {
	q := &spanQueue{metrics: m, limit: sdktrace.DefaultMaxQueueSize}
	if n, err := strconv.ParseInt(os.Getenv("OTEL_BSP_MAX_QUEUE_SIZE"), 10, 32); err == nil && n > 0 {
		q.limit = n
	}
	q.SpanProcessor = sdktrace.NewBatchSpanProcessor(&countedSpans{SpanExporter: spans, queue: q, complain: complain},
		sdktrace.WithMaxQueueSize(int(q.limit)))
	return q
}

// OnEnd implements sdktrace.SpanProcessor.
func (q *spanQueue) OnEnd(s sdktrace.ReadOnlySpan) {
	if !s.SpanContext().IsSampled() {
		return
	}
	q.metrics.spans.Add(1)
	if q.queued.Add(1) > q.limit {
		q.queued.Add(-1)
		q.metrics.spansDropped.Add(1)
		return
	}
	q.SpanProcessor.OnEnd(s)
}

// countedSpans counts what an exporter loses.
type countedSpans struct {
	sdktrace.SpanExporter
	queue    *spanQueue
	complain func(error)
}

// ExportSpans implements sdktrace.SpanExporter. Errors are told here, not to the SDK's global handler.
func (c *countedSpans) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	n := int64(len(spans))
	defer c.queue.queued.Add(-n)
	c.queue.metrics.exported.Add(n)
	if err := c.SpanExporter.ExportSpans(ctx, spans); err != nil {
		c.queue.metrics.exportFailed.Add(n)
		c.complain(err)
	}
	return nil
}

// countedMetrics counts what an exporter loses.
type countedMetrics struct {
	sdkmetric.Exporter
	metrics  *metrics
	complain func(error)
}

// Export implements sdkmetric.Exporter. Errors are told here, not to the SDK's global handler.
func (c *countedMetrics) Export(ctx context.Context, data *metricdata.ResourceMetrics) error {
	n := points(data)
	c.metrics.pushed.Add(n)
	if err := c.Exporter.Export(ctx, data); err != nil && !errors.Is(err, sdkmetric.ErrExporterShutdown) {
		c.metrics.pushFailed.Add(n)
		c.complain(err)
	}
	return nil
}

// points counts data points.
func points(data *metricdata.ResourceMetrics) (n int64) {
	for _, s := range data.ScopeMetrics {
		for _, m := range s.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Histogram[float64]:
				n += int64(len(d.DataPoints))
			case metricdata.Histogram[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Sum[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Sum[float64]:
				n += int64(len(d.DataPoints))
			case metricdata.Gauge[int64]:
				n += int64(len(d.DataPoints))
			case metricdata.Gauge[float64]:
				n += int64(len(d.DataPoints))
			}
		}
	}
	return n
}
