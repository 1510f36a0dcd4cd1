package gputest

import (
	"math"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// check holds the results of a batch that is the cache's first against the reference: what is selected
// and pruned against the pipeline on a copy of the tokens, outputs against attention in float64.
func (e *engine) check(rows []seq, results []*gpu.LayerResult) {
	e.t.Helper()
	for i, result := range results {
		e.checkLayer(i, rows, result)
	}
}

// checkLayer is check for one layer. Void rows are passed over.
func (e *engine) checkLayer(layer int, rows []seq, result *gpu.LayerResult) {
	e.t.Helper()
	queries, lists := e.queries(layer, rows), listsOf(result)
	perRow := len(lists) / (len(rows) * e.geometry.KVHeads) // lists of a (sequence, KV head)
	for r := 0; r < len(lists); r += perRow {
		b, h := r/perRow/e.geometry.KVHeads, r/perRow%e.geometry.KVHeads
		if rows[b].length > 0 {
			e.checkLists(layer, rows, b, h, queries, result, lists[r:r+perRow], r)
		}
	}
	e.checkOutputs(layer, rows, result)
}

// checkOutputs holds a layer's outputs against attention over its lists, plainly.
func (e *engine) checkOutputs(layer int, rows []seq, result *gpu.LayerResult) {
	e.t.Helper()
	g, queries, lists := &e.geometry, e.queries(layer, rows), listsOf(result)
	sharing := len(rows) * g.QueryHeads / len(lists) // query heads of a list
	for q := range len(rows) * g.QueryHeads {
		b, head := q/g.QueryHeads, q%g.QueryHeads
		if rows[b].length == 0 {
			continue
		}
		want := e.attend(layer, rows[b], head, queries[q*g.KDim:][:g.KDim], lists[q/sharing])
		got := make([]float32, g.VDim)
		g.Output.Decode(got, result.Output[q*g.VDim*g.Output.Size():])
		if err := relativeError(want, got); !(err <= tolerance(g.Output)) {
			e.t.Errorf("layer %d, sequence %d, query head %d: the output is off by %.2g of its norm", layer, b, head, err)
		}
	}
}

// checkLists holds what is selected and pruned for (sequence b, KV head h) against the pipeline's.
func (e *engine) checkLists(
	layer int, rows []seq, b, h int, queries []float32, result *gpu.LayerResult, lists [][]int32, first int,
) {
	e.t.Helper()
	g := &e.geometry
	want := e.reference(layer, rows, b, h, queries)
	for j, list := range lists {
		r := first + j
		wantList := positions(rows[b])
		if want.Lists != nil {
			wantList = want.Lists[j]
		}
		allowed := e.suite.allowed(len(wantList))
		if n := different(list, wantList); n > allowed {
			e.t.Errorf("layer %d, list row %d: %d tokens are kept and %d by the reference, %d are different",
				layer, r, len(list), len(wantList), n)
		}
		if off := int(result.Candidates[r]) - want.Candidates[j]; max(off, -off) > allowed {
			e.t.Errorf("layer %d, list row %d: %d candidates, want %d", layer, r, result.Candidates[r], want.Candidates[j])
		}
		if result.Paths[r] != want.Path || result.Reasons[r] != want.Reason {
			e.t.Errorf("layer %d, list row %d: path %d and reason %d, want %d and %d",
				layer, r, result.Paths[r], result.Reasons[r], want.Path, want.Reason)
		}
	}
	for j := range g.Group() {
		q := b*g.QueryHeads + h*g.Group() + j
		tolerance := max(1e-5, e.suite.slack)
		if want.Coverage[j] < 1 {
			tolerance = max(tolerance, e.suite.extrapolation)
		}
		for _, estimate := range []struct {
			name      string
			got       []float32
			reference float32
		}{{"mass", result.Mass, want.Mass[j]}, {"coverage", result.Coverage, want.Coverage[j]}} {
			got, want := math.NaN(), float64(estimate.reference)
			if len(estimate.got) > 0 {
				got = float64(estimate.got[q])
			}
			if !(math.Abs(got-want) <= tolerance) && !(math.IsNaN(got) && math.IsNaN(want)) {
				e.t.Errorf("layer %d, query head %d: %s %v, want %v", layer, q, estimate.name, got, want)
			}
		}
	}
}

// allowed is how many tokens of a list of n may be others than the reference's.
func (s *suite) allowed(n int) int {
	if s.slack == 0 {
		return 0
	}
	return 2 + int(s.slack*float64(n))
}

// different counts what is in one ascending list only.
func different(a, b []int32) int {
	n := 0
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

// reference runs a row through the pipeline, on tokens in float32 and records made from nothing.
func (e *engine) reference(layer int, rows []seq, b, h int, queries []float32) *pipeline.Result {
	e.t.Helper()
	p := must(pipeline.New(e.suite.parse(e.t, e.config), &e.geometry))(e.t)
	r := e.row(p, layer, rows, b, h, queries)
	if p.Needs().Shares {
		r.Budgets = e.budgets(p, layer, rows, b, queries)[h*e.lists():][:e.lists()]
	}
	result := &pipeline.Result{}
	p.Run(&pipeline.Scratch{}, r, result)
	return result
}

// row is that of a KV head.
func (e *engine) row(p *pipeline.Pipeline, layer int, rows []seq, b, h int, queries []float32) *pipeline.Row {
	e.t.Helper()
	g, row := &e.geometry, rows[b]
	selector, estimator := p.Shadows()
	r := &pipeline.Row{
		Layer: e.models[layer], KVHead: h,
		Queries: queries[(b*g.QueryHeads+h*g.Group())*g.KDim:][:g.Group()*g.KDim],
		Keys:    reader(e.head(e.keys, row.sequence, layer, h), g.KDim),
		Values:  reader(e.head(e.values, row.sequence, layer, h), g.VDim),
		First:   row.first, Len: row.length,
		SelectorRecords:  e.records(selector, layer, rows, b, h),
		EstimatorRecords: e.records(estimator, layer, rows, b, h),
	}
	if needs := p.Needs(); needs.Carry || needs.State {
		r.Carry, r.State, r.Step = e.past.carry(b, h, e.lists()), e.past.state(row.sequence, layer, h), e.past.step
	}
	return r
}

// lists is how many lists a (sequence, KV head) has.
func (e *engine) lists() int {
	if e.suite.parse(e.t, e.config).Group == pipeline.PerQueryHead {
		return e.geometry.Group()
	}
	return 1
}

// budgets are those of a sequence's lists, by KV head; nil if its rows are dense.
func (e *engine) budgets(p *pipeline.Pipeline, layer int, rows []seq, b int, queries []float32) []int {
	e.t.Helper()
	size := e.lists() * (rows[b].length - rows[b].first)
	weights := make([]float32, e.geometry.KVHeads*size)
	mean := 0
	for h := range e.geometry.KVHeads {
		mean = p.Weigh(&pipeline.Scratch{}, e.row(p, layer, rows, b, h, queries), weights[h*size:(h+1)*size])
	}
	budgets := make([]int, e.geometry.KVHeads*e.lists())
	if mean > 0 {
		p.Share(budgets, weights, mean)
	}
	return budgets
}

// head is one KV head of keys or values: [tokens][dim].
func (e *engine) head(tensors [][][]float32, sequence, layer, h int) []float32 {
	all := tensors[sequence][layer]
	n := len(all) / e.geometry.KVHeads
	return all[h*n : (h+1)*n]
}

// reader reads tokens [n][dim].
func reader(tokens []float32, dim int) kv.Reader {
	data := make([]byte, len(tokens)*kv.F32.Size())
	kv.F32.Encode(data, tokens)
	plane := &kv.Plane{
		Data: data, TokenStride: dim * kv.F32.Size(), PageSize: len(tokens) / dim, DType: kv.F32, Dim: dim,
	}
	return plane.Reader([]int32{0}, 0)
}

// records are a shadow's of one row, in memory of their own.
type records struct {
	head   []byte
	chunks map[int][]byte
}

func (r *records) Head() []byte { return r.head }

func (r *records) Chunk(c int) []byte { return r.chunks[c] }

// records indexes a row from nothing, in a batch that is the cache's first.
func (e *engine) records(method kv.Shadow, layer int, rows []seq, b, h int) kv.Records {
	if method == nil {
		return nil
	}
	dim := e.geometry.KDim
	r := &records{head: make([]byte, method.HeadBytes(dim)), chunks: map[int][]byte{}}
	trained := 0
	for _, row := range rows {
		for _, level := range method.TrainLevels() {
			if level <= row.length-row.first && level > trained {
				trained = level
				keys := e.head(e.keys, row.sequence, layer, h)
				clear(r.head)
				method.Train(r.head, keys[row.first*dim:(row.first+level)*dim], dim)
			}
		}
	}
	row := rows[b]
	keys := e.head(e.keys, row.sequence, layer, h)
	for c := row.first / kv.ChunkTokens; c*kv.ChunkTokens < row.length; c++ {
		var valid uint16
		chunk := make([]float32, kv.ChunkTokens*dim)
		for i := range kv.ChunkTokens {
			if n := c*kv.ChunkTokens + i; n >= row.first && n < row.length {
				valid |= 1 << i
				copy(chunk[i*dim:], keys[n*dim:(n+1)*dim])
			}
		}
		r.chunks[c] = make([]byte, method.ChunkBytes(dim))
		method.Index(r.head, r.chunks[c], chunk, dim, valid, valid)
	}
	return r
}

// attend is attention of a query head over the listed tokens.
func (e *engine) attend(layer int, row seq, head int, query []float32, list []int32) []float64 {
	g := &e.geometry
	h := head / g.Group()
	keys, values := e.head(e.keys, row.sequence, layer, h), e.head(e.values, row.sequence, layer, h)
	logits := make([]float64, len(list))
	for i, n := range list {
		for d, x := range query {
			logits[i] += float64(x) * float64(keys[int(n)*g.KDim+d])
		}
		logits[i] *= float64(g.Scale)
		if g.Softcap > 0 {
			logits[i] = float64(g.Softcap) * math.Tanh(logits[i]/float64(g.Softcap))
		}
	}
	top, sum := slices.Max(logits), 0.0
	if g.Sinks != nil {
		top = max(top, float64(g.Sinks[head]))
		sum = math.Exp(float64(g.Sinks[head]) - top)
	}
	for _, l := range logits {
		sum += math.Exp(l - top)
	}
	out := make([]float64, g.VDim)
	for i, n := range list {
		for d := range out {
			out[d] += math.Exp(logits[i]-top) / sum * float64(values[int(n)*g.VDim+d])
		}
	}
	return out
}

// listsOf cuts a result's lists apart.
func listsOf(result *gpu.LayerResult) [][]int32 {
	lists, rest := make([][]int32, len(result.Kept)), result.Lists
	for r, kept := range result.Kept {
		lists[r], rest = rest[:kept], rest[kept:]
	}
	return lists
}

// positions are all valid ones of a row.
func positions(r seq) []int32 {
	var all []int32
	for n := r.first; n < r.length; n++ {
		all = append(all, int32(n))
	}
	return all
}

func relativeError(want []float64, got []float32) float64 {
	var off, norm float64
	for i, w := range want {
		off += (w - float64(got[i])) * (w - float64(got[i]))
		norm += w * w
	}
	return math.Sqrt(off / norm)
}

// tolerance is how far outputs may be off: what rounding to t costs, and sums in float32.
func tolerance(t kv.DType) float64 {
	switch t {
	case kv.F16:
		return 1e-3
	case kv.BF16:
		return 1e-2
	default:
		return 1e-5
	}
}
