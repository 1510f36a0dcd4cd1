package telemetry

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	kvHeads, queryHeads = 2, 4
	sampledParent       = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	otherParent         = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
)

// started is telemetry whose spans the recorder takes, by the default sampler.
func started(t testing.TB) (*Telemetry, *tracetest.SpanRecorder) {
	t.Helper()
	told, err := Start(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(0))))
	told.tracer = provider.Tracer(scope)
	t.Cleanup(func() { _ = told.Shutdown(context.Background()) })
	return told, recorder
}

func leased(told *Telemetry, id uint64) *Lease {
	return told.OpenLease(context.Background(), LeaseInfo{
		ID: id, Engine: "test", Device: "host", ListHeads: kvHeads,
		Geometry: &kv.Geometry{Layers: 3, QueryHeads: queryHeads, KVHeads: kvHeads, KDim: 8, VDim: 8},
		Method:   Method{"quest", "min_max_quant", "top_p"},
	})
}

// addCache adds cache 1 of the model's layers 4, 5 and 6.
func addCache(l *Lease) {
	l.AddCache(1, &gpu.CacheSpec{DType: kv.F16, Layers: []gpu.CacheLayer{{Layer: 4}, {Layer: 5}, {Layer: 6}}}, 1000)
}

// stepped tells of a step of sequences 1, 2, ... of those lengths.
func stepped(l *Lease, id uint64, parent string, lengths ...int32) {
	s := &Step{Cache: 1, ID: id, Lengths: lengths, TraceParent: parent}
	for i := range lengths {
		s.Sequences = append(s.Sequences, uint64(i+1))
	}
	l.BeginStep(context.Background(), l.Received(), s)
	l.EndStep(&kv.IndexStats{}, nil)
}

func layered(l *Lease, layer int, r *gpu.LayerResult) {
	l.BeginLayer(context.Background(), l.Received(), 1, layer)
	l.EndLayer(r, nil)
}

// result keeps the given tokens in each row of sparse sequences, half of the candidates.
func result(sequences int, kept uint32) *gpu.LayerResult {
	n := sequences * kvHeads
	r := &gpu.LayerResult{
		Kept: slices.Repeat([]uint32{kept}, n), Candidates: slices.Repeat([]uint32{2 * kept}, n),
		Paths: slices.Repeat([]pipeline.Path{pipeline.Sparse}, n), Reasons: make([]pipeline.Reason, n),
		Mass: slices.Repeat([]float32{.9}, sequences*queryHeads), Coverage: slices.Repeat([]float32{.95}, sequences*queryHeads),
		Read: gpu.Read{Cache: 100, Shadow: 50},
	}
	r.Timing.Wall = time.Microsecond
	r.Timing.Index, r.Timing.Select, r.Timing.Prune, r.Timing.Attend = 100, 200, 300, 400
	return r
}

// A layer of a step that is not sampled costs no allocation, with tracing on or off.
func TestNoAllocation(t *testing.T) {
	told, _ := started(t)
	l := leased(told, 1)
	defer l.Close()
	addCache(l)
	r := result(64, 200)
	stepped(l, 1, otherParent, slices.Repeat([]int32{1000}, 64)...)
	layer := 0
	kvtest.NoAllocation(t, func() {
		layered(l, 4+layer%2, r) // never the step's last layer
		layer++
	})
}

// A histogram is what a plain count says.
func TestHistogram(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		bounds := rapid.SampledFrom([][]float64{tokenBounds, shareBounds, secondsBounds}).Draw(t, "bounds")
		values := rapid.SliceOf(rapid.Float64Range(0, 2*bounds[len(bounds)-1])).Draw(t, "values")
		values = append(values, bounds...)
		h := newHistogram(bounds)
		for _, v := range values {
			h.add(v, &moment{})
		}
		p := h.point(time.Time{}, time.Time{}, attribute.Set{})
		for i, n := range p.BucketCounts {
			want := uint64(0)
			for _, v := range values {
				if (i == 0 || v > bounds[i-1]) && (i == len(bounds) || v <= bounds[i]) {
					want++
				}
			}
			if n != want {
				t.Fatalf("bucket %d: %d, want %d", i, n, want)
			}
		}
		if p.Count != uint64(len(values)) || len(p.Exemplars) != 0 {
			t.Fatalf("%d values, want %d; exemplars %v", p.Count, len(values), p.Exemplars)
		}
	})
}

func TestBoundedSeries(t *testing.T) {
	t.Parallel()
	m := newMetrics()
	seen := make(map[*series]bool)
	for layer := range 10 * maxSeries {
		seen[m.layer(Method{"a", "b", "c"}, layer)] = true
	}
	if len(seen) != maxSeries+1 || m.layer(Method{"x", "y", "z"}, 1) != m.series[seriesKey{layer: overLayer}] {
		t.Errorf("%d series, want %d", len(seen), maxSeries+1)
	}
}

