//go:build linux && cgo && cuda

package cuda

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/gpu/gputest"
	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

var (
	cases = flag.Int("cases", 300, "random cases that TestAgainstHost runs")
	seed  = flag.Uint64("seed", 1, "seed of the first; case i has seed+i")
)

func newDevice(t testing.TB) *Device { return newDeviceOf(t, Options{}) }

func newDeviceOf(t testing.TB, o Options) *Device {
	t.Helper()
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestSelfTest(t *testing.T) {
	if err := newDevice(t).SelfTest(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestConformance runs the suite that every device must pass, on memory of another process. Memory by
// VMM, which comes in chunks of megabytes only, is left to TestAgainstHost.
func TestConformance(t *testing.T) {
	_, uuid, err := drv.Find("")
	if err != nil {
		t.Fatal(err)
	}
	gputest.Run(t, func(t testing.TB) gpu.Device { return newDevice(t) }, lender{kind: gpu.CUDAIPC, uuid: uuid},
		gputest.Extrapolation(1e-2))
}

// scenario is a random cache, config and decode, run on the CPU and on the GPU.
type scenario struct {
	geometry kv.Geometry
	layout   layout.Config
	config   string
	lengths  []int // at the first step
	first    []int
	steps    int
	shuffled bool
	lists    bool
	fused    bool // by the fused kernel

	estimated bool // attention is by estimated weights
	overrides bool // requests have shares and budgets of their own
}

func pick[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

func randomScenario(r *rand.Rand) scenario {
	group := pick(r, 1, 1, 2, 3, 4, 5, 7, 8, 11, 16)
	heads := pick(r, 1, 2, 3)
	dim := pick(r, 64, 80, 96, 128, 256, 16, 48)
	s := scenario{
		geometry: kv.Geometry{
			Layers: 1 + r.IntN(2), QueryHeads: group * heads, KVHeads: heads, KDim: dim,
			VDim:  pick(r, dim, dim, dim, 64, 128),
			Scale: 1 / float32(math.Sqrt(float64(dim))),
			Query: pick(r, kv.F32, kv.F16, kv.BF16, kv.F8E4M3), Output: pick(r, kv.F32, kv.F16, kv.BF16),
			QueryScale: 1,
		},
		steps: 1 + r.IntN(3), shuffled: r.IntN(3) > 0, lists: r.IntN(2) > 0, overrides: r.IntN(4) == 0,
	}
	g := &s.geometry
	if g.Query == kv.F8E4M3 {
		g.QueryScale = pick[float32](r, 1, .5, .75)
	}
	if r.IntN(5) == 0 {
		g.Softcap = pick[float32](r, 20, 50)
	}
	if r.IntN(5) == 0 {
		for range g.QueryHeads {
			g.Sinks = append(g.Sinks, float32(r.NormFloat64()*2))
		}
	}
	for range 1 + r.IntN(3) {
		n := pick(r, 1+r.IntN(40), 1+r.IntN(400), 1+r.IntN(1600))
		s.lengths = append(s.lengths, n)
		s.first = append(s.first, pick(r, 0, 0, r.IntN(n)))
	}
	most := 0
	for _, n := range s.lengths {
		most = max(most, n)
	}
	s.layout = layout.Config{
		Kind: pick(r, layout.Kinds()...), DType: pick(r, kv.F32, kv.F16, kv.F16, kv.BF16, kv.BF16, kv.F8E4M3, kv.F8E4M3),
		Layers: g.Layers, KVHeads: heads, KDim: g.KDim, VDim: g.VDim,
		Sequences: len(s.lengths), Tokens: most + s.steps, PageSize: pick(r, 1, 7, 16, 16, 32, 64, 3),
	}
	if r.IntN(4) == 0 {
		s.layout.PagePadding = s.layout.DType.Size() * pick(r, 1, 8, 16)
	}
	if s.layout.DType == kv.F8E4M3 && r.IntN(2) == 0 {
		for range heads {
			s.layout.KScales = append(s.layout.KScales, .25+r.Float32())
			s.layout.VScales = append(s.layout.VScales, .25+r.Float32())
		}
	}
	s.estimated = r.IntN(8) == 0
	s.config = fmt.Sprintf(`{"selector": %s, "weight_estimator": %s, "weight_pruner": %s, "group": %q,
		"skip_first_two_layers": false, "pin_first_chunk": %v, "pin_current_chunk": %v, "dense_below": %d,
		"p_over": %q, "use_estimated_weights_in_attn": %v, "audit": %v}`,
		randomSelector(r, g), randomEstimator(r), randomPruner(r, g), pick(r, "union", "union", "per_query_head"),
		r.IntN(3) > 0, r.IntN(3) > 0, pick(r, 0, 0, 64), pick(r, "candidates", "candidates", "all"), s.estimated,
		pick(r, 0, 0, .3, 1))
	return s
}

func randomSelector(r *rand.Rand, g *kv.Geometry) string {
	budget := fmt.Sprintf(`"token_budget": %d, "sparsity_rate": %v`, 1+r.IntN(400), pick(r, -1, -1, .25))
	switch r.IntN(10) {
	case 0, 1:
		return `{"type": "none"}`
	case 2:
		return fmt.Sprintf(`{"type": "streaming", "token_budget": %d, "num_sinks": %d}`, 1+r.IntN(400), r.IntN(40))
	case 3:
		return fmt.Sprintf(`{"type": "oracle_topk", %s}`, budget)
	case 4:
		return fmt.Sprintf(`{"type": "tidal_decode", %s, "reselection_layers": [0]}`, budget)
	case 5:
		return fmt.Sprintf(`{"type": "sparq", %s, "r": %d}`, budget, pick(r, 0, 1+r.IntN(g.KDim)))
	case 6, 7:
		n, channels := 1+r.IntN(g.KDim), map[string][][]int{}
		for layer := range g.Layers {
			for range g.KVHeads {
				channels[strconv.Itoa(layer)] = append(channels[strconv.Itoa(layer)], r.Perm(g.KDim)[:n])
			}
		}
		lists, err := json.Marshal(channels)
		if err != nil {
			panic(err)
		}
		return fmt.Sprintf(`{"type": "ds", %s, "r": %d, "quant_bit": %d, "channels": %s}`, budget, n, pick(r, 2, 4, 8, 32), lists)
	}
	return fmt.Sprintf(`{"type": "quest", %s}`, budget)
}

func randomEstimator(r *rand.Rand) string {
	switch r.IntN(6) {
	case 0:
		return `{"type": "none"}`
	case 1:
		return fmt.Sprintf(`{"type": "min_max_quant", "quant_bit": %d, "equalize": %v}`, pick(r, 2, 8), r.IntN(2) > 0)
	case 2:
		return fmt.Sprintf(`{"type": "max_quant", "quant_bit": %d, "smooth_k": %v}`, pick(r, 2, 4, 8), r.IntN(2) > 0)
	}
	return fmt.Sprintf(`{"type": "min_max_quant", "equalize": %v}`, r.IntN(2) > 0)
}

func randomPruner(r *rand.Rand, g *kv.Geometry) string {
	kind, of := "top_p", func() float64 { return pick(r, .85, .95, 1) }
	switch r.IntN(4) {
	case 0:
		return `{"type": "none"}`
	case 1:
		kind, of = "threshold", func() float64 { return r.NormFloat64() * 3 }
	}
	limits := ""
	if r.IntN(4) == 0 {
		least := r.IntN(100)
		limits = fmt.Sprintf(`, "min_budget": %d, "max_budget": %d`, least, pick(r, 0, max(1, least)+r.IntN(200)))
	}
	if r.IntN(4) == 0 {
		limits += fmt.Sprintf(`, "threshold_by_layer": {"0": %v}`, of())
	}
	if r.IntN(4) == 0 {
		heads := make([]float64, g.QueryHeads)
		for h := range heads {
			heads[h] = of()
		}
		limits += fmt.Sprintf(`, "threshold_by_head": {"%d": %s}`, g.Layers-1, strings.ReplaceAll(fmt.Sprint(heads), " ", ","))
	}
	return fmt.Sprintf(`{"type": %q, "threshold": %v%s}`, kind, of(), limits)
}

// engine plays a scenario on one device.
type player struct {
	t      testing.TB
	buffer gputest.Buffer
	cache  gpu.Cache
}

func newPlayer(t testing.TB, d gpu.Device, mem gputest.Memory, s *scenario, l *layout.Layout, all *pipeline.Methods) *player {
	t.Helper()
	cfg, err := all.Parse([]byte(s.config))
	if err != nil {
		t.Fatal(err)
	}
	lease, err := d.Open(context.Background(), &s.geometry, cfg)
	if err != nil {
		t.Fatal(err)
	}
	buffer := mem.Alloc(t, int(l.Size()))
	// Freed before the engine frees its memory.
	t.Cleanup(func() {
		if err := lease.Close(); err != nil {
			t.Error(err)
		}
	})
	m, err := lease.Import(context.Background(), buffer.Region(t, int(l.Size()), false))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := lease.NewCache(context.Background(), l.Spec(m, 0))
	if err != nil {
		t.Fatal(err)
	}
	return &player{t, buffer, cache}
}

// TestAgainstHost runs random cases on the CPU and by the chain of kernels.
func TestAgainstHost(t *testing.T) {
	againstHost(t, *cases, newDeviceOf(t, Options{FusedFrom: -1}), randomScenario)
}

// TestFusedAgainstHost does so by the fused kernel.
func TestFusedAgainstHost(t *testing.T) {
	againstHost(t, *cases/4, newDeviceOf(t, Options{FusedFrom: 1}), func(r *rand.Rand) scenario {
		s := randomScenario(r)
		g := &s.geometry
		dim, group := pick(r, 64, 128), pick(r, 1, 2, 3, 4, 5, 7, 8)
		g.KDim, g.VDim, g.QueryHeads, g.Scale = dim, dim, group*g.KVHeads, 1/float32(math.Sqrt(float64(dim)))
		g.Sinks = nil
		if r.IntN(4) == 0 {
			for range g.QueryHeads {
				g.Sinks = append(g.Sinks, float32(r.NormFloat64()*2))
			}
		}
		for b := range s.lengths {
			s.lengths[b] = pick(r, 1+r.IntN(300), 1+r.IntN(3000), 1+r.IntN(9000))
			s.first[b] = pick(r, 0, 0, r.IntN(s.lengths[b]))
		}
		s.layout = layout.Config{
			Kind: s.layout.Kind, DType: pick(r, kv.F16, kv.BF16), Layers: g.Layers, KVHeads: g.KVHeads, KDim: dim, VDim: dim,
			Sequences: len(s.lengths), Tokens: slices.Max(s.lengths) + s.steps, PageSize: pick(r, 1, 7, 16, 16, 64),
		}
		s.config = fmt.Sprintf(`{"selector": %s, "weight_estimator": {"type": "min_max_quant", "equalize": %v},
			"weight_pruner": {"type": "top_p", "threshold": %v%s}, "group": %q, "skip_first_two_layers": false,
			"pin_first_chunk": %v, "pin_current_chunk": %v, "dense_below": %d, "audit": %v}`,
			pick(r, `{"type": "quest", "token_budget": 8192}`, `{"type": "quest", "token_budget": 512}`, `{"type": "quest", "sparsity_rate": 0.25}`),
			r.IntN(2) > 0, pick(r, .85, .95, 1), pick(r, "", `, "threshold_by_layer": {"0": 0.7, "1": 1}`),
			pick(r, "union", "union", "per_query_head"), r.IntN(3) > 0, r.IntN(3) > 0, pick(r, 0, slices.Max(s.lengths)),
			pick(r, 0, .5))
		s.estimated = false
		if s.layout.DType == kv.BF16 && g.Output == kv.F32 {
			g.Output = kv.F16
		}
		s.fused = true
		return s
	})
}

func againstHost(t *testing.T, cases int, device *Device, random func(r *rand.Rand) scenario) {
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	cpu := host.New(host.Options{Methods: all})
	t.Cleanup(func() { cpu.Close() })
	var worst float64
	for i := range cases {
		n := *seed + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", n), func(t *testing.T) {
			r := rand.New(rand.NewPCG(n, 0))
			s := random(r)
			kind := pick(r, gpu.CUDAIPC, gpu.CUDAVMM)
			worst = max(worst, s.compare(t, r, device, lender{kind, device.uuid, pick(r, 0, 768)}, cpu, all))
			if t.Failed() {
				t.Logf("%+v", s)
			}
		})
	}
	t.Logf("%d cases from seed %d; largest relative error of an output row %.2g", cases, *seed, worst)
}

// compare runs a scenario on both devices and returns the largest relative error of a row's output.
func (s *scenario) compare(
	t *testing.T, r *rand.Rand, device gpu.Device, mem gputest.Memory, cpu gpu.Device, all *pipeline.Methods,
) (worst float64) {
	l, err := layout.New(s.layout)
	if err != nil {
		t.Fatal(err)
	}
	g := &s.geometry
	fast, plain := newPlayer(t, device, mem, s, l, all), newPlayer(t, cpu, gputest.Memfd{}, s, l, all)
	var order []int32
	if s.shuffled {
		for _, p := range r.Perm(l.NumPages) {
			order = append(order, int32(p))
		}
	}
	tables := l.Tables(order)
	data := make([]byte, l.Size())
	normal := func(n int, spread float64) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(r.NormFloat64() * spread)
		}
		return x
	}
	for layer := range g.Layers {
		for b := range s.lengths {
			keys := normal(g.KVHeads*l.Tokens*g.KDim, 1)
			// Some channels with a large mean, as models have them.
			for i := range keys {
				if i%g.KDim%29 == 3 {
					keys[i] += 6
				}
			}
			l.Write(data, layer, tables[b], keys, normal(g.KVHeads*l.Tokens*g.VDim, 1), 0, s.lengths[b]+s.steps-1)
		}
	}
	fast.buffer.Write(0, data)
	plain.buffer.Write(0, data)

	for step := range s.steps {
		st := &kv.Step{}
		for b := range s.lengths {
			st.Sequences = append(st.Sequences, uint64(b+1))
			st.Lengths = append(st.Lengths, int32(s.lengths[b]+step))
			st.FirstValid = append(st.FirstValid, int32(s.first[b]))
			have := 0
			if step > 0 {
				have = (s.lengths[b] + step - 1 + l.PageSize - 1) / l.PageSize
			}
			pages := (s.lengths[b] + step + l.PageSize - 1) / l.PageSize
			st.TableStarts = append(st.TableStarts, uint32(have))
			st.TableCounts = append(st.TableCounts, uint32(pages-have))
			st.TableEntries = append(st.TableEntries, tables[b][have:pages]...)
		}
		for _, p := range []*player{fast, plain} {
			if err := p.cache.Step(context.Background(), st); err != nil {
				t.Fatal(err)
			}
		}
		for layer := range g.Layers {
			query := make([]byte, len(s.lengths)*g.QueryHeads*g.KDim*g.Query.Size())
			g.Query.Encode(query, normal(len(s.lengths)*g.QueryHeads*g.KDim, 1.5))
			req := &gpu.LayerRequest{Layer: layer, Query: &gpu.Tensor{Inline: query}, Lists: true}
			for range s.lengths {
				if s.overrides {
					req.P = append(req.P, pick[float32](r, 0, .5, .9))
					req.TokenBudget = append(req.TokenBudget, pick(r, 0, r.Uint32N(600)))
				}
			}
			var got, want gpu.LayerResult
			if err := fast.cache.Layer(context.Background(), req, &got); err != nil {
				t.Fatal(err)
			}
			if err := plain.cache.Layer(context.Background(), req, &want); err != nil {
				t.Fatal(err)
			}
			if call := &fast.cache.(*cache).call; s.fused && call.sparse && !call.fused {
				t.Error("the fused kernel did not run, or gave up")
			}
			attend := func(row int, list []int32) []float64 {
				return s.attend(l, data, tables, layer, query, row, list, len(want.Kept))
			}
			worst = max(worst, s.check(t, fmt.Sprintf("step %d layer %d", step, layer), &got, &want, attend))
		}
	}
	return worst
}

