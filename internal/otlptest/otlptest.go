// Package otlptest is an OpenTelemetry collector for tests: it takes OTLP over gRPC and keeps it.
package otlptest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
)

// patience bounds every wait: what takes longer never comes.
const patience = 10 * time.Second

// Collector takes spans and metrics. It is safe for concurrent use.
type Collector struct {
	// Endpoint is what OTEL_EXPORTER_OTLP_ENDPOINT takes.
	Endpoint string

	behave func(context.Context) error

	mu       sync.Mutex
	spans    []*tracepb.Span
	metrics  map[string]*metricspb.Metric
	resource map[string]*commonpb.AnyValue
}

// Start starts a collector that ends with the test. behave, if not nil, is called for each request, which
// it may delay or refuse.
func Start(t testing.TB, behave func(context.Context) error) *Collector {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Collector{
		Endpoint: "http://" + l.Addr().String(), behave: behave,
		metrics: make(map[string]*metricspb.Metric), resource: make(map[string]*commonpb.AnyValue),
	}
	s := grpc.NewServer()
	collectortrace.RegisterTraceServiceServer(s, &traces{Collector: c})
	collectormetrics.RegisterMetricsServiceServer(s, &metrics{Collector: c})
	var serving sync.WaitGroup
	serving.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		s.Stop()
		serving.Wait()
	})
	return c
}

func (c *Collector) allow(ctx context.Context) error {
	if c.behave == nil {
		return nil
	}
	return c.behave(ctx)
}

type traces struct {
	collectortrace.UnimplementedTraceServiceServer
	*Collector
}

func (t *traces) Export(ctx context.Context, req *collectortrace.ExportTraceServiceRequest) (*collectortrace.ExportTraceServiceResponse, error) {
	if err := t.allow(ctx); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range req.GetResourceSpans() {
		for _, a := range r.GetResource().GetAttributes() {
			t.resource[a.GetKey()] = a.GetValue()
		}
		for _, s := range r.GetScopeSpans() {
			t.spans = append(t.spans, s.GetSpans()...)
		}
	}
	return &collectortrace.ExportTraceServiceResponse{}, nil
}

type metrics struct {
	collectormetrics.UnimplementedMetricsServiceServer
	*Collector
}

func (m *metrics) Export(ctx context.Context, req *collectormetrics.ExportMetricsServiceRequest) (*collectormetrics.ExportMetricsServiceResponse, error) {
	if err := m.allow(ctx); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range req.GetResourceMetrics() {
		for _, s := range r.GetScopeMetrics() {
			for _, metric := range s.GetMetrics() {
				m.metrics[metric.GetName()] = metric
			}
		}
	}
	return &collectormetrics.ExportMetricsServiceResponse{}, nil
}

// Spans are those received so far, in the order they came.
func (c *Collector) Spans() []*tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]*tracepb.Span(nil), c.spans...)
}

// Metric is what was last received of a metric; nil if nothing was.
func (c *Collector) Metric(name string) *metricspb.Metric {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.metrics[name]
}

// Resource is an attribute of the resource that sent spans.
func (c *Collector) Resource(key string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.resource[key].GetStringValue()
}

// Wait waits until ok, which may ask the collector.
func (c *Collector) Wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// Attribute is an attribute's value as Go has it: a string, int64, float64, bool, or []any of those; nil
// if there is none.
func Attribute(attributes []*commonpb.KeyValue, key string) any {
	for _, a := range attributes {
		if a.GetKey() == key {
			return value(a.GetValue())
		}
	}
	return nil
}

func value(v *commonpb.AnyValue) any {
	switch v := v.GetValue().(type) {
	case *commonpb.AnyValue_StringValue:
		return v.StringValue
	case *commonpb.AnyValue_IntValue:
		return v.IntValue
	case *commonpb.AnyValue_DoubleValue:
		return v.DoubleValue
	case *commonpb.AnyValue_BoolValue:
		return v.BoolValue
	case *commonpb.AnyValue_ArrayValue:
		list := []any{}
		for _, item := range v.ArrayValue.GetValues() {
			list = append(list, value(item))
		}
		return list
	}
	return nil
}
