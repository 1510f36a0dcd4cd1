package pipeline_test

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pruner"
	"github.com/twilight-sidecar/twilight/selector"
)

// geometry has two KV heads, each for a group of the given size.
func geometry(group, kDim, vDim int) *kv.Geometry {
	return &kv.Geometry{Layers: 1, QueryHeads: 2 * group, KVHeads: 2, KDim: kDim, VDim: vDim, Scale: 1. / 16}
}

// example is a row with all that a plain computation of it needs.
type example struct {
	pipeline.Row
	*kv.Geometry
	config       *pipeline.Config
	keys, values []float32
}

// settings are what configs are drawn from.
type settings struct {
	quest, pinFirst, pinCurrent bool
	estimator                   string
	pruner                      string
	threshold                   float64
	budget                      int
	coverage                    float64
	floor, ceiling              int
}

func draw(t *rapid.T) (*example, settings) {
	s := settings{
		quest:      rapid.Bool().Draw(t, "quest"),
		pinFirst:   rapid.Bool().Draw(t, "pin first"),
		pinCurrent: rapid.Bool().Draw(t, "pin current"),
		estimator: rapid.SampledFrom([]string{
			`{"type": "none"}`, `{"type": "min_max_quant"}`, `{"type": "min_max_quant", "equalize": false}`,
		}).Draw(t, "estimator"),
		pruner:    rapid.SampledFrom([]string{"none", "top_p", "threshold"}).Draw(t, "pruner"),
		threshold: rapid.Float64Range(.05, .99).Draw(t, "threshold"),
		budget:    rapid.IntRange(1, 400).Draw(t, "token_budget"),
		floor:     rapid.IntRange(0, 200).Draw(t, "floor"),
	}
	if s.quest && rapid.Bool().Draw(t, "controls coverage") {
		s.coverage = rapid.Float64Range(.3, 1).Draw(t, "coverage")
		if rapid.Bool().Draw(t, "has ceiling") {
			s.ceiling = rapid.IntRange(max(1, s.floor), 400).Draw(t, "ceiling")
		}
	}
	selector, thresholdKey := `"none"`, ""
	if s.quest {
		selector = fmt.Sprintf(`"quest", "token_budget": %d`, s.budget)
	}
	if s.pruner != "none" {
		thresholdKey = fmt.Sprintf(`, "threshold": %v`, s.threshold)
	}
	config := mustParse(t, fmt.Sprintf(`{"selector": {"type": %s}, "weight_estimator": %s, "weight_pruner": {"type": %q%s},
		"skip_first_two_layers": false, "group": %q, "pin_first_chunk": %v, "pin_current_chunk": %v, "p_over": %q,
		"use_estimated_weights_in_attn": %v, "coverage": %v, "coverage_floor": %d, "coverage_ceiling": %d}`, selector, s.estimator, s.pruner, thresholdKey,
		rapid.SampledFrom([]string{"union", "per_query_head"}).Draw(t, "group"), s.pinFirst, s.pinCurrent,
		rapid.SampledFrom([]string{"candidates", "all"}).Draw(t, "p_over"), rapid.Bool().Draw(t, "use estimated weights"),
		s.coverage, s.floor, s.ceiling))

	dim := rapid.SampledFrom([]int{64, 80, 96, 128})
	e := &example{
		config:   config,
		Geometry: geometry(rapid.SampledFrom([]int{1, 3, 7}).Draw(t, "group"), dim.Draw(t, "kDim"), dim.Draw(t, "vDim")),
	}
	if rapid.Bool().Draw(t, "softcap") {
		e.Softcap = 20
	}
	e.Len = rapid.IntRange(1, 700).Draw(t, "length")
	e.First = rapid.IntRange(0, min(40, e.Len-1)).Draw(t, "first")
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	// Small integers, so that scores are exact and candidates can be compared as they are.
	e.keys, e.values = integers(random, e.Len*e.KDim), integers(random, e.Len*e.VDim)
	e.Queries = integers(random, e.Group()*e.KDim)
	e.KVHead = rapid.IntRange(0, 1).Draw(t, "KV head")
	if rapid.Bool().Draw(t, "sinks") {
		e.Sinks = integers(random, e.QueryHeads)
	}
	if s.pruner == "top_p" && rapid.Bool().Draw(t, "override p") {
		e.P = rapid.Float32Range(.05, .99).Draw(t, "p")
	}
	if s.quest && rapid.Bool().Draw(t, "override budget") {
		e.TokenBudget = rapid.IntRange(1, 400).Draw(t, "budget")
	}
	return e, s
}

