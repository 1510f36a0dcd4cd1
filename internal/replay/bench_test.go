package replay

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/otlptest"
	"github.com/twilight-sidecar/twilight/internal/replay/inprocess"
	"github.com/twilight-sidecar/twilight/telemetry"
	"github.com/twilight-sidecar/twilight/testdata"
)

// BenchmarkTelemetry tells what telemetry adds to a step, all layers of the capture, seen from the engine:
// the ratios of a daemon whose engine samples nothing, and of one that samples 1% of all steps and sends
// them to a collector, to a daemon without telemetry; and of another without, which tells how far daemons
// differ by chance. They take turns in one run. Times are means of the fastest 9 of 10 steps, which nothing
// else on the machine disturbed; of sampled steps likewise. A message costs telemetry some microseconds,
// whatever its batch: a step of one sequence is the worst case.
func BenchmarkTelemetry(b *testing.B) {
	for _, sequences := range []int{1, 8} {
		b.Run(fmt.Sprintf("sequences=%d", sequences), func(b *testing.B) { benchmarkTelemetry(b, sequences) })
	}
}

func benchmarkTelemetry(b *testing.B, sequences int) {
	loaded, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		b.Fatal(err)
	}
	collector := otlptest.Start(b, nil)
	b.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.Endpoint)
	b.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	told := func() *telemetry.Telemetry {
		t, err := telemetry.Start(b.Context(), telemetry.Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = t.Shutdown(context.Background()) })
		return t
	}
	const (
		sampled    = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		notSampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
	)
	engines := []*decoder{
		decoding(b, loaded, sequences, nil), decoding(b, loaded, sequences, told()),
		decoding(b, loaded, sequences, told()), decoding(b, loaded, sequences, nil),
	}
	times := make([][]time.Duration, len(engines)+1) // of the engines, and of sampled steps
	for round := 0; b.Loop(); round++ {
		for _, i := range rand.Perm(len(engines)) {
			parent, to := notSampled, i
			if i == 2 && round%100 == 50 {
				parent, to = sampled, len(engines)
			}
			start := time.Now()
			engines[i].step(b, parent)
			times[to] = append(times[to], time.Since(start))
		}
	}
	mean := func(times []time.Duration) float64 {
		slices.Sort(times)
		times = times[:max(1, len(times)*9/10)]
		sum := time.Duration(0)
		for _, t := range times {
			sum += t
		}
		return float64(sum) / float64(len(times))
	}
	none, off, rest := mean(times[0]), mean(times[1]), mean(times[2])
	b.ReportMetric(none, "step-ns")
	b.ReportMetric(mean(times[3])/none, "control-ratio")
	b.ReportMetric(off/none, "off-ratio")
	if some := times[len(engines)]; len(some) > 0 {
		one := mean(some)
		b.ReportMetric(one, "sampled-step-ns")
		b.ReportMetric((.99*rest+.01*one)/none, "1%-ratio")
	}
}

// decoder is an engine that decodes the capture's first step over and over, for some sequences that share
// its pages.
type decoder struct {
	*engine
	batch   client.Batch
	queries []byte
}

// decoding is a decoder after its prefill, on a daemon of its own.
func decoding(b *testing.B, loaded *capture.Capture, sequences int, told *telemetry.Telemetry) *decoder {
	b.Helper()
	daemon, err := inprocess.Start(b.Context(), inprocess.Options{Telemetry: told, DrainGrace: time.Millisecond})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = daemon.Stop(context.Background()) })
	conn, err := client.Dial(daemon.Target())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	o := Options{Capture: loaded, Config: `{"selector": {"type": "quest", "sparsity_rate": 0.25},
		"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p"}, "group": "per_query_head"}`}
	e, err := open(b.Context(), conn, &o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { e.session.Close() })
	if err := e.write(0, loaded.N+1); err != nil {
		b.Fatal(err)
	}
	d := &decoder{engine: e, batch: client.Batch{IndexOnly: true}}
	g := e.session.Geometry()
	for id := range uint64(sequences) {
		d.batch.Sequences = append(d.batch.Sequences, client.Sequence{ID: id + 1, Len: loaded.N + 1, Table: e.table})
		d.queries = g.EncodeQuery(d.queries, loaded.Layers[0].Q[:loaded.QueryHeads*loaded.KDim])
	}
	if _, err := e.cache.Step(b.Context(), d.batch); err != nil {
		b.Fatal(err)
	}
	d.batch.IndexOnly = false
	return d
}

func (d *decoder) step(b *testing.B, parent string) {
	b.Helper()
	d.batch.Trace.Parent = parent
	step, err := d.cache.Step(b.Context(), d.batch)
	if err != nil {
		b.Fatal(err)
	}
	for i := range d.Capture.Layers {
		if _, err := step.Layer(b.Context(), client.Layer{Layer: d.Capture.Layers[i].Index, Query: d.queries}); err != nil {
			b.Fatal(err)
		}
	}
}
