package service

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/internal/otlptest"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// The engine's spans, by what it says of them.
const (
	engineTrace   = "0af7651916cd43dd8448eb211c80319c"
	engineSpan    = "b7ad6b7169203331"
	sampledParent = "00-" + engineTrace + "-" + engineSpan + "-01"
	otherParent   = "00-aaf7651916cd43dd8448eb211c80319c-" + engineSpan + "-00" // not sampled
)

// told starts telemetry that tells a collector, by the environment as a user sets it.
func told(t testing.TB, c *otlptest.Collector, env ...string) *telemetry.Telemetry {
	t.Helper()
	set := func(name, value string) {
		if setter, ok := t.(interface{ Setenv(string, string) }); ok {
			setter.Setenv(name, value)
		}
	}
	set("OTEL_EXPORTER_OTLP_ENDPOINT", c.Endpoint)
	set("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	set("OTEL_BSP_SCHEDULE_DELAY", "10")
	set("OTEL_METRIC_EXPORT_INTERVAL", "100")
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		set(name, value)
	}
	log := &logBuffer{}
	telling, err := telemetry.Start(t.Context(), telemetry.Options{
		Version: "test", Instance: "1", Logger: slog.New(slog.NewJSONHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = telling.Shutdown(ctx)
	})
	return telling
}

// tracedEngine is an engine on a lease with two query heads, each with a list of its own, and a cache of
// one layer in lent memory.
func tracedEngine(t testing.TB, config Config) (*daemon, *engine) {
	t.Helper()
	d := startHost(t, config)
	e := d.openWith(everything)
	e.must(registerRegion(1, 1, e.lendFD(share(t).fd)))
	e.must(registerCache(1))
	return d, e
}

func tracedStep(id uint64, parent string) *twilightv1.LeaseRequest {
	s := step(id)
	s.GetStep().Traceparent, s.GetStep().Tracestate = parent, "vendor=1"
	return s
}

func realLayer(id uint64) *twilightv1.LeaseRequest {
	l := layer(id)
	l.GetLayer().Query = &twilightv1.Layer_QueryInline{QueryInline: encode(randomQuery())}
	return l
}

func spansNamed(c *otlptest.Collector, name string) (found []*tracepb.Span) {
	for _, s := range c.Spans() {
		if s.GetName() == name {
			found = append(found, s)
		}
	}
	return found
}

func attr(s *tracepb.Span, key string) any { return otlptest.Attribute(s.GetAttributes(), key) }

// ints is an array attribute.
func ints[T uint32 | int](values []T) (list []any) {
	for _, v := range values {
		list = append(list, int64(v))
	}
	return list
}

func TestTrace(t *testing.T) {
	c := otlptest.Start(t, nil)
	_, e := tracedEngine(t, Config{Telemetry: told(t, c)})
	e.must(tracedStep(1, sampledParent))
	got := e.must(realLayer(1)).GetLayerResult()
	c.Wait(t, "the spans", func() bool {
		return len(spansNamed(c, "twilight.step")) == 1 && len(spansNamed(c, "twilight.attend")) == 1
	})
	if got := c.Resource("service.name"); got != "twilightd" {
		t.Errorf("service.name %q", got)
	}

	step := spansNamed(c, "twilight.step")[0]
	if hex.EncodeToString(step.GetTraceId()) != engineTrace || hex.EncodeToString(step.GetParentSpanId()) != engineSpan ||
		step.GetTraceState() != "vendor=1" || step.GetKind() != tracepb.Span_SPAN_KIND_SERVER {
		t.Errorf("step %v does not hang on the engine's", step)
	}
	for key, want := range map[string]any{
		"twilight.step.id": int64(1), "twilight.step.prefill": false, "twilight.step.sequences": int64(1), "twilight.step.tokens": int64(20),
		"twilight.step.layers": int64(1), "twilight.tokens.kept": int64(40), "twilight.tokens.valid": int64(40),
		"twilight.engine.name": "test", "twilight.device.id": "host", "twilight.selector": "none", "twilight.pruner": "top_p",
		"twilight.read.dense": int64(20 * 2 * dim * 4),
	} {
		if got := attr(step, key); got != want {
			t.Errorf("step: %s is %v, want %v", key, got, want)
		}
	}

	layers := spansNamed(c, "twilight.layer")
	if len(layers) != 1 || string(layers[0].GetParentSpanId()) != string(step.GetSpanId()) {
		t.Fatalf("layers %v under step %x", layers, step.GetSpanId())
	}
	layer := layers[0]
	for key, want := range map[string][]any{
		"twilight.row.kept":       ints(got.GetKept()),
		"twilight.row.candidates": ints(got.GetCandidates()),
		"twilight.row.path":       {"sparse", "sparse"},
		"twilight.row.reason":     {"", ""},
		"twilight.head.mass":      {float64(got.GetEstimatedMass()[0]), float64(got.GetEstimatedMass()[1])},
		"twilight.head.coverage":  {float64(got.GetEstimatedCoverage()[0]), float64(got.GetEstimatedCoverage()[1])},
	} {
		if got, ok := attr(layer, key).([]any); !ok || !slices.Equal(got, want) {
			t.Errorf("layer: %s is %v, want %v", key, attr(layer, key), want)
		}
	}
	if got, read := attr(layer, "twilight.read.cache"), int64(2*20*2*dim*4); got != read { // both heads: all keys, all values
		t.Errorf("layer: read %v bytes, want %v", got, read)
	}

	end := layer.GetStartTimeUnixNano()
	for _, stage := range []string{"twilight.select", "twilight.prune", "twilight.attend"} {
		spans := spansNamed(c, stage)
		if len(spans) != 1 || string(spans[0].GetParentSpanId()) != string(layer.GetSpanId()) {
			t.Fatalf("%s: %v", stage, spans)
		}
		s := spans[0]
		if s.GetStartTimeUnixNano() < end || s.GetEndTimeUnixNano() < s.GetStartTimeUnixNano() || s.GetEndTimeUnixNano() > layer.GetEndTimeUnixNano() {
			t.Errorf("%s is not in its place", stage)
		}
		end = s.GetEndTimeUnixNano()
		if busy, ok := attr(s, "twilight.stage.busy").(int64); !ok || busy <= 0 {
			t.Errorf("%s: busy %v", stage, attr(s, "twilight.stage.busy"))
		}
	}
	if step.GetEndTimeUnixNano() != layer.GetEndTimeUnixNano() {
		t.Error("the step does not end with its last layer")
	}
}

// What is refused is a span with an error, in the engine's trace.
func TestTraceOfErrors(t *testing.T) {
	c := otlptest.Start(t, nil)
	telling := told(t, c)
	d, e := tracedEngine(t, Config{Telemetry: telling})
	e.must(tracedStep(1, sampledParent))
	bad := realLayer(1)
	bad.GetLayer().P = []float32{2}
	refusedLayer := e.ask(bad).GetError()
	lost := tracedStep(2, sampledParent)
	lost.GetStep().CacheId = 7
	refusedStep := e.ask(lost).GetError()
	invalid := tracedStep(0, sampledParent)
	e.ask(invalid)
	e.ask(request(&twilightv1.ReleaseRegion{RegionId: 9}))
	e.must(realLayer(1))

	c.Wait(t, "the spans", func() bool {
		return len(spansNamed(c, "twilight.step")) == 3 && len(spansNamed(c, "twilight.layer")) == 2
	})
	errs := make(map[string]string)
	for _, s := range c.Spans() {
		if s.GetStatus().GetCode() != tracepb.Status_STATUS_CODE_ERROR {
			continue
		}
		if hex.EncodeToString(s.GetTraceId()) != engineTrace {
			t.Errorf("%s is not in the engine's trace", s.GetName())
		}
		key := fmt.Sprint(s.GetName(), " ", attr(s, "twilight.step.id"))
		errs[key] = fmt.Sprint(attr(s, "error.type"), " ", attr(s, "twilight.error.field"), ": ", s.GetStatus().GetMessage())
	}
	for key, want := range map[string]string{
		"twilight.layer <nil>": "invalid_argument layer.p[0]: " + refusedLayer.GetMessage(),
		"twilight.step 2":      "not_found step.cache_id: " + refusedStep.GetMessage(),
	} {
		if errs[key] != want {
			t.Errorf("%s: %q, want %q", key, errs[key], want)
		}
	}
	if got := errs["twilight.step 0"]; !strings.HasPrefix(got, "invalid_argument step.step_id: ") {
		t.Errorf("a step that breaks a rule: %q", got)
	}
	c.Wait(t, "the counts of errors", func() bool {
		counts := make(map[string]int64)
		for _, p := range c.Metric("twilight.request.errors").GetSum().GetDataPoints() {
			counts[fmt.Sprint(otlptest.Attribute(p.GetAttributes(), "twilight.request"), " ", otlptest.Attribute(p.GetAttributes(), "error.type"))] = p.GetAsInt()
		}
		return counts["layer invalid_argument"] == 1 && counts["step not_found"] == 1 && counts["step invalid_argument"] == 1 &&
			counts["release_region not_found"] == 1
	})

	// The log has the ids of the engine's trace, and nothing that opens a door.
	log := d.log.String()
	for line := range strings.Lines(log) {
		if strings.Contains(line, "layer.p[0]") && !strings.Contains(line, `"trace_id":"`+engineTrace+`"`) {
			t.Errorf("no trace in %s", line)
		}
	}
	if !strings.Contains(log, "layer.p[0]") || strings.Contains(log, string(e.opened.GetToken())) ||
		strings.Contains(log, hex.EncodeToString(e.opened.GetToken())) || strings.Contains(log, "0xc0") {
		t.Errorf("log %s", log)
	}
}

// An engine that samples nothing has nothing sampled; steps without a parent follow OTEL_TRACES_SAMPLER.
func TestSampling(t *testing.T) {
	c := otlptest.Start(t, nil)
	telling := told(t, c, "OTEL_TRACES_SAMPLER=parentbased_always_on")
	_, e := tracedEngine(t, Config{Telemetry: telling})
	e.must(tracedStep(1, otherParent))
	e.must(realLayer(1))
	e.must(tracedStep(2, ""))
	e.must(realLayer(2))
	e.must(tracedStep(3, "no trace context"))
	e.must(realLayer(3))
	prefill := tracedStep(4, "")
	prefill.GetStep().IndexOnly = true
	e.must(prefill)
	c.Wait(t, "the spans", func() bool { return len(spansNamed(c, "twilight.step")) == 3 })
	registered := spansNamed(c, "twilight.register_cache")
	opened := spansNamed(c, "twilight.v1.TwilightService/OpenLease")
	if len(registered) != 1 || len(opened) != 1 || string(registered[0].GetParentSpanId()) != string(opened[0].GetSpanId()) {
		t.Errorf("opened by %v, registered by %v", opened, registered)
	}
	for i, s := range spansNamed(c, "twilight.step") {
		if attr(s, "twilight.step.id") != int64(i+2) || len(s.GetParentSpanId()) != 0 {
			t.Errorf("step %v", s)
		}
		if len(s.GetLinks()) != 1 || string(s.GetLinks()[0].GetSpanId()) != string(opened[0].GetSpanId()) {
			t.Errorf("links %v", s.GetLinks())
		}
	}
	if spans := spansNamed(c, "twilight.v1.TwilightService/Lease"); len(spans) != 0 {
		t.Errorf("the lease has spans: %v", spans)
	}
}

func TestPushedMetrics(t *testing.T) {
	c := otlptest.Start(t, nil)
	_, e := tracedEngine(t, Config{Telemetry: told(t, c)})
	const steps = 3
	for id := range uint64(steps) {
		e.must(tracedStep(id+1, sampledParent))
		e.must(realLayer(id + 1))
	}
	var kept *metricspb.HistogramDataPoint
	c.Wait(t, "the rows of all steps", func() bool {
		points := c.Metric("twilight.row.kept").GetHistogram().GetDataPoints()
		if len(points) == 1 {
			kept = points[0]
		}
		return kept.GetCount() == 2*steps
	})
	if kept.GetSum() != 2*20*steps || c.Metric("twilight.row.kept").GetUnit() != "{token}" ||
		otlptest.Attribute(kept.GetAttributes(), "twilight.layer.index") != int64(0) ||
		otlptest.Attribute(kept.GetAttributes(), "twilight.pruner") != "top_p" {
		t.Errorf("kept: %v", kept)
	}
	if x := kept.GetExemplars(); len(x) != 1 || hex.EncodeToString(x[0].GetTraceId()) != engineTrace || x[0].GetAsDouble() != 20 {
		t.Errorf("exemplars %v", x)
	}
	for name, want := range map[string]int64{
		"twilight.leases": 1, "twilight.caches": 1, "twilight.regions": 1, "twilight.memory.lent": testRegionBytes,
		"twilight.leases.opened": 1, "twilight.rows": 2 * steps, "twilight.read.dense": steps * 20 * 2 * dim * 4,
	} {
		if points := c.Metric(name).GetSum().GetDataPoints(); len(points) != 1 || points[0].GetAsInt() != want {
			t.Errorf("%s: %v, want %d", name, points, want)
		}
	}
	for name, unit := range map[string]string{
		"twilight.layer.duration": "s", "twilight.stage.duration": "s", "twilight.step.duration": "s",
		"twilight.request.duration": "s", "twilight.head.mass": "1", "rpc.server.call.duration": "s",
	} {
		if m := c.Metric(name); m.GetUnit() != unit || len(m.GetHistogram().GetDataPoints()) == 0 {
			t.Errorf("%s: %v", name, m)
		}
	}
	if err := e.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	c.Wait(t, "nothing lent", func() bool {
		for _, name := range []string{"twilight.leases", "twilight.regions", "twilight.caches", "twilight.memory.lent", "twilight.memory.shadow"} {
			if points := c.Metric(name).GetSum().GetDataPoints(); len(points) != 1 || points[0].GetAsInt() != 0 {
				return false
			}
		}
		return true
	})
}

// A collector that is slow, refuses, or is not there holds nothing up, and what it does not take is
// counted.
func TestCollectorInTrouble(t *testing.T) {
	for name, behave := range map[string]func(context.Context) error{
		"slow": func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		},
		"refuses": func(context.Context) error { return status.Error(codes.PermissionDenied, "go away") },
		"absent":  nil,
	} {
		t.Run(name, func(t *testing.T) {
			c := &otlptest.Collector{Endpoint: "http://127.0.0.1:1"}
			if behave != nil {
				c = otlptest.Start(t, behave)
			}
			telling := told(t, c, "OTEL_BSP_MAX_QUEUE_SIZE=16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=8",
				"OTEL_EXPORTER_OTLP_TIMEOUT=200", "OTEL_BSP_EXPORT_TIMEOUT=200")
			_, e := tracedEngine(t, Config{Telemetry: telling})
			const steps = 50
			for id := range uint64(steps) {
				e.must(tracedStep(id+1, sampledParent))
				e.must(realLayer(id + 1))
			}
			// A step, its layer and three stages; none of them arrives, so in the end all are counted
			// as dropped by the queue or lost by the exporter, but for those still underway.
			eventually(t, "all spans accounted for", func() bool {
				dropped, lost := telling.LostSpans()
				return dropped+lost >= 5*steps-16 && dropped+lost <= 5*steps && lost > 0
			})
		})
	}
}

