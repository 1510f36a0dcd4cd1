// Package telemetry makes spans, metrics, log fields and the budget page of what service/ tells it.
//
// One trace holds the engine's step, the daemon's step and its layers: each Step message brings the
// engine's W3C trace context, whose span is the parent of twilight.step. A sampled step carries a span
// for each layer with what every head kept; a step that is not sampled has no layer spans and costs no
// allocation on a layer. What metrics and the budget page need is added up in place and read when
// somebody asks.
//
// Tracing and pushed metrics are off until a standard OTEL_* variable turns them on: see Start.
// names.go lists and documents every name.
package telemetry
