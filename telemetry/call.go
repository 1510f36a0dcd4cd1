package telemetry

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// callKey names calls by what they have in common.
type callKey struct{ method, code string }

// BeginCall tells of a unary gRPC call, "package.Service/Method", whose headers may bring a trace. The
// function returned takes the status that it ends with, as in "INVALID_ARGUMENT", and whether that is the
// daemon's fault; the context is for what serves it. A nil Telemetry hears nothing.
//
// A gRPC stats.Handler would do the same, and be asked for every message of every lease.
func (t *Telemetry) BeginCall(ctx context.Context, method string, headers propagation.TextMapCarrier) (context.Context, func(code string, ours bool)) {
	if t == nil {
		return ctx, func(string, bool) {}
	}
	start := time.Now()
	ctx, span := t.tracer.Start(propagator.Extract(ctx, headers), method, trace.WithTimestamp(start),
		trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(semconv.RPCSystemNameGRPC, semconv.RPCMethod(method)))
	return ctx, func(code string, ours bool) {
		span.SetAttributes(semconv.RPCResponseStatusCode(code))
		if ours {
			span.SetStatus(codes.Error, "")
			span.SetAttributes(attribute.String(attrError, code))
		}
		now := time.Now()
		span.End(trace.WithTimestamp(now))
		t.metrics.call(callKey{method, code}, now.Sub(start), &moment{at: now, span: span.SpanContext()})
	}
}

func (m *metrics) call(key callKey, duration time.Duration, at *moment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.calls[key]
	if h == nil {
		made := newHistogram(secondsBounds)
		h = &made
		m.calls[key] = h
	}
	h.add(duration.Seconds(), at)
}

func (m *metrics) pageCalls(p *page) {
	for key, h := range m.calls {
		attributes := []attribute.KeyValue{
			semconv.RPCSystemNameGRPC, semconv.RPCMethod(key.method), semconv.RPCResponseStatusCode(key.code),
		}
		p.histogram(metricCall, h, attributes...)
	}
}