// What an audit finds is told in the answer, on the span, in metrics and, below the floor, in the log.
func TestAudit(t *testing.T) {
	c := otlptest.Start(t, nil)
	d := startHost(t, Config{Telemetry: told(t, c)})
	e := d.openWith(`{"skip_first_two_layers": false, "group": "per_query_head", "weight_pruner": {"type": "top_p", "threshold": 0.2},
		"audit": 1, "audit_mass_floor": 0.9}`)
	e.must(registerRegion(1, 1, e.lendFD(share(t).fd)))
	e.must(registerCache(1))
	e.must(tracedStep(1, sampledParent))
	got := e.must(realLayer(1)).GetLayerResult()
	if !slices.Equal(got.GetAudited(), []uint32{0, 1}) || len(got.GetTrueMass()) != 2 || len(got.GetOutputError()) != 2 {
		t.Fatalf("audited %v: mass %v, error %v", got.GetAudited(), got.GetTrueMass(), got.GetOutputError())
	}
	for h, mass := range got.GetTrueMass() {
		// All tokens are candidates and their weights are exact, so that the estimate is the truth.
		if estimate := got.GetEstimatedMass()[h]; mass < .2 || mass > .9 || math.Abs(float64(mass-estimate)) > 1e-5 || !(got.GetOutputError()[h] > .01) {
			t.Errorf("head %d: true mass %v, estimated %v, error %v", h, mass, estimate, got.GetOutputError()[h])
		}
	}
	c.Wait(t, "the span", func() bool { return len(spansNamed(c, "twilight.layer")) == 1 })
	span := spansNamed(c, "twilight.layer")[0]
	if mass, ok := attr(span, "twilight.audit.mass").([]any); !ok || len(mass) != 2 || mass[0] != float64(got.GetTrueMass()[0]) {
		t.Errorf("twilight.audit.mass is %v", attr(span, "twilight.audit.mass"))
	}
	c.Wait(t, "the metrics", func() bool {
		mass, errs := c.Metric("twilight.audit.mass").GetHistogram().GetDataPoints(), c.Metric("twilight.audit.error").GetHistogram().GetDataPoints()
		return len(mass) == 1 && mass[0].GetCount() == 2 && len(errs) == 1 && errs[0].GetCount() == 2
	})
	if log := d.log.String(); strings.Count(log, "audit: too little attention is kept") != 1 || !strings.Contains(log, `"heads_below":2`) {
		t.Errorf("log %s", log)
	}
}