func integers(random *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(random.IntN(9) - 4)
	}
	return x
}

// run sets up readers and shadows as a device does, and runs the row.
func (e *example) run(t tb, s *pipeline.Scratch, res *pipeline.Result) *pipeline.Pipeline {
	p, err := pipeline.New(e.config, e.Geometry)
	if err != nil {
		t.Fatal(err)
	}
	e.Keys, e.Values = kvtest.Reader(kv.F16, e.keys, e.KDim), kvtest.Reader(kv.F16, e.values, e.VDim)
	selector, estimator := p.Shadows()
	if selector != nil {
		e.SelectorRecords = kvtest.Index(selector, e.keys, e.KDim, e.First)
	}
	if estimator != nil {
		e.EstimatorRecords = kvtest.Index(estimator, e.keys, e.KDim, e.First)
	}
	p.Run(s, &e.Row, res)
	return p
}

func (e *example) query(h int) []float32 { return e.Queries[h*e.KDim : (h+1)*e.KDim] }

// dot is the logit of a query head for a position before softcap.
func (e *example) dot(h, position int) float64 {
	sum := 0.0
	for d, q := range e.query(h) {
		sum += float64(q) * float64(e.keys[position*e.KDim+d])
	}
	return float64(e.Scale) * sum
}

func (e *example) capped(logit float64) float64 {
	if c := float64(e.Softcap); c > 0 {
		return c * math.Tanh(logit/c)
	}
	return logit
}

// bound is Quest's: no logit in the chunk exceeds it.
func (e *example) bound(h, chunk int) float64 {
	sum := 0.0
	for d, q := range e.query(h) {
		best := math.Inf(-1)
		for _, p := range e.chunk(chunk) {
			best = math.Max(best, float64(q)*float64(e.keys[int(p)*e.KDim+d]))
		}
		sum += best
	}
	return float64(e.Scale) * sum
}

// chunk lists its valid positions.
func (e *example) chunk(c int) (positions []int32) {
	for p := max(e.First, 16*c); p < min(e.Len, 16*c+16); p++ {
		positions = append(positions, int32(p))
	}
	return positions
}

func (e *example) chunks() (first, end int) { return e.First / 16, (e.Len + 15) / 16 }

// order is that in which chunks become candidates, plainly: pins first, then by score.
func (e *example) order(s settings, heads []int) (order []int, pins int) {
	first, end := e.chunks()
	scores := make(map[int]float64)
	for c := first; c < end; c++ {
		order = append(order, c)
		for _, h := range heads {
			scores[c] += e.bound(h, c)
		}
		if s.pinFirst && c == first || s.pinCurrent && c == end-1 {
			scores[c] = math.Inf(1)
			pins++
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(scores[b], scores[a]) })
	return order, pins
}

// candidates are the positions in chunks.
func (e *example) candidates(chunks []int) (all []int32) {
	for _, c := range chunks {
		all = append(all, e.chunk(c)...)
	}
	slices.Sort(all)
	return all
}

// selected is the selection, plainly. Of got candidates it makes sure that coverage takes so many.
func (e *example) selected(t *rapid.T, s settings, got int, heads []int) []int32 {
	order, pins := e.order(s, heads)
	if !s.quest {
		return e.candidates(order)
	}
	budget := cmp.Or(e.TokenBudget, s.budget)
	covers := s.coverage > 0 && e.TokenBudget == 0
	if covers {
		budget = s.floor
	}
	n, most := max(1, (budget+15)/16, pins), len(order)
	n = min(n, most)
	if s.ceiling > 0 {
		most = min(most, max(n, (s.ceiling+15)/16))
	}
	for {
		candidates := e.candidates(order[:n])
		if !covers {
			return candidates
		}
		least := math.Inf(1) // coverage
		for _, h := range heads {
			logits := e.logits(h, candidates)
			top, total := slices.Max(logits), 0.0
			for _, l := range logits {
				total += math.Exp(l - top)
			}
			outside, _ := e.outside(h, candidates, logits, top)
			least = math.Min(least, total/(total+outside))
		}
		const tip = 1e-3 // what rounding may do
		switch stops := len(candidates) == got; {
		case stops && n < most && !(least >= s.coverage-tip):
			t.Fatalf("%d of %d chunks were enough for coverage %v, though it is %v", n, len(order), s.coverage, least)
		case stops:
			return candidates
		case n == most || least > s.coverage+tip:
			t.Fatalf("%d candidates, want %d: coverage is %v", got, len(candidates), least)
		}
		n = min(most, n+max(1, n/8))
	}
}