// attend computes attention of a list row's query heads over a list plainly: [asking][VDim].
func (s *scenario) attend(
	l *layout.Layout, data []byte, tables [][]int32, layer int, query []byte, row int, list []int32, rows int,
) (out []float64) {
	g := &s.geometry
	asking := g.QueryHeads * len(s.lengths) / rows
	first := row * asking // query head among all of the batch
	b, head := first/g.QueryHeads, first%g.QueryHeads/g.Group()
	read := func(at uint64, strides gpu.Strides, dim int, scales []float32) []float32 {
		plane := kv.Plane{
			Data: data[at:], PageStride: int(strides.Page), HeadStride: int(strides.Head), TokenStride: int(strides.Token),
			PageSize: l.PageSize, DType: l.DType, Dim: dim, Scales: scales,
		}
		x := make([]float32, len(list)*dim)
		plane.Reader(tables[b], head).Gather(x, list)
		return x
	}
	keys, values := read(l.KOffset(layer), l.K, g.KDim, l.KScales), read(l.VOffset(layer), l.V, g.VDim, l.VScales)
	for h := first; h < first+asking; h++ {
		q := make([]float32, g.KDim)
		g.Query.Decode(q, query[h*g.KDim*g.Query.Size():])
		logits, top := make([]float64, len(list)), math.Inf(-1)
		if g.Sinks != nil {
			top = float64(g.Sinks[h%g.QueryHeads])
		}
		for i := range list {
			for d, x := range q {
				logits[i] += float64(x*g.QueryScale) * float64(keys[i*g.KDim+d])
			}
			logits[i] *= float64(g.Scale)
			if g.Softcap > 0 {
				logits[i] = float64(g.Softcap) * math.Tanh(logits[i]/float64(g.Softcap))
			}
			top = max(top, logits[i])
		}
		sum := 0.0
		if g.Sinks != nil {
			sum = math.Exp(float64(g.Sinks[h%g.QueryHeads]) - top)
		}
		row := make([]float64, g.VDim)
		for i := range list {
			w := math.Exp(logits[i] - top)
			sum += w
			for d := range row {
				row[d] += w * float64(values[i*g.VDim+d])
			}
		}
		for _, x := range row {
			out = append(out, x/sum)
		}
	}
	return out
}

