//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

var (
	table = flag.String("table", "", "shapes that TestTable times, separated by commas: "+
		"QUERY_HEADS/KV_HEADSxBATCHxTOKENS[/PAGE_SIZE[/TOKENS of every other sequence]]")
	chain  = flag.Bool("chain", false, "time the chain of kernels in place of the fused one")
	force  = flag.String("force", "", "CLUSTERxTHREADS of the fused kernel; its own choice")
	rounds = flag.Int("rounds", 15, "timings of a shape, of which the median is printed")
	lines  = flag.String("lines", "", "file to which TestTable writes what it prints, a JSON object a line")
)

// bench owns GPU memory as an engine does, in this process: lending it would change nothing of what a
// layer costs.
type bench struct {
	t       *testing.T
	device  *Device
	engine  *engine.GPU
	reading float64 // bytes a second
}

func newBench(t *testing.T) *bench {
	o := Options{}
	if *chain {
		o.FusedFrom = -1
	}
	b := &bench{t: t, device: newDeviceOf(t, o)}
	var err error
	if b.engine, err = engine.Open(""); err != nil {
		t.Fatal(err)
	}
	if b.reading, err = b.engine.ReadRate(8 << 30); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.engine.Close() })
	return b
}

func (b *bench) do(f func() error) {
	b.t.Helper()
	if err := b.device.owner.do(context.Background(), f); err != nil {
		b.t.Fatal(err)
	}
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
	fmt.Printf("%s, reading %.0f GB/s; medians of %d\n", b.device.name, b.reading/1e9, *rounds)
	fmt.Println("heads batch  tokens  short page | dense us  read | sparse us       spread  read | times | choice times | kept mean (sd) [range] | blocks a row | stages % | call us")
	for shape := range strings.SplitSeq(*table, ",") {
		of := shapeOf{page: 16}
		if n, err := fmt.Sscanf(shape, "%d/%dx%dx%d/%d/%d", &of.hq, &of.hkv, &of.batch, &of.tokens, &of.page, &of.short); n < 4 {
			t.Fatalf("-table: %q: %v", shape, err)
		}
		b.row(of)
	}
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

// shapeOf is a batch to time. If short is not 0 every other sequence has only that many tokens.
type shapeOf struct{ hq, hkv, batch, tokens, page, short int }

func (o *shapeOf) length(sequence int) int {
	if o.short > 0 && sequence%2 == 1 {
		return o.short
	}
	return o.tokens
}

func (b *bench) row(of shapeOf) {
	t := b.t
	const dim = 128
	hq, hkv, batch, tokens, page := of.hq, of.hkv, of.batch, of.tokens, of.page
	pages := batch * tokens / page
	order := make([]int32, pages)
	for i, p := range rand.New(rand.NewPCG(1, 2)).Perm(pages) {
		order[i] = int32(p)
	}
	data := &engine.Tensors{
		PageSize: page, KVHeads: hkv, Dim: dim, QueryHeads: hq, Tables: slices.Collect(slices.Chunk(order, tokens/page)),
	}
	plane, queries := uint64(data.PlaneBytes()), uint64(data.QueryBytes())
	// Enough layers to leave the cache behind, if there is room for them.
	layers := int(max(1, min(16, (4<<30)/(2*plane))))
	size := uint64(layers)*2*plane + 2*queries
	memory, err := b.engine.Alloc(gpu.CUDAIPC, int(size), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Release()
	err = memory.FillQueries(data, layers*2*int(plane), 7)
	for i := range layers {
		at := i * 2 * int(plane)
		err = errors.Join(err, memory.FillPlanes(data, at, at+int(plane), uint64(i+1)))
	}
	if err != nil {
		t.Fatal(err)
	}
	at := memory.Address()

	step := &kv.Step{}
	sum := 0 // of all sequences' tokens
	for s := range batch {
		n := of.length(s)
		step.Sequences = append(step.Sequences, uint64(s+1))
		step.Lengths = append(step.Lengths, int32(n))
		step.TableCounts = append(step.TableCounts, uint32(n/page))
		step.TableEntries = append(step.TableEntries, data.Tables[s][:n/page]...)
		sum += n
	}
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	g := &kv.Geometry{
		Layers: layers, QueryHeads: hq, KVHeads: hkv, KDim: dim, VDim: dim, Scale: 1 / float32(math.Sqrt(dim)),
		Query: kv.F16, QueryScale: 1, Output: kv.F16,
	}
	run := func(config string) (c *cache, us []float64, calls []time.Duration, res gpu.LayerResult) {
		cfg, err := all.Parse([]byte(config))
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
	var total, square float64
	for _, k := range res.Kept {
		total += float64(k)
		square += float64(k) * float64(k)
	}
	rows := float64(len(res.Kept))
	mean := total / rows
	bytes := float64(res.Read.Cache+res.Read.Shadow) + float64(hkv*sum/page*4)
	median := func(us []float64) float64 { return us[len(us)/2] }
	path := "chain"
	if c.call.fused {
		path = fmt.Sprintf("%d x %d", c.call.plan.cluster, c.lease.fused.variants[c.call.plan.variant].Threads)
	}
	chosen, choice := sparse, "sparse" // what goes by costs
	switch from := c.crossover(); {
	case from > tokens:
		chosen, choice = dense, "dense"
	case from > 0:
		_, chosen, _, _ = run(fmt.Sprintf(sparsely, pipeline.ByCost))
		choice = "both"
	}
	row := line{
		QueryHeads: hq, KVHeads: hkv, Batch: batch, Tokens: tokens, PageSize: page, Short: of.short,
		Dense: median(dense), DenseRead: 2 * float64(hkv*sum) * dim * 2 / median(dense) * 1e6 / b.reading,
		Sparse: median(sparse), SparseRead: bytes / median(sparse) * 1e6 / b.reading, Bytes: bytes,
		Choice: choice, Chosen: median(chosen),
		Kept: mean, Candidates: int(res.Candidates[0]), Path: path, Call: float64(calls[len(calls)/2].Nanoseconds()) / 1e3,
	}
	whole := float64(res.Timing.Select + res.Timing.Prune + res.Timing.Attend)
	share := func(stage time.Duration) float64 { return 100 * float64(stage) / whole }
	fmt.Printf("%2d/%-2d %5d %7d %6d %4d | %8.1f %5.2f | %8.1f %4.1f%%-%4.1f%% %5.2f | %5.2f | %-6s %5.2f | %5.0f (%.0f) [%d, %d] | %s | %2.0f %2.0f %2.0f | %.0f\n",
		hq, hkv, batch, tokens, of.short, page, row.Dense, row.DenseRead,
		row.Sparse, 100*(sparse[0]/row.Sparse-1), 100*(sparse[len(sparse)-1]/row.Sparse-1), row.SparseRead, row.Dense/row.Sparse,
		choice, row.Dense/row.Chosen, mean, math.Sqrt(square/rows-mean*mean), slices.Min(res.Kept), slices.Max(res.Kept), path,
		share(res.Timing.Select), share(res.Timing.Prune), share(res.Timing.Attend), row.Call)
	if *lines != "" {
		f, err := os.OpenFile(*lines, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			err = errors.Join(json.NewEncoder(f).Encode(row), f.Close())
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// line is a row of the table, times in microseconds a layer.
type line struct {
	QueryHeads int     `json:"query_heads"`
	KVHeads    int     `json:"kv_heads"`
	Batch      int     `json:"batch"`
	Tokens     int     `json:"tokens"`
	PageSize   int     `json:"page_size"`
	Short      int     `json:"short,omitempty"` // tokens of every other sequence
	Dense      float64 `json:"dense_us"`
	DenseRead  float64 `json:"dense_of_read"`
	Sparse     float64 `json:"sparse_us"`
	SparseRead float64 `json:"sparse_of_read"`
	Bytes      float64 `json:"sparse_bytes"`
	Choice     string  `json:"choice"` // by costs
	Chosen     float64 `json:"chosen_us"`
	Kept       float64 `json:"kept"`
	Candidates int     `json:"candidates"`
	Path       string  `json:"path"`
	Call       float64 `json:"call_us"`
}