// logits are the estimates for the positions, one by one.
func (e *example) logits(h int, positions []int32) []float64 {
	estimator := e.config.Estimator.Config.New()
	query := slices.Clone(e.query(h))
	for d := range query {
		query[d] *= e.Scale
	}
	row := &pruner.Row{Queries: [][]float32{query}, Dim: e.KDim, Keys: e.Keys, Records: e.EstimatorRecords}
	logits := make([]float64, len(positions))
	for i, p := range positions {
		got := [][]float32{{0}}
		estimator.Logits(got, row, []int32{p})
		logits[i] = e.capped(float64(got[0][0]))
	}
	return logits
}

// outside is the weight that a line through the chunks taken, but the first and the last, forecasts for the
// others, each in units of exp(top); NaN if it cannot tell. The slope of a line through points that lie close
// together hangs on their rounding: spread is what that may do.
func (e *example) outside(h int, candidates []int32, logits []float64, top float64) (weight, spread float64) {
	const rounding = 1e-6 // of a bound, relative: a few of float32's last places
	taken := make(map[int]float64)
	for i, p := range candidates {
		taken[int(p)/16] += math.Exp(logits[i] - top)
	}
	first, end := e.chunks()
	if len(taken) == end-first {
		return 0, 0
	}
	var xs, ys, rest []float64
	for c := first; c < end; c++ {
		x := e.capped(e.bound(h, c)) - top
		w, known := taken[c]
		switch {
		case !known:
			rest = append(rest, x)
		case c > first && c < end-1:
			xs, ys = append(xs, x), append(ys, math.Log(w))
		}
	}
	if len(xs) < 4 {
		return math.NaN(), 0
	}
	weight = forecast(xs, ys, rest)
	for i, x := range xs {
		xs[i] = x + rounding*math.Abs(x+top)
		spread += math.Abs(forecast(xs, ys, rest) - weight)
		xs[i] = x
	}
	return weight, spread
}

// forecast is the sum of exp(y) that a line through points (x, y) has for rest, y being normal about it.
func forecast(xs, ys, rest []float64) (sum float64) {
	n := float64(len(xs))
	mean := func(list []float64) (sum float64) {
		for _, x := range list {
			sum += x / n
		}
		return sum
	}
	x, y := mean(xs), mean(ys)
	var xx, xy, slope, variance float64
	for i := range xs {
		xx += (xs[i] - x) * (xs[i] - x)
		xy += (xs[i] - x) * (ys[i] - y)
	}
	if xx > 1e-9 {
		slope = xy / xx
	}
	for i := range xs {
		residual := ys[i] - y - slope*(xs[i]-x)
		variance += residual * residual / (n - 2)
	}
	for _, b := range rest {
		v := variance * (1 + 1/n)
		if xx > 1e-9 {
			v += variance * (b - x) * (b - x) / xx
		}
		sum += math.Exp(math.Min(y+slope*(b-x)+v/2, b+math.Log(16)))
	}
	return sum
}

// TestRun compares with the whole pipeline done plainly in float64. Where rounding can tip a decision,
// either outcome is right.
func TestRun(t *testing.T) {
	t.Parallel()
	var s pipeline.Scratch
	var res pipeline.Result
	rapid.Check(t, func(t *rapid.T) {
		e, set := draw(t)
		e.run(t, &s, &res)
		if !set.quest && set.estimator == `{"type": "none"}` && set.pruner == "none" {
			e.checkDense(t, &res, pipeline.Configured)
			return
		}
		if res.Path != pipeline.Sparse || res.Reason != 0 {
			t.Fatalf("path %v, reason %v", res.Path, res.Reason)
		}
		groups := [][]int{nil}
		if e.config.Group == pipeline.PerQueryHead {
			groups = groups[:0]
		}
		for h := range e.Group() {
			if e.config.Group == pipeline.PerQueryHead {
				groups = append(groups, []int{h})
			} else {
				groups[0] = append(groups[0], h)
			}
		}
		if len(res.Lists) != len(groups) || len(res.Kept) != len(groups) || len(res.Candidates) != len(groups) {
			t.Fatalf("%d lists, %d kept, %d candidates, want %d", len(res.Lists), len(res.Kept), len(res.Candidates), len(groups))
		}
		for i, heads := range groups {
			e.checkGroup(t, set, &res, i, heads)
		}
	})
}

