package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/contrib/instrumentation/runtime"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetrichttp"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// rootShare is the share of steps without a parent that are sampled if OTEL_TRACES_SAMPLER does not say.
// The SDK's default is all of them, but a batch decodes a hundred steps a second, each with hundreds of
// spans; an engine that samples a step has it in any case.
const rootShare = 0.01

// Options are what Start is told beside the environment.
type Options struct {
	// Service is the service.name, unless the environment has one: twilightd.
	Service string
	// Version of the build.
	Version string
	// Instance tells this process from its predecessors: random.
	Instance string
	// TraceURL is where people find a trace, with {trace_id} for its id; "" if nowhere.
	TraceURL string
	// Gathered metrics are another process's to tell, which asks for them by Report: they are neither pushed
	// nor scraped.
	Gathered bool
	// Logger takes what exporters complain of, once a minute at most.
	Logger *slog.Logger
}

// Telemetry is where all that is worth telling of a daemon comes together. It is safe for concurrent
// use.
type Telemetry struct {
	options Options
	metrics *metrics
	tracer  trace.Tracer
	tracers trace.TracerProvider
	// followsParent tells that no step is sampled whose parent is not.
	followsParent bool
	registry      *prometheus.Registry
	stop          []func(context.Context) error // in the order to be called
	start         time.Time

	mu      sync.Mutex
	leases  map[*Lease]struct{}
	sources map[*Source]struct{}
	ended   sums // what sources counted that are no more

	reporting sync.Mutex
	reports   uint64
}

// Start sets telemetry up by the standard variables of OpenTelemetry:
//
//   - Traces are sent if OTEL_TRACES_EXPORTER (otlp, console) or an OTLP endpoint is set
//     (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT), and the former is not "none".
//     OTEL_TRACES_SAMPLER chooses what is sampled; by default what the engine samples, and 1% of the
//     steps for which it names no parent.
//   - Metrics are pushed if OTEL_METRICS_EXPORTER is otlp, or is unset and an OTLP endpoint is set
//     (likewise). They can be scraped in any case: Handler.
//   - OTEL_EXPORTER_OTLP_*, OTEL_BSP_*, OTEL_METRIC_EXPORT_*, OTEL_SERVICE_NAME and
//     OTEL_RESOURCE_ATTRIBUTES mean what they always do; OTEL_SDK_DISABLED=true turns both off.
//
// Nothing that serves a request waits for a collector: what it does not take in time is dropped and
// counted.
func Start(ctx context.Context, options Options) (*Telemetry, error) {
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	if options.Service == "" {
		options.Service = "twilightd"
	}
	t := &Telemetry{
		options: options, metrics: newMetrics(), start: time.Now(), leases: make(map[*Lease]struct{}),
		sources: make(map[*Source]struct{}),
		tracers: noop.NewTracerProvider(), registry: prometheus.NewRegistry(),
	}
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(
			semconv.ServiceName(options.Service), semconv.ServiceVersion(options.Version), semconv.ServiceInstanceID(options.Instance),
		),
		resource.WithFromEnv(), // wins over what stands before it
	)
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	err = t.startTraces(ctx, res)
	if !options.Gathered {
		err = errors.Join(err, t.startMetrics(ctx, res))
	}
	if err != nil {
		return nil, errors.Join(err, t.Shutdown(ctx))
	}
	t.tracer = t.tracers.Tracer(scope, trace.WithInstrumentationVersion(options.Version))
	return t, nil
}

// exporter is what the environment wants of a signal: "TRACES" or "METRICS".
func exporter(signal string) string {
	disabled := strings.EqualFold(strings.TrimSpace(os.Getenv("OTEL_SDK_DISABLED")), "true")
	named := os.Getenv("OTEL_" + signal + "_EXPORTER")
	endpoint := os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") + os.Getenv("OTEL_EXPORTER_OTLP_"+signal+"_ENDPOINT")
	switch {
	case disabled || named == "" && endpoint == "":
		return "none"
	case named == "":
		return "otlp"
	}
	return named
}