// check holds a layer's results against the host's: what is kept is the same but for scores and weights
// that are all but equal, and outputs are those of attention over what is kept.
func (s *scenario) check(
	t *testing.T, at string, got, want *gpu.LayerResult, attend func(row int, list []int32) []float64,
) (worst float64) {
	t.Helper()
	g := &s.geometry
	if got.Index != want.Index {
		t.Errorf("%s: indexed %+v, want %+v", at, got.Index, want.Index)
	}
	if slices.Equal(got.Kept, want.Kept) && slices.Equal(got.Candidates, want.Candidates) && got.Read != want.Read {
		t.Errorf("%s: read %+v, want %+v", at, got.Read, want.Read)
	}
	if !slices.Equal(got.Audited, want.Audited) {
		t.Fatalf("%s: audited %v, want %v", at, got.Audited, want.Audited)
	}
	for i, h := range got.Audited {
		mass, off := float64(got.TrueMass[i]-want.TrueMass[i]), float64(got.OutputError[i]-want.OutputError[i])
		if !(math.Abs(mass) <= .02) || !(math.Abs(off) <= .02+.1*float64(want.OutputError[i])) {
			t.Errorf("%s query head %d: true mass %v and error %v, want %v and %v",
				at, h, got.TrueMass[i], got.OutputError[i], want.TrueMass[i], want.OutputError[i])
		}
	}
	asking := g.QueryHeads * len(s.lengths) / len(want.Kept)
	outputs := func(res *gpu.LayerResult) []float32 {
		x := make([]float32, len(res.Output)/g.Output.Size())
		g.Output.Decode(x, res.Output)
		return x
	}
	out, ref := outputs(got), outputs(want)
	if len(out) != len(ref) {
		t.Fatalf("%s: output of %d elements, want %d", at, len(out), len(ref))
	}
	gotAt, wantAt := 0, 0
	for row := range want.Kept {
		if got.Paths[row] != want.Paths[row] || got.Reasons[row] != want.Reasons[row] {
			t.Errorf("%s row %d: path %d for reason %d, want %d for %d",
				at, row, got.Paths[row], got.Reasons[row], want.Paths[row], want.Reasons[row])
		}
		a, b := got.Lists[gotAt:][:got.Kept[row]], want.Lists[wantAt:][:want.Kept[row]]
		gotAt, wantAt = gotAt+int(got.Kept[row]), wantAt+int(want.Kept[row])
		differ := difference(a, b)
		// Scores and weights that are all but equal may change places: a chunk for a chunk, a token for one.
		allowed := 8 + len(b)/100 + 2*kv.ChunkTokens
		if differ > allowed || math.Abs(float64(got.Candidates[row])-float64(want.Candidates[row])) > kv.ChunkTokens {
			t.Errorf("%s row %d: kept %d of %d candidates, want %d of %d; %d positions differ",
				at, row, got.Kept[row], got.Candidates[row], want.Kept[row], want.Candidates[row], differ)
		}
		limit := 2e-3
		if g.Output == kv.BF16 {
			limit = 8e-3
		}
		if s.estimated && differ > 0 { // other estimates, so other attention
			limit = .1
		}
		var own []float64
		if differ > 0 {
			own = attend(row, a)
		}
		for h := row * asking; h < (row+1)*asking; h++ {
			expected := ref[h*g.VDim:][:g.VDim]
			if differ > 0 && !s.estimated {
				for d := range expected {
					expected[d] = float32(own[(h-row*asking)*g.VDim+d])
				}
			}
			e := relativeError(out[h*g.VDim:][:g.VDim], expected)
			worst = max(worst, e)
			if !(e <= limit) {
				t.Errorf("%s query head %d: output is off by %.3g, kept %d, want %d, %d positions differ",
					at, h, e, len(a), len(b), differ)
			}
			if len(got.Mass) > 0 && !math.IsNaN(float64(got.Mass[h])) && math.Abs(float64(got.Mass[h]-want.Mass[h])) > .02 {
				t.Errorf("%s query head %d: mass %v, want %v", at, h, got.Mass[h], want.Mass[h])
			}
		}
	}
	return worst
}