func (e *example) checkGroup(t *rapid.T, set settings, res *pipeline.Result, group int, heads []int) {
	candidates := e.selected(t, set, res.Candidates[group], heads)
	if res.Candidates[group] != len(candidates) {
		t.Fatalf("%d candidates, want %d", res.Candidates[group], len(candidates))
	}
	const tip = 1e-5 // what rounding may do
	surely, maybe := make(map[int32]bool), make(map[int32]bool)
	list := res.Lists[group]
	for _, h := range heads {
		logits := e.logits(h, candidates)
		top := slices.Max(logits)
		outside, spread := e.outside(h, candidates, logits, top)
		weights, total := make([]float64, len(logits)), 0.0
		for i, l := range logits {
			weights[i] = math.Exp(l - top)
			total += weights[i]
		}

		above, from := 0.0, 0.0 // weights that are kept for sure, and that may be kept
		switch set.pruner {
		case "top_p":
			p := set.threshold
			if e.P > 0 {
				p = float64(e.P)
			}
			need := p * total
			if e.config.POver == pipeline.OverAll && outside > 0 {
				need = p * (total + outside)
			}
			sum := 0.0
			for _, w := range slices.Backward(slices.Sorted(slices.Values(weights))) {
				if sum < need*(1-tip) {
					above = w * (1 + tip)
				}
				if sum < need*(1+tip) {
					from = w * (1 - tip)
				}
				sum += w
			}
		case "threshold":
			least := math.Exp(e.logits(h, []int32{int32(e.First)})[0] - set.threshold - top)
			above, from = least*(1+tip), math.Min(1, least*(1-tip))
		}
		sum := 0.0
		for i, p := range candidates {
			if weights[i] > above {
				surely[p] = true
			}
			if weights[i] >= from {
				maybe[p] = true
			}
			if _, found := slices.BinarySearch(list, p); found {
				sum += weights[i]
			}
		}
		coverage := total / (total + outside)
		slack := 2e-3 + coverage*spread/(total+outside)
		if got := float64(res.Coverage[h]); math.IsNaN(coverage) != math.IsNaN(got) || math.Abs(got-coverage) > slack {
			t.Fatalf("head %d: coverage %v, want %v", h, got, coverage)
		}
		mass := coverage * sum / total
		if got := float64(res.Mass[h]); math.IsNaN(mass) != math.IsNaN(got) || math.Abs(got-mass) > slack {
			t.Fatalf("head %d: mass %v, want %v", h, got, mass)
		}
		e.checkOutput(t, res, h, list)
	}
	if res.Kept[group] != len(list) || len(list) == 0 || !slices.IsSorted(list) {
		t.Fatalf("list %v of %d", list, res.Kept[group])
	}
	inList := make(map[int32]bool)
	for _, p := range list {
		inList[p] = true
		if !maybe[p] {
			t.Fatalf("position %d is kept, but light", p)
		}
	}
	if len(inList) != len(list) {
		t.Fatalf("list %v has positions twice", list)
	}
	for p := range surely {
		if !inList[p] {
			t.Fatalf("position %d is heavy, but not kept", p)
		}
	}
}

// checkOutput attends over a list in float64.
func (e *example) checkOutput(t *rapid.T, res *pipeline.Result, h int, list []int32) {
	logits := make([]float64, len(list))
	for i, p := range list {
		logits[i] = e.capped(e.dot(h, int(p)))
	}
	if e.config.UseEstimatedWeights && res.Path == pipeline.Sparse {
		logits = e.logits(h, list)
	}
	total := 0.0
	if e.Sinks != nil {
		total = math.Exp(float64(e.Sinks[e.KVHead*e.Group()+h]))
	}
	out := make([]float64, e.VDim)
	for i, p := range list {
		w := math.Exp(logits[i])
		total += w
		for d := range out {
			out[d] += w * float64(e.values[int(p)*e.VDim+d])
		}
	}
	for d := range out {
		if got := float64(res.Output[h*e.VDim+d]); math.Abs(got-out[d]/total) > 1e-4 {
			t.Fatalf("head %d, channel %d: %v, want %v", h, d, got, out[d]/total)
		}
	}
}