func (t *Telemetry) startTraces(ctx context.Context, res *resource.Resource) error {
	if exporter("TRACES") == "none" {
		return nil
	}
	spans, err := autoexport.NewSpanExporter(ctx)
	if err != nil {
		return fmt.Errorf("OTEL_TRACES_EXPORTER: %w", err)
	}
	options := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(res),
		sdktrace.WithSpanProcessor(newSpanQueue(spans, t.metrics, t.complainer("spans"))),
	}
	sampler := strings.ToLower(strings.TrimSpace(os.Getenv("OTEL_TRACES_SAMPLER")))
	t.followsParent = sampler == "" || strings.HasPrefix(sampler, "parentbased_")
	if sampler == "" {
		options = append(options, sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(rootShare))))
	}
	provider := sdktrace.NewTracerProvider(options...)
	t.tracers = provider
	t.stop = append(t.stop, provider.Shutdown)
	return nil
}

func (t *Telemetry) startMetrics(ctx context.Context, res *resource.Resource) error {
	scraped, err := otelprometheus.New(otelprometheus.WithRegisterer(t.registry), otelprometheus.WithProducer(producer{t}),
		otelprometheus.WithoutScopeInfo())
	if err != nil {
		return err
	}
	options := []sdkmetric.Option{sdkmetric.WithResource(res), sdkmetric.WithReader(scraped)}
	switch name := exporter("METRICS"); name {
	case "none", "prometheus": // which can always be scraped
	case "otlp":
		pushed, err := otlpMetrics(ctx)
		if err != nil {
			return fmt.Errorf("OTEL_METRICS_EXPORTER: %w", err)
		}
		counted := &countedMetrics{Exporter: pushed, metrics: t.metrics, complain: t.complainer("metrics")}
		options = append(options, sdkmetric.WithReader(sdkmetric.NewPeriodicReader(counted, sdkmetric.WithProducer(producer{t}))))
	default:
		return fmt.Errorf("OTEL_METRICS_EXPORTER is %q: use otlp, or prometheus or none to have metrics scraped only", name)
	}
	provider := sdkmetric.NewMeterProvider(options...)
	t.stop = append(t.stop, provider.Shutdown)
	return runtime.Start(runtime.WithMeterProvider(provider))
}

// otlpMetrics makes the exporter that the protocol variables ask for. autoexport's readers take no
// producers.
func otlpMetrics(ctx context.Context) (sdkmetric.Exporter, error) {
	protocol := os.Getenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL")
	if protocol == "" {
		protocol = os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL")
	}
	switch protocol {
	case "grpc":
		return otlpmetricgrpc.New(ctx)
	case "", "http/protobuf":
		return otlpmetrichttp.New(ctx)
	}
	return nil, fmt.Errorf("the OTLP protocol is %q: use grpc or http/protobuf", protocol)
}

// complainer returns a function that logs what became of exports: the first error, and no more than one
// a minute.
func (t *Telemetry) complainer(what string) func(error) {
	var mu sync.Mutex
	var last time.Time
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(last) >= time.Minute {
			last = now
			t.options.Logger.Warn("telemetry was lost", "signal", what, "error", err)
		}
	}
}

// TracerProvider makes the tracers of others, whose spans take the same way.
func (t *Telemetry) TracerProvider() trace.TracerProvider { return t.tracers }

// Draining tells that no more leases and steps are taken. A nil Telemetry does not hear it.
func (t *Telemetry) Draining() {
	if t != nil {
		t.metrics.draining.Store(true)
	}
}

// Shutdown sends what has not been sent, for as long as ctx allows, and ends.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var errs []error
	for _, stop := range t.stop {
		errs = append(errs, stop(ctx))
	}
	t.stop = nil
	return errors.Join(errs...)
}

// LostSpans tells how many sampled spans were dropped since the exporter was behind, and how many were
// lost since the collector refused or did not answer.
func (t *Telemetry) LostSpans() (dropped, lost int64) {
	return t.metrics.spansDropped.Load(), t.metrics.exportFailed.Load()
}
