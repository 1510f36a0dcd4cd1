//go:build linux && cgo && cuda

package cuda

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

//go:embed kernels/bench.fatbin
var benchFatbin string

var (
	table = flag.String("table", "", "shapes that TestTable times, separated by commas: "+
		"QUERY_HEADS/KV_HEADSxBATCHxTOKENS[xPAGE_SIZE[xTOKENS of every other sequence]]")
	chain  = flag.Bool("chain", false, "time the chain of kernels in place of the fused one")
	force  = flag.String("force", "", "CLUSTERxTHREADS of the fused kernel; its own choice")
	rounds = flag.Int("rounds", 15, "timings of a shape, of which the median is printed")
)

// bench owns GPU memory as an engine does, in this process: lending it would change nothing of what a
// layer costs.
type bench struct {
	t       *testing.T
	device  *Device
	module  cu.Module
	reading float64 // bytes a second
}

func newBench(t *testing.T) *bench {
	o := Options{}
	if *chain {
		o.FusedFrom = -1
	}
	b := &bench{t: t, device: newDeviceOf(t, o)}
	b.do(func() (err error) {
		b.module, err = cu.LoadFatBinary(benchFatbin)
		return err
	})
	return b
}

func (b *bench) do(f func() error) {
	b.t.Helper()
	if err := b.device.owner.do(context.Background(), f); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) launch(name string, blocks, threads int, args ...uint64) error {
	f, err := b.module.Function(name)
	if err != nil {
		return err
	}
	l := drv.NewLaunch(f, cu.Stream{}, threads, drv.Block{})
	defer l.Free()
	for i, a := range args {
		l.Set(i, a)
	}
	return l.Run(blocks, 1)
}

// lend makes memory of the GPU look imported into a lease.
func (b *bench) lend(l *lease, at drv.Ptr, size uint64) *memory {
	m := &memory{lease: l, size: size, writable: true, base: at, unmap: func() error { return nil }}
	l.memories[m] = struct{}{}
	return m
}

// TestTable times layers on the GPU: dense and sparse on the same data, one behind another with no host
// between, over layers in turn so that nothing is found in the cache.
func TestTable(t *testing.T) {
	if *table == "" {
		t.Skip("no -table")
	}
	b := newBench(t)
	b.measureReading()
	fmt.Printf("%s, reading %.0f GB/s; medians of %d\n", b.device.name, b.reading/1e9, *rounds)
	fmt.Println("heads batch  tokens  short page | dense us  read | sparse us       spread  read | times | choice times | kept mean (sd) [range] | blocks a row | stages % | call us")
	for shape := range strings.SplitSeq(*table, ",") {
		of := shapeOf{page: 16}
		if n, err := fmt.Sscanf(shape, "%d/%dx%dx%dx%dx%d", &of.hq, &of.hkv, &of.batch, &of.tokens, &of.page, &of.short); n < 4 {
			t.Fatalf("-table: %q: %v", shape, err)
		}
		b.row(of)
	}
}

// shapeOf is a batch to time. If short is not 0 every other sequence has only that many tokens.
type shapeOf struct{ hq, hkv, batch, tokens, page, short int }

func (o *shapeOf) length(sequence int) int {
	if o.short > 0 && sequence%2 == 1 {
		return o.short
	}
	return o.tokens
}

func (b *bench) measureReading() {
	const size = 8 << 30
	b.do(func() error {
		at, err := cu.MemAlloc(size)
		if err != nil {
			return err
		}
		best := math.Inf(1)
		for range 5 {
			us, err := timed(cu.Stream{}, func() error {
				return b.launch("bench_read", b.device.sms*8, 512, uint64(at), size/16, uint64(at))
			})
			if err != nil {
				return err
			}
			best = min(best, us)
		}
		b.reading = size / best * 1e6
		return cu.MemFree(at)
	})
}

// timed returns how many microseconds of the device f takes.
func timed(stream cu.Stream, f func() error) (float64, error) {
	var events [2]cu.Event
	for i := range events {
		var err error
		if events[i], err = cu.MakeEvent(cu.DefaultEvent); err != nil {
			return 0, err
		}
	}
	if err := events[0].Record(stream); err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	if err := events[1].Record(stream); err != nil {
		return 0, err
	}
	if err := events[1].Synchronize(); err != nil {
		return 0, err
	}
	ms, err := events[0].Elapsed(events[1])
	return ms * 1e3, errors.Join(err, cu.DestroyEvent(&events[0]), cu.DestroyEvent(&events[1]))
}