func (e *example) checkDense(t *rapid.T, res *pipeline.Result, reason pipeline.Reason) {
	if res.Path != pipeline.Dense || res.Reason != reason || res.Lists != nil {
		t.Fatalf("path %v, reason %v, %d lists, want dense because %v", res.Path, res.Reason, len(res.Lists), reason)
	}
	var all []int32
	for p := e.First; p < e.Len; p++ {
		all = append(all, int32(p))
	}
	for i := range res.Kept {
		if res.Kept[i] != len(all) || res.Candidates[i] != len(all) {
			t.Fatalf("%d kept of %d candidates, want all %d", res.Kept[i], res.Candidates[i], len(all))
		}
	}
	for h := range e.Group() {
		if res.Mass[h] != 1 || res.Coverage[h] != 1 {
			t.Fatalf("head %d: mass %v, coverage %v, want 1", h, res.Mass[h], res.Coverage[h])
		}
		e.checkOutput(t, res, h, all)
	}
}

// fixed is an example that is always the same: normal keys, the default config but for what is given.
func fixed(t tb, config string, length, group, dim int) *example {
	t.Helper()
	random := rand.New(rand.NewPCG(uint64(length), uint64(group*dim)))
	normal := func(n int, scale float64) []float32 {
		x := make([]float32, n)
		for i := range x {
			x[i] = float32(random.NormFloat64() * scale)
		}
		return x
	}
	e := &example{config: mustParse(t, config), Geometry: geometry(group, dim, dim)}
	e.keys, e.values = normal(length*dim, 1), normal(length*dim, 1)
	e.Queries = normal(group*dim, 48/math.Sqrt(float64(dim))) // logits with a deviation of 3
	e.Len, e.Layer = length, 7
	return e
}

const (
	fullINT4  = `{"selector": {"type": "full"}, "weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.85}, "skip_first_two_layers": false}`
	questINT4 = `{"selector": {"type": "quest", "sparsity_rate": 0.25}, "weight_estimator": {"type": "min_max_quant"}, "weight_pruner": {"type": "top_p", "threshold": 0.85}, "skip_first_two_layers": false}`
)

const coverage97 = `{"selector": {"type": "quest"}, "weight_estimator": {"type": "min_max_quant"}, "skip_first_two_layers": false,
	"coverage": 0.97, "coverage_floor": 128, "weight_pruner": {"type": "top_p", "threshold": 0.95}}`

// TestDensePaths: each reason to be dense is told, and a Result goes from dense to sparse and back.
func TestDensePaths(t *testing.T) {
	t.Parallel()
	nan := func(position int) func(e *example) {
		return func(e *example) { e.keys[position*e.KDim+3] = float32(math.NaN()) }
	}
	inf := func(e *example) { e.Queries[1] = float32(math.Inf(1)) }
	none := func(*example) {}
	var s pipeline.Scratch
	var res pipeline.Result
	for _, test := range []struct {
		name, config string
		change       func(e *example)
		want         pipeline.Reason
	}{
		{"default config", ``, none, 0},
		{"no stages", `{}`, none, pipeline.Configured},
		{"no stages, layer 0", `{}`, func(e *example) { e.Layer = 0 }, pipeline.Configured},
		{"layer 1", ``, func(e *example) { e.Layer = 1 }, pipeline.SkippedLayer},
		{"layer 1, not skipped", questINT4, func(e *example) { e.Layer = 1 }, 0},
		{"below", `{"weight_pruner": {"type": "top_p"}, "dense_below": 301}`, none, pipeline.ShortContext},
		{"not below", `{"weight_pruner": {"type": "top_p"}, "dense_below": 300}`, none, 0},
		{"below without padding", `{"weight_pruner": {"type": "top_p"}, "dense_below": 300}`, func(e *example) { e.First = 1 }, pipeline.ShortContext},
		{"NaN in a key, quest", questINT4, nan(150), pipeline.NotFinite},
		{"NaN in a key, full", fullINT4, nan(150), pipeline.NotFinite},
		{"NaN in a key, exact", `{"weight_pruner": {"type": "top_p"}}`, nan(0), pipeline.NotFinite},
		{"NaN in a key, per query head", `{"weight_pruner": {"type": "top_p"}, "group": "per_query_head"}`, nan(0), pipeline.NotFinite},
		{"Inf in a query", questINT4, inf, pipeline.NotFinite},
		{"default config again", ``, none, 0},
	} {
		e := fixed(t, test.config, 300, 3, 64)
		test.change(e)
		e.run(t, &s, &res)
		switch {
		case res.Reason != test.want || (res.Path == pipeline.Dense) != (test.want != 0):
			t.Errorf("%s: path %v, reason %v, want reason %v", test.name, res.Path, res.Reason, test.want)
		case test.want == 0:
			if len(res.Lists) == 0 || res.Kept[0] >= 300 {
				t.Errorf("%s: %d lists, %d kept", test.name, len(res.Lists), res.Kept[0])
			}
		case res.Lists != nil || res.Kept[0] != e.Len-e.First || res.Candidates[0] != e.Len-e.First || res.Mass[2] != 1 || res.Coverage[2] != 1:
			t.Errorf("%s: not the result of a dense row: %+v", test.name, res)
		}
		if clean := test.want != pipeline.NotFinite; clean == math.IsNaN(float64(res.Output[5])) {
			t.Errorf("%s: output %v", test.name, res.Output[5])
		}
	}
}

