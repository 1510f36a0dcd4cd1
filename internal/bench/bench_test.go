package bench_test

import (
	"testing"
	"time"

	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// BenchmarkLayer runs decode layers as twilight bench does. Stages are the time of all workers.
func BenchmarkLayer(b *testing.B) {
	all, err := methods.New()
	if err != nil {
		b.Fatal(err)
	}
	data, err := bench.NewData(bench.Shape{
		KVHeads: 8, Group: 4, Dim: 128, Tokens: 32768, Sequences: 8, Layout: layout.HND, DType: kv.F16,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := data.Close(); err != nil {
			b.Error(err)
		}
	}()
	for _, config := range []struct{ name, json string }{
		{"dense", `{}`},
		{"full,INT4,top_p", `{"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`},
		{"quest", `{"selector": {"type": "quest", "sparsity_rate": 0.25}}`},
		{"quest,INT4,top_p", `{"selector": {"type": "quest", "sparsity_rate": 0.25},
			"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`},
	} {
		b.Run(config.name, func(b *testing.B) {
			cfg, err := all.Parse([]byte(config.json))
			if err != nil {
				b.Fatal(err)
			}
			device := host.New(host.Options{Methods: all})
			defer func() {
				if err := device.Close(); err != nil {
					b.Error(err)
				}
			}()
			d, err := bench.NewDevice(b.Context(), device, cfg, data)
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := d.Close(); err != nil {
					b.Error(err)
				}
			}()
			var stages pipeline.Timing
			kept, layers := 0.0, 0
			b.ReportAllocs()
			for b.Loop() {
				sample, err := d.Run(b.Context(), layers%data.Sequences)
				if err != nil {
					b.Fatal(err)
				}
				layers++
				stages.Select += sample.Stages.Select
				stages.Prune += sample.Stages.Prune
				stages.Attend += sample.Stages.Attend
				kept += sample.Kept
			}
			mean := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(layers) }
			b.ReportMetric(mean(stages.Select), "select-ns/op")
			b.ReportMetric(mean(stages.Prune), "prune-ns/op")
			b.ReportMetric(mean(stages.Attend), "attend-ns/op")
			b.ReportMetric(kept/float64(layers), "kept")
		})
	}
}