// difference counts the elements that are in one ascending list only.
func difference(a, b []int32) (n int) {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] == b[0]:
			a, b = a[1:], b[1:]
		case a[0] < b[0]:
			a, n = a[1:], n+1
		default:
			b, n = b[1:], n+1
		}
	}
	return n + len(a) + len(b)
}

func relativeError(got, want []float32) float64 {
	var off, norm float64
	for i := range want {
		d := float64(got[i]) - float64(want[i])
		off += d * d
		norm += float64(want[i]) * float64(want[i])
	}
	if norm == 0 {
		return math.Sqrt(off)
	}
	return math.Sqrt(off / norm)
}

// TestBadTables corrupts the tables that lie on the device, as an engine's own could be: rows that name
// pages or shadow chunks that do not exist are void, their neighbours are not harmed, and nothing faults.
func TestBadTables(t *testing.T) {
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, fusedFrom := range []int{-1, 1} {
		device := newDeviceOf(t, Options{FusedFrom: fusedFrom})
		for n := range uint64(100) {
			r := rand.New(rand.NewPCG(n, 2))
			const tokens, rows = 700, 3
			s := scenario{
				geometry: kv.Geometry{
					Layers: 1, QueryHeads: 4, KVHeads: 2, KDim: 64, VDim: 64, Scale: .125,
					Query: kv.F32, QueryScale: 1, Output: kv.F16,
				},
				layout: layout.Config{
					Kind: layout.NHD, DType: kv.F16, Layers: 1, KVHeads: 2, KDim: 64, VDim: 64,
					Sequences: rows, Tokens: tokens, PageSize: pick(r, 16, 7),
				},
				config: `{"selector": {"type": "quest", "token_budget": 256}, "weight_estimator": {"type": "min_max_quant"},
					"weight_pruner": {"type": "top_p"}, "skip_first_two_layers": false}`,
				lengths: []int{tokens, tokens, tokens},
			}
			l, err := layout.New(s.layout)
			if err != nil {
				t.Fatal(err)
			}
			p := newPlayer(t, device, lender{kind: gpu.CUDAIPC, uuid: device.uuid}, &s, l, all)
			data := make([]byte, l.Size())
			for i := range data {
				data[i] = byte(r.Uint32()) &^ 0x40 // finite numbers below 2
			}
			p.buffer.Write(0, data)
			step := &kv.Step{}
			for b, table := range l.Tables(nil) {
				step.Sequences = append(step.Sequences, uint64(b+1))
				step.Lengths = append(step.Lengths, tokens)
				step.TableCounts = append(step.TableCounts, uint32(len(table)))
				step.TableEntries = append(step.TableEntries, table...)
			}
			c := p.cache.(*cache)
			if err := c.Step(context.Background(), step); err != nil {
				t.Fatal(err)
			}
			query := make([]float32, rows*4*64)
			for i := range query {
				query[i] = float32(r.NormFloat64())
			}
			req := &gpu.LayerRequest{Query: &gpu.Tensor{Inline: bytesOf(query)}, Lists: true}
			var want, got gpu.LayerResult
			if err := c.Layer(context.Background(), req, &want); err != nil {
				t.Fatal(err)
			}
			// A value beyond all pages, in one row's table.
			const bad = 1
			table := c.batch.tables.ptr + uint64(4*(bad*c.batch.stride+r.IntN(tokens/l.PageSize)))
			wrong := []int32{pick(r, int32(l.NumPages), -1, math.MaxInt32, math.MinInt32, int32(l.NumPages)+r.Int32N(1<<20))}
			err = device.owner.do(context.Background(), func() error {
				return drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(cu.DevicePtr(table), unsafe.Pointer(&wrong[0]), 4))
			})
			if err != nil {
				t.Fatal(err)
			}
			c.batch.checked = false
			if err := c.Layer(context.Background(), req, &got); err != nil {
				t.Fatal(err)
			}
			each := len(want.Output) / rows
			for b := range rows {
				expected, reason := want.Output[b*each:][:each], pipeline.Reason(0)
				if b == bad {
					expected, reason = make([]byte, each), pipeline.BadRow
				}
				if !bytes.Equal(got.Output[b*each:][:each], expected) || got.Reasons[2*b] != reason {
					t.Fatalf("seed %d: row %d for reason %d: %d bytes of output are not what they were",
						n, b, got.Reasons[2*b], each)
				}
			}
			after := make([]byte, len(data))
			if p.buffer.Read(0, after); !bytes.Equal(after, data) {
				t.Fatal("the cache was written")
			}
		}
	}
}