// TestGroupOfOne: with one query head the group modes are one.
func TestGroupOfOne(t *testing.T) {
	t.Parallel()
	var outputs [][]float32
	var lists [][]int32
	for _, group := range []pipeline.Group{pipeline.Union, pipeline.PerQueryHead} {
		e := fixed(t, questINT4, 1000, 1, 64)
		e.config.Group = group
		var res pipeline.Result
		e.run(t, new(pipeline.Scratch), &res)
		outputs, lists = append(outputs, res.Output), append(lists, res.Lists[0])
	}
	if !slices.Equal(outputs[0], outputs[1]) || !slices.Equal(lists[0], lists[1]) {
		t.Error("the group modes differ")
	}
}

func TestListsOnly(t *testing.T) {
	t.Parallel()
	for _, config := range []string{questINT4, `{}`} {
		var whole, only pipeline.Result
		e := fixed(t, config, 1000, 3, 64)
		e.run(t, new(pipeline.Scratch), &whole)
		e.ListsOnly = true
		e.Values = kv.Reader{}
		e.run(t, new(pipeline.Scratch), &only)
		if len(only.Output) != 0 || !slices.Equal(only.Kept, whole.Kept) || len(only.Lists) != len(whole.Lists) {
			t.Errorf("%s: output %v, kept %v of %v", config, only.Output, only.Kept, whole.Kept)
		}
		for i := range only.Lists {
			if !slices.Equal(only.Lists[i], whole.Lists[i]) {
				t.Errorf("%s: list %d differs", config, i)
			}
		}
	}
}

// TestPOverAll: a share of everything takes more than a share of the candidates.
func TestPOverAll(t *testing.T) {
	t.Parallel()
	kept := map[pipeline.POver]int{}
	for _, over := range []pipeline.POver{pipeline.OverCandidates, pipeline.OverAll} {
		e := fixed(t, questINT4, 4000, 1, 64)
		e.config.POver, e.P = over, .4
		var res pipeline.Result
		e.run(t, new(pipeline.Scratch), &res)
		kept[over] = res.Kept[0]
		if share := res.Mass[0]; (over == pipeline.OverAll) != (share >= .4) || share > .42 {
			t.Errorf("p over %s: mass %v of coverage %v", over, share, res.Coverage[0])
		}
	}
	if kept[pipeline.OverAll] <= kept[pipeline.OverCandidates] {
		t.Errorf("kept %v", kept)
	}
}

// tokens is a selector that ranks single tokens by their true logits.
type tokens struct{}

func (tokens) Validate() error        { return nil }
func (tokens) New() selector.Selector { return tokens{} }
func (tokens) Shadow() kv.Shadow      { return nil }
func (tokens) Unit() int              { return 1 }
func (tokens) Select(dst []int32, row *selector.Row) []int32 {
	n := row.Len - row.First
	scores, query := make([]float32, n), make([]float32, row.Dim)
	row.Sum(query)
	selector.Exact(scores, row, query, make([]float32, selector.ExactBlock*row.Dim))
	row.Ranking.Unit, row.Ranking.Scores = 1, scores
	return row.Ranking.Take(dst, row, min(n, row.TokenBudget))
}

