package service

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/internal/otlptest"
	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// BenchmarkTelemetry tells what watching costs: steps of one sequence of 8192 tokens through four layers
// (32 query heads, 8 KV heads of 128, fp16; Quest, INT4, top-p) of four daemons in turn, to whom nobody
// listens, who sample nothing, 1% and all. overhead-% is the median, over the rounds, of the time beside
// that of the first; for 1% it is that of a step on average, which medians would not see: a hundredth of
// the way from "off" to "all".
func BenchmarkTelemetry(b *testing.B) {
	const layers, queryHeads, kvHeads, dim, tokens, page = 4, 32, 8, 128, 8192, 16
	const plane = tokens * kvHeads * dim * 2
	fd, err := unix.MemfdCreate(b.Name(), unix.MFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 2*layers*plane); err != nil {
		b.Fatal(err)
	}
	memory, err := unix.Mmap(fd, 0, 2*layers*plane, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	r := rand.New(rand.NewPCG(1, 2))
	normal := func(to []byte, spread float64) {
		values := make([]float32, len(to)/2)
		for i := range values {
			values[i] = float32(spread * r.NormFloat64())
		}
		kv.F16.Encode(to, values)
	}
	normal(memory, 1)
	query := make([]byte, queryHeads*dim*2)
	normal(query, 3.6)

	c := otlptest.Start(b, nil)
	b.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.Endpoint)
	watchers := []*telemetry.Telemetry{nil}
	for _, sampler := range []string{"always_off", "always_on"} {
		watchers = append(watchers, told(b, c, "OTEL_TRACES_SAMPLER="+sampler, "OTEL_METRIC_EXPORT_INTERVAL=60000"))
	}
	engines := make([]*engine, len(watchers))
	for i, watcher := range watchers {
		open := openRequest()
		open.Geometry = &twilightv1.Geometry{
			NumLayers: layers, QueryHeads: queryHeads, KvHeads: kvHeads, KDim: dim, VDim: dim, SoftmaxScale: 1. / 11,
			QueryDtype: twilightv1.DataType_DATA_TYPE_F16, OutputDtype: twilightv1.DataType_DATA_TYPE_F16,
		}
		open.ConfigJson = `{"selector": {"type": "quest", "sparsity_rate": 0.25}, "weight_estimator": {"type": "min_max_quant"},
			"weight_pruner": {"type": "top_p", "threshold": 0.95}, "skip_first_two_layers": false}`
		e := openWith(b, startHost(b, Config{Telemetry: watcher}).client, open)
		region := registerRegion(1, 1, e.lendFD(fd))
		region.GetRegisterRegion().Size, region.GetRegisterRegion().Access = 2*layers*plane, twilightv1.Access_ACCESS_READ_ONLY
		e.must(region)
		cache := &twilightv1.RegisterCache{
			CacheId: 1, Dtype: twilightv1.DataType_DATA_TYPE_F16, PageSize: page, NumPages: tokens / page,
			KStrides: &twilightv1.Strides{Page: page * kvHeads * dim * 2, Head: dim * 2, Token: kvHeads * dim * 2},
		}
		for l := range uint32(layers) {
			cache.Layers = append(cache.Layers, &twilightv1.CacheLayer{
				Layer: l,
				K:     &twilightv1.Location{RegionId: 1, Generation: 1, Offset: uint64(l) * 2 * plane},
				V:     &twilightv1.Location{RegionId: 1, Generation: 1, Offset: uint64(l)*2*plane + plane},
			})
		}
		e.must(request(cache))
		engines[i] = e
	}
	first := &twilightv1.TableUpdate{Counts: []uint32{tokens / page}}
	for i := range int32(tokens / page) {
		first.Entries = append(first.Entries, i)
	}
	id := uint64(1)
	begin := func(e *engine, table *twilightv1.TableUpdate) {
		e.must(request(&twilightv1.Step{
			CacheId: 1, StepId: id, Sequences: []uint64{1}, Lengths: []int32{tokens}, Table: table,
		}))
	}
	run := func(e *engine) time.Duration {
		start := time.Now()
		begin(e, nil)
		for l := range uint32(layers) {
			e.must(request(&twilightv1.Layer{
				CacheId: 1, StepId: id, Layer: l, Query: &twilightv1.Layer_QueryInline{QueryInline: query},
			}))
		}
		return time.Since(start)
	}
	for _, e := range engines {
		begin(e, first)
		for range 3 {
			id++
			run(e)
		}
	}
	over := make([][]float64, len(engines))
	for b.Loop() {
		id++
		times := make([]float64, len(engines))
		for _, i := range r.Perm(len(engines)) {
			times[i] = run(engines[i]).Seconds()
		}
		for i, t := range times {
			over[i] = append(over[i], t/times[0]-1)
		}
	}
	var off, all float64
	for i, to := range []*float64{1: &off, 2: &all} {
		if to != nil {
			slices.Sort(over[i])
			*to = 100 * over[i][len(over[i])/2]
		}
	}
	b.ReportMetric(off, "off-overhead-%")
	b.ReportMetric(off+(all-off)/100, "1%-sampled-overhead-%")
	b.ReportMetric(all, "all-sampled-overhead-%")
}