// TestFuzzedBatches puts random numbers, and numbers that are nearly right, where a batch lies on the device:
// whatever rows then are, nothing outside of their memory is touched, and the cache is never written.
func TestFuzzedBatches(t *testing.T) {
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	devices := []*Device{newDeviceOf(t, Options{FusedFrom: -1}), newDeviceOf(t, Options{FusedFrom: 1})}
	for i := range *cases {
		n := *seed + uint64(i)
		r := rand.New(rand.NewPCG(n, 3))
		s := randomScenario(r)
		device := devices[r.IntN(2)]
		l, err := layout.New(s.layout)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(fmt.Sprintf("seed=%d", n), func(t *testing.T) {
			p := newPlayer(t, device, lender{kind: gpu.CUDAIPC, uuid: device.uuid}, &s, l, all)
			c := p.cache.(*cache)
			data := make([]byte, l.Size())
			for i := range data {
				data[i] = byte(r.Uint32()) &^ 0x40
			}
			p.buffer.Write(0, data)
			query := make([]byte, len(s.lengths)*s.geometry.QueryHeads*s.geometry.KDim*s.geometry.Query.Size())
			step := &kv.Step{}
			for b, table := range l.Tables(nil) {
				pages := ceilDiv(s.lengths[b], l.PageSize)
				step.Sequences = append(step.Sequences, uint64(b+1))
				step.Lengths = append(step.Lengths, int32(s.lengths[b]))
				step.FirstValid = append(step.FirstValid, int32(s.first[b]))
				step.TableCounts = append(step.TableCounts, uint32(pages))
				step.TableEntries = append(step.TableEntries, table[:pages]...)
			}
			if err := c.Step(t.Context(), step); err != nil {
				t.Fatal(err)
			}
			for range 8 {
				err := device.owner.do(t.Context(), func() error {
					if err := c.batch.put(); err != nil {
						return err
					}
					return c.batch.spoil(r)
				})
				if err != nil {
					t.Fatal(err)
				}
				c.batch.checked = false
				for layer := range s.geometry.Layers {
					// The step is as it was to the tracker, which counts what is indexed once.
					c.tracker.Invalidate(layer)
					var res gpu.LayerResult
					req := &gpu.LayerRequest{Layer: layer, Query: &gpu.Tensor{Inline: query}, Lists: true}
					if err := c.Layer(t.Context(), req, &res); err != nil {
						t.Fatal(err)
					}
					for b := range s.lengths {
						if row := b * len(res.Paths) / len(s.lengths); res.Reasons[row] == pipeline.BadRow && res.Kept[row] != 0 {
							t.Errorf("row %d is bad, and keeps %d tokens", b, res.Kept[row])
						}
					}
				}
			}
			after := make([]byte, len(data))
			if p.buffer.Read(0, after); !bytes.Equal(after, data) {
				t.Fatal("the cache was written")
			}
		})
	}
}