// TestCoverageOfTokens: coverage goes with any ranking; where scores are logits, its estimate is exact.
func TestCoverageOfTokens(t *testing.T) {
	t.Parallel()
	for _, target := range []float64{.5, .9, .99} {
		for _, group := range []pipeline.Group{pipeline.Union, pipeline.PerQueryHead} {
			e := fixed(t, `{"skip_first_two_layers": false, "coverage_floor": 32}`, 3000, 3, 64)
			e.First, e.config.Coverage, e.config.Group = 5, target, group
			e.config.Selector = pipeline.Stage[selector.Config]{Type: "tokens", Config: tokens{}}
			var res pipeline.Result
			e.run(t, new(pipeline.Scratch), &res)
			for h := range e.Group() {
				list := res.Lists[min(h, len(res.Lists)-1)]
				all, in := 0.0, 0.0
				for p := e.First; p < e.Len; p++ {
					w := math.Exp(e.dot(h, p))
					all += w
					if _, found := slices.BinarySearch(list, int32(p)); found {
						in += w
					}
				}
				coverage := float64(res.Coverage[h])
				if coverage < target {
					t.Errorf("%s, head %d: estimated coverage %v, want %v", group, h, coverage, target)
				}
				if group == pipeline.PerQueryHead && math.Abs(coverage-in/all) > 1e-3 {
					t.Errorf("head %d: estimated coverage %v, true %v", h, coverage, in/all)
				}
				if len(list) > 2900 {
					t.Errorf("%s: %d candidates", group, len(list))
				}
			}
		}
	}
}

// TestCoverageAndBudgets: floor and ceiling hold, and a budget given with the row goes before all.
func TestCoverageAndBudgets(t *testing.T) {
	t.Parallel()
	var res pipeline.Result
	var s pipeline.Scratch
	for _, test := range []struct{ length, floor, ceiling, budget, want int }{
		{2000, 160, 0, 320, 320},
		{2000, 160, 480, 0, 480},
		{2000, 1600, 1600, 0, 1600},
		{2000, 3000, 0, 0, 2000},
		{2000, 16, 20, 0, 32},
	} {
		e := fixed(t, coverage97, test.length, 1, 64)
		e.config.Coverage, e.config.CoverageFloor, e.config.CoverageCeiling = 1, test.floor, test.ceiling
		e.TokenBudget = test.budget
		e.run(t, &s, &res)
		if res.Candidates[0] != test.want {
			t.Errorf("%+v: %d candidates", test, res.Candidates[0])
		}
	}
}

// TestLimits: the heaviest in all heads' eyes make up for too few, and are what is left of too many.
func TestLimits(t *testing.T) {
	t.Parallel()
	var s pipeline.Scratch
	for _, group := range []pipeline.Group{pipeline.Union, pipeline.PerQueryHead} {
		for _, pruner := range []string{`"type": "top_p", "threshold": 0.7`, `"type": "threshold", "threshold": -4`} {
			run := func(limits string) (*example, *pipeline.Result) {
				e := fixed(t, fmt.Sprintf(`{"weight_pruner": {%s %s}, "group": %q}`, pruner, limits, group), 500, 3, 64)
				res := new(pipeline.Result)
				e.run(t, &s, res)
				return e, res
			}
			e, free := run("")
			for i, kept := range free.Lists {
				heads := []int{i}
				if group == pipeline.Union {
					heads = []int{0, 1, 2}
				}
				for _, test := range []struct {
					limits string
					want   int
				}{
					{fmt.Sprintf(`, "min_budget": %d`, len(kept)+9), len(kept) + 9},
					{`, "min_budget": 1000`, 500},
					{fmt.Sprintf(`, "max_budget": %d`, (len(kept)+1)/2), (len(kept) + 1) / 2},
					{`, "max_budget": 1`, 1},
					{fmt.Sprintf(`, "min_budget": 1, "max_budget": %d`, len(kept)), len(kept)},
				} {
					_, res := run(test.limits)
					want := e.heaviest(heads, kept, test.want)
					if !slices.Equal(res.Lists[i], want) || res.Kept[i] != test.want {
						t.Errorf("%s, %s%s, list %d: %v, want %v", group, pruner, test.limits, i, res.Lists[i], want)
					}
				}
			}
		}
	}
}

// heaviest are the n positions that heads give the largest shares, of those kept if they are enough, else
// all of them and others.
func (e *example) heaviest(heads []int, kept []int32, n int) []int32 {
	shares := make(map[int32]float64)
	var order []int32
	for p := range int32(e.Len) {
		order = append(order, p)
	}
	for _, h := range heads {
		total := 0.0
		for _, p := range order {
			total += math.Exp(e.dot(h, int(p)))
		}
		for _, p := range order {
			shares[p] += math.Exp(e.dot(h, int(p))) / total
		}
	}
	for _, p := range kept {
		shares[p] += 9
	}
	slices.SortFunc(order, func(a, b int32) int { return cmp.Compare(shares[b], shares[a]) })
	heaviest := order[:n]
	slices.Sort(heaviest)
	return heaviest
}