// Unary calls have spans in their caller's trace, and what they are refused for is theirs.
func TestTraceOfCalls(t *testing.T) {
	c := otlptest.Start(t, nil)
	d := startHost(t, Config{Telemetry: told(t, c)})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", sampledParent)
	refused := openRequest()
	refused.Device = "none"
	if _, err := d.client.OpenLease(ctx, refused); status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	if _, err := d.client.GetCapabilities(ctx, &twilightv1.GetCapabilitiesRequest{}); err != nil {
		t.Fatal(err)
	}
	c.Wait(t, "the spans", func() bool { return len(c.Spans()) == 2 })
	for method, want := range map[string]string{"OpenLease": "NOT_FOUND", "GetCapabilities": "OK"} {
		method = "twilight.v1.TwilightService/" + method
		spans := spansNamed(c, method)
		if len(spans) != 1 || hex.EncodeToString(spans[0].GetParentSpanId()) != engineSpan || attr(spans[0], "rpc.response.status_code") != want ||
			attr(spans[0], "rpc.system.name") != "grpc" || attr(spans[0], "rpc.method") != method || spans[0].GetStatus().GetCode() != tracepb.Status_STATUS_CODE_UNSET {
			t.Errorf("%s: %v", method, spans)
		}
	}
	c.Wait(t, "the metric", func() bool {
		m := c.Metric("rpc.server.call.duration")
		return m.GetUnit() == "s" && len(m.GetHistogram().GetDataPoints()) == 2
	})
}