// What comes in any order and of any shape, as from a device that errs, harms nobody; and what was open
// is closed with the lease.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	told, recorder := started(t)
	rapid.Check(t, func(t *rapid.T) {
		l := leased(told, 7)
		for range rapid.IntRange(0, 30).Draw(t, "calls") {
			switch rapid.IntRange(0, 8).Draw(t, "call") {
			case 0:
				addCache(l)
			case 1:
				l.RemoveCache(1)
			case 2:
				l.CancelStep(1)
			case 3, 4:
				lengths := rapid.SliceOfN(rapid.Int32Range(0, 100), 0, 3).Draw(t, "lengths")
				stepped(l, rapid.Uint64Range(1, 5).Draw(t, "id"), rapid.SampledFrom([]string{"", "x", sampledParent, otherParent}).Draw(t, "parent"), lengths...)
			case 5, 6:
				r := result(rapid.IntRange(0, 4).Draw(t, "sequences"), 5)
				r.Kept = r.Kept[:rapid.IntRange(0, len(r.Kept)).Draw(t, "kept")]
				layered(l, rapid.IntRange(3, 7).Draw(t, "layer"), r)
			case 7:
				l.BeginLayer(context.Background(), l.Received(), uint32(rapid.IntRange(0, 2).Draw(t, "cache")), 4)
				l.EndLayer(nil, &Failure{Code: "internal", Field: "layer", Message: "text"})
			case 8:
				l.Begin(context.Background(), ReleaseRegion, l.Received())
				l.End(&Failure{Code: "not_found"})
			}
			l.snapshot(0)
		}
		if _, err := told.metrics.Produce(context.Background()); err != nil {
			t.Fatal(err)
		}
		l.Close()
		l.Close()
		m := told.metrics
		if m.active.Load() != 0 || m.caches.Load() != 0 || m.shadow.Load() != 0 || m.leases.Load() != 0 {
			t.Fatalf("left: %d active, %d caches, %d bytes, %d leases", m.active.Load(), m.caches.Load(), m.shadow.Load(), m.leases.Load())
		}
		if started, ended := len(recorder.Started()), len(recorder.Ended()); started != ended {
			t.Fatalf("%d spans of %d were left open", started-ended, started)
		}
	})
}

// A nil Telemetry hears nothing.
func TestNil(t *testing.T) {
	t.Parallel()
	var none *Telemetry
	l := none.OpenLease(context.Background(), LeaseInfo{})
	none.Draining()
	addCache(l)
	l.Lent(1, 1)
	stepped(l, 1, sampledParent, 10)
	layered(l, 4, result(1, 5))
	l.Begin(context.Background(), CancelStep, l.Received())
	l.End(nil)
	l.Received()
	l.Dropped()
	l.CancelStep(1)
	l.RemoveCache(1)
	l.Close()
}

// Stages fill no more than their layer, in their order, whatever the device says.
func TestStagePlacement(t *testing.T) {
	t.Parallel()
	told, recorder := started(t)
	l := leased(told, 1)
	addCache(l)
	stepped(l, 1, sampledParent, 10)
	for range 100 {
		r := result(1, 5)
		r.Timing.Wall = time.Duration(rand.N(int64(time.Second)))
		r.Timing.Select, r.Timing.Attend = time.Duration(rand.N(int64(time.Second))), time.Duration(rand.N(int64(time.Second)))
		layered(l, 4, r)
	}
	l.Close()
	parents := make(map[trace.SpanID]sdktrace.ReadOnlySpan)
	for _, s := range recorder.Ended() {
		parents[s.SpanContext().SpanID()] = s
	}
	found := 0
	last := make(map[trace.SpanID]time.Time)
	for _, s := range recorder.Ended() {
		parent := parents[s.Parent().SpanID()]
		if parent == nil || parent.Name() != spanLayer {
			continue
		}
		found++
		if s.StartTime().Before(parent.StartTime()) || s.EndTime().After(parent.EndTime()) || s.EndTime().Before(s.StartTime()) ||
			s.StartTime().Before(last[s.Parent().SpanID()]) {
			t.Errorf("%s %v-%v in %v-%v", s.Name(), s.StartTime(), s.EndTime(), parent.StartTime(), parent.EndTime())
		}
		last[s.Parent().SpanID()] = s.EndTime()
	}
	if found != 400 {
		t.Errorf("%d stages, want 400", found)
	}
}

func TestBoundedColumns(t *testing.T) {
	t.Parallel()
	told, recorder := started(t)
	l := leased(told, 1)
	defer l.Close()
	addCache(l)
	stepped(l, 1, sampledParent, slices.Repeat([]int32{1000}, 1000)...)
	layered(l, 4, result(1000, 5))
	for _, s := range recorder.Ended() {
		for _, a := range s.Attributes() {
			if a.Key == attrRowKept && len(a.Value.AsInt64Slice()) != maxColumn {
				t.Errorf("%d entries, want %d", len(a.Value.AsInt64Slice()), maxColumn)
			}
			if a.Key == attrRows && a.Value.AsInt64() != 2000 {
				t.Errorf("%d rows, want 2000", a.Value.AsInt64())
			}
		}
	}
}

func TestEnvironment(t *testing.T) {
	for _, test := range []struct {
		env     map[string]string
		traces  bool
		refused bool
	}{
		{nil, false, false},
		{map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, true, false},
		{map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, true, false},
		{map[string]string{"OTEL_TRACES_EXPORTER": "otlp", "OTEL_METRICS_EXPORTER": "prometheus"}, true, false},
		{map[string]string{"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, false, false},
		{map[string]string{"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, false, false},
		{map[string]string{"OTEL_TRACES_EXPORTER": "smoke signals"}, false, true},
		{map[string]string{"OTEL_METRICS_EXPORTER": "smoke signals"}, false, true},
		{map[string]string{"OTEL_METRICS_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"}, false, true},
	} {
		t.Run("", func(t *testing.T) {
			for key, value := range test.env {
				t.Setenv(key, value)
			}
			told, err := Start(t.Context(), Options{})
			if (err != nil) != test.refused {
				t.Fatalf("%v: error %v", test.env, err)
			}
			if err != nil {
				return
			}
			_, is := told.tracers.(*sdktrace.TracerProvider)
			if is != test.traces {
				t.Errorf("%v: traces %v", test.env, is)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			_ = told.Shutdown(ctx)
		})
	}
}