// deal shuffles pages. What has a chunk's tokens in common stays together, in any order.
func deal(pages, page int) (table []int32) {
	r := rand.New(rand.NewPCG(1, 2))
	together := max(1, kv.ChunkTokens/page)
	for _, chunk := range r.Perm(pages / together) {
		for _, i := range r.Perm(together) {
			table = append(table, int32(chunk*together+i))
		}
	}
	return table
}

func (b *bench) row(of shapeOf) {
	t := b.t
	const dim = 128
	hq, hkv, batch, tokens, page := of.hq, of.hkv, of.batch, of.tokens, of.page
	pages := batch * tokens / page
	plane := uint64(batch) * uint64(tokens) * uint64(hkv) * dim * 2
	// Enough layers to leave the cache behind, if there is room for them.
	layers := int(max(1, min(16, (4<<30)/(2*plane))))
	queries := uint64(batch*hq) * dim * 2
	size := uint64(layers)*2*plane + 2*queries
	var at drv.Ptr
	b.do(func() error {
		p, err := cu.MemAlloc(int64(size))
		at = drv.Ptr(p)
		if err != nil {
			return err
		}
		for i := range layers {
			base := at + uint64(i)*2*plane
			if err := b.launch("bench_fill", b.device.sms*8, 256, base, base+plane, plane/2, uint64(hkv), dim, uint64(i+1)); err != nil {
				return err
			}
		}
		low, high := uint64(360), uint64(450)
		if tokens > 40000 {
			low, high = 400, 490
		}
		q := at + uint64(layers)*2*plane
		if err := b.launch("bench_queries", ceilDiv(batch*hq*dim, 256), 256, q, uint64(batch), uint64(hq), uint64(hq/hkv), dim, low, high, 7); err != nil {
			return err
		}
		return cu.Synchronize()
	})
	defer b.do(func() error { return cu.MemFree(cu.DevicePtr(at)) })

	step, table := &kv.Step{}, deal(pages, page)
	all := 0 // tokens
	for s := range batch {
		n := of.length(s)
		step.Sequences = append(step.Sequences, uint64(s+1))
		step.Lengths = append(step.Lengths, int32(n))
		step.TableCounts = append(step.TableCounts, uint32(n/page))
		step.TableEntries = append(step.TableEntries, table[:n/page]...)
		table = table[n/page:]
		all += n
	}
	known, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	g := &kv.Geometry{
		Layers: layers, QueryHeads: hq, KVHeads: hkv, KDim: dim, VDim: dim, Scale: 1 / float32(math.Sqrt(dim)),
		Query: kv.F16, QueryScale: 1, Output: kv.F16,
	}
	run := func(config string) (c *cache, us []float64, calls []time.Duration, res gpu.LayerResult) {
		cfg, err := known.Parse([]byte(config))
		if err != nil {
			t.Fatal(err)
		}
		opened, err := b.device.Open(context.Background(), g, cfg)
		if err != nil {
			t.Fatal(err)
		}
		l := opened.(*lease)
		defer l.Close()
		m := b.lend(l, at, size)
		strides := gpu.Strides{Page: uint64(page) * uint64(hkv) * dim * 2, Head: dim * 2, Token: uint64(hkv) * dim * 2}
		spec := &gpu.CacheSpec{DType: kv.F16, PageSize: page, NumPages: pages, K: strides, V: strides, NullPage: -1}
		for i := range layers {
			offset := uint64(i) * 2 * plane
			spec.Layers = append(spec.Layers, gpu.CacheLayer{
				Layer: i + 2, K: gpu.Span{Memory: m, Offset: offset}, V: gpu.Span{Memory: m, Offset: offset + plane},
			})
		}
		made, err := l.NewCache(context.Background(), spec)
		if err != nil {
			t.Fatal(err)
		}
		c = made.(*cache)
		if *force != "" {
			if _, err := fmt.Sscanf(*force, "%dx%d", &l.fused.cluster, &l.fused.threads); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Step(context.Background(), step); err != nil {
			t.Fatal(err)
		}
		// The query lies behind the cache, the output behind the query.
		offset := uint64(layers) * 2 * plane
		req := &gpu.LayerRequest{
			Query:  &gpu.Tensor{Memory: m, Offset: offset},
			Output: &gpu.Tensor{Memory: m, Offset: offset + queries},
		}
		described := make([]kernels.Layer, layers)
		for i := range layers {
			req.Layer = i + 2
			if err := c.Layer(context.Background(), req, &res); err != nil {
				t.Fatal(err)
			}
			described[i] = c.call.desc
		}
		for i := range layers {
			req.Layer = i + 2
			start := time.Now()
			if err := c.Layer(context.Background(), req, &res); err != nil {
				t.Fatal(err)
			}
			calls = append(calls, time.Since(start))
		}
		slices.Sort(calls)
		d := &c.call.desc
		once := func(i int) error {
			*(*kernels.Layer)(l.block.Pointer()) = described[i]
			if c.call.fused && !c.call.dense {
				return l.fused.run(c.call.plan, int(d.Rows))
			}
			if dense, ok := c.denseLaunch(); ok && !c.call.sparse {
				return dense.Run(int(d.Splits), int(d.Rows))
			}
			return c.launch(i)
		}
		inner := max(layers, 4)
		b.do(func() error {
			for range *rounds + 1 {
				took, err := timed(l.stream, func() error {
					for i := range inner {
						if err := once(i % layers); err != nil {
							return err
						}
					}
					return nil
				})
				if err != nil {
					return err
				}
				us = append(us, took/float64(inner))
			}
			return nil
		})
		us = us[1:]
		slices.Sort(us)
		return c, us, calls, res
	}

	_, dense, _, _ := run(`{}`)
	const sparsely = `{"selector": {"type": "quest", "sparsity_rate": 0.25}, "weight_estimator": {"type": "min_max_quant"},
		"weight_pruner": {"type": "top_p", "threshold": 0.95}, "dense_below": %d}`
	c, sparse, calls, res := run(fmt.Sprintf(sparsely, 0))
	var sum, square float64
	for _, k := range res.Kept {
		sum += float64(k)
		square += float64(k) * float64(k)
	}
	rows := float64(len(res.Kept))
	mean := sum / rows
	bytes := float64(res.Read.Cache+res.Read.Shadow) + float64(hkv*all/page*4)
	median := func(us []float64) float64 { return us[len(us)/2] }
	path := "chain"
	if c.call.fused {
		path = fmt.Sprintf("%d x %d", c.call.plan.cluster, c.lease.fused.variants[c.call.plan.variant].Threads)
	}
	whole := float64(res.Timing.Select + res.Timing.Prune + res.Timing.Attend)
	share := func(stage time.Duration) float64 { return 100 * float64(stage) / whole }
	chosen, choice := sparse, "sparse"
	switch from := c.crossover(); {
	case from > tokens:
		chosen, choice = dense, "dense"
	case from > 0:
		_, chosen, _, _ = run(fmt.Sprintf(sparsely, pipeline.ByCost))
		choice = "both"
	}
	fmt.Printf("%2d/%-2d %5d %7d %6d %4d | %8.1f %5.2f | %8.1f %4.1f%%-%4.1f%% %5.2f | %5.2f | %-6s %5.2f | %5.0f (%.0f) [%d, %d] | %s | %2.0f %2.0f %2.0f | %.0f\n",
		hq, hkv, batch, tokens, of.short, page, median(dense), 2*float64(hkv*all)*dim*2/median(dense)*1e6/b.reading,
		median(sparse), 100*(sparse[0]/median(sparse)-1), 100*(sparse[len(sparse)-1]/median(sparse)-1),
		bytes/median(sparse)*1e6/b.reading, median(dense)/median(sparse), choice, median(dense)/median(chosen),
		mean, math.Sqrt(square/rows-mean*mean), slices.Min(res.Kept), slices.Max(res.Kept), path,
		share(res.Timing.Select), share(res.Timing.Prune), share(res.Timing.Attend), float64(calls[len(calls)/2].Nanoseconds())/1e3)
}