// spoil overwrites some of what the batch has on the device, on the owner's thread.
func (t *batch) spoil(r *rand.Rand) error {
	n := len(t.cache.tracker.Rows())
	tables, ids := t.rows*t.stride, 0
	if t.valuesDiffer {
		tables *= 2
	}
	if t.cache.spec.PageSize%kv.ChunkTokens != 0 {
		ids = n * t.chunkStride
	}
	for range 1 + r.IntN(4) {
		at := pick(r, t.columns.ptr+uint64(4*r.IntN(2*n)), t.tables.ptr+uint64(4*r.IntN(tables)))
		if ids > 0 && r.IntN(3) == 0 {
			at = t.chunkIDs.ptr + uint64(4*r.IntN(ids))
		}
		wrong := []int32{pick(r, r.Int32(), -r.Int32(), r.Int32N(64), int32(t.longest)+r.Int32N(40)-20,
			int32(t.cache.spec.NumPages)-r.Int32N(2), -1, 0, math.MaxInt32, math.MinInt32)}
		if err := cu.MemcpyHtoD(cu.DevicePtr(at), unsafe.Pointer(&wrong[0]), 4); err != nil {
			return err
		}
	}
	return nil
}

// TestSteadyState registers, decodes and releases: the GPU's memory stays flat from cycle to cycle, and
// a launch allocates nothing on the host.
func TestSteadyState(t *testing.T) {
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	device := newDevice(t)
	s := scenario{
		geometry: kv.Geometry{
			Layers: 1, QueryHeads: 2, KVHeads: 1, KDim: 64, VDim: 64, Scale: .125, Query: kv.F32, QueryScale: 1, Output: kv.F32,
		},
		layout: layout.Config{
			Kind: layout.NHD, DType: kv.F16, Layers: 1, KVHeads: 1, KDim: 64, VDim: 64, Sequences: 1, Tokens: 100, PageSize: 16,
		},
		config: `{"skip_first_two_layers": false, "selector": {"type": "quest", "token_budget": 32},
			"weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p"}}`,
	}
	l, err := layout.New(s.layout)
	if err != nil {
		t.Fatal(err)
	}
	p := newPlayer(t, device, lender{kind: gpu.CUDAIPC, uuid: device.uuid}, &s, l, all)
	lease := p.cache.(*cache).lease
	step := &kv.Step{
		Sequences: []uint64{1}, Lengths: []int32{100}, TableCounts: []uint32{7}, TableEntries: l.Tables(nil)[0],
	}
	req := &gpu.LayerRequest{Query: &gpu.Tensor{Inline: make([]byte, 2*64*4)}}
	ctx := context.Background()
	cycle := func() {
		m, err := lease.Import(ctx, p.buffer.Region(t, int(l.Size()), false))
		if err != nil {
			t.Fatal(err)
		}
		c, err := lease.NewCache(ctx, l.Spec(m, 0))
		if err != nil {
			t.Fatal(err)
		}
		var res gpu.LayerResult
		for _, err := range []error{c.Step(ctx, step), c.Layer(ctx, req, &res), c.Close(), m.Release()} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	free := func() (n int64) {
		if err := device.owner.do(ctx, func() (err error) {
			n, _, err = cu.MemInfo()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	cycle()
	before := free()
	for range 1000 {
		cycle()
	}
	if after := free(); after != before {
		t.Errorf("%d bytes of the GPU are free, %d were 1000 cycles before", after, before)
	}

	err = device.owner.do(ctx, func() error {
		var failed error
		// On an empty layer, a launch does nothing.
		*(*kernels.Layer)(lease.block.Pointer()) = kernels.Layer{}
		allocated := testing.AllocsPerRun(100, func() {
			failed = errors.Join(failed, lease.launches.queries.Run(1, 1))
		})
		if allocated != 0 {
			t.Errorf("a launch makes %v allocations", allocated)
		}
		return errors.Join(failed, lease.wait())
	})
	if err != nil {
		t.Fatal(err)
	}
}