// An armed step has the spans and metrics of any other, though its layers come without messages.
func TestTraceOfArmedSteps(t *testing.T) {
	c := otlptest.Start(t, nil)
	e := startHost(t, Config{Telemetry: told(t, c)}).armedLease()
	const steps = 3
	for id := range uint64(steps) {
		armed := armedStep(id + 1)
		armed.GetStep().Traceparent = sampledParent
		e.arm(armed)
		e.replay(id + 1)
	}
	c.Wait(t, "the spans", func() bool {
		return len(spansNamed(c, "twilight.step")) == steps && len(spansNamed(c, "twilight.layer")) == steps
	})
	parents := make(map[string]bool)
	for _, step := range spansNamed(c, "twilight.step") {
		parents[string(step.GetSpanId())] = true
		if hex.EncodeToString(step.GetParentSpanId()) != engineSpan || attr(step, "twilight.step.layers") != int64(1) ||
			attr(step, "twilight.tokens.kept") != int64(40) {
			t.Errorf("step %v", step)
		}
	}
	for _, layer := range spansNamed(c, "twilight.layer") {
		if kept, ok := attr(layer, "twilight.row.kept").([]any); !ok || len(kept) != 2 || !parents[string(layer.GetParentSpanId())] {
			t.Errorf("layer %v", layer)
		}
	}
	c.Wait(t, "the rows", func() bool {
		points := c.Metric("twilight.rows").GetSum().GetDataPoints()
		return len(points) == 1 && points[0].GetAsInt() == 2*steps
	})
}