// TestThresholdByHead: each query head is pruned by its own p, that of the model's query head.
func TestThresholdByHead(t *testing.T) {
	t.Parallel()
	e := fixed(t, `{"weight_pruner": {"type": "top_p", "threshold": 1,
		"threshold_by_head": {"7": [1, 1, 1, 0.3, 0.6, 0.9]}, "threshold_by_layer": {"7": 1}}, "group": "per_query_head"}`, 500, 3, 64)
	e.KVHead = 1
	var res pipeline.Result
	p := e.run(t, new(pipeline.Scratch), &res)
	for h, threshold := range []float64{.3, .6, .9} {
		plain := fixed(t, fmt.Sprintf(`{"weight_pruner": {"type": "top_p", "threshold": %v}, "group": "per_query_head"}`, threshold), 500, 3, 64)
		plain.KVHead = 1
		var want pipeline.Result
		plain.run(t, new(pipeline.Scratch), &want)
		if !slices.Equal(res.Lists[h], want.Lists[h]) {
			t.Errorf("head %d: %v, want %v", h, res.Lists[h], want.Lists[h])
		}
	}
	if err := p.Fits(7); err != nil {
		t.Error(err)
	}
	e.QueryHeads = 4
	p, err := pipeline.New(e.config, e.Geometry)
	if err != nil {
		t.Fatal(err)
	}
	if f, ok := errors.AsType[*fault.Error](p.Fits(7)); !ok || f.Field != `weight_pruner.threshold_by_head["7"]` {
		t.Errorf("error %v of a model with 4 query heads", f)
	}
}

func TestNoAllocation(t *testing.T) {
	for _, config := range []string{
		questINT4, fullINT4, `{}`, `{"weight_pruner": {"type": "threshold", "threshold": 3}}`,
		`{"selector": {"type": "quest", "token_budget": 200}, "weight_pruner": {"type": "top_p"}, "group": "per_query_head", "p_over": "all", "pin_first_chunk": false}`,
		coverage97, `{"selector": {"type": "quest"}, "weight_pruner": {"type": "top_p", "max_budget": 9}, "group": "per_query_head", "coverage": 0.9, "coverage_floor": 64}`,
		`{"weight_pruner": {"type": "threshold", "threshold": -30, "min_budget": 40}}`,
	} {
		e := fixed(t, config, 1000, 4, 128)
		e.Softcap = 30
		var s pipeline.Scratch
		var res pipeline.Result
		p := e.run(t, &s, &res)
		t.Run(config, func(t *testing.T) { kvtest.NoAllocation(t, func() { p.Run(&s, &e.Row, &res) }) })
	}
}

// BenchmarkRow runs one row of an fp16 cache with normal keys.
func BenchmarkRow(b *testing.B) {
	for _, n := range []int{4096, 32768} {
		for _, group := range []int{1, 4} {
			for _, dim := range []int{64, 128} {
				for _, config := range []struct{ name, json string }{
					{"dense", `{}`},
					{"full+int4+top_p", fullINT4},
					{"quest+int4+top_p", questINT4},
					{"quest+coverage+int4+top_p", coverage97},
				} {
					b.Run(fmt.Sprintf("N=%d/G=%d/D=%d/%s", n, group, dim, config.name), func(b *testing.B) {
						e := fixed(b, config.json, n, group, dim)
						var s pipeline.Scratch
						var res pipeline.Result
						p := e.run(b, &s, &res)
						var sum pipeline.Timing
						for b.Loop() {
							p.Run(&s, &e.Row, &res)
							sum.Select += res.Timing.Select
							sum.Prune += res.Timing.Prune
							sum.Attend += res.Timing.Attend
						}
						b.ReportMetric(float64(sum.Select.Nanoseconds())/float64(b.N), "select-ns")
						b.ReportMetric(float64(sum.Prune.Nanoseconds())/float64(b.N), "prune-ns")
						b.ReportMetric(float64(sum.Attend.Nanoseconds())/float64(b.N), "attend-ns")
						b.ReportMetric(float64(res.Kept[0]), "kept")
					})
				}
			}
		}
	}
}
