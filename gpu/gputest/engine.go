package gputest

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
)

// setup says what an engine is: the shape of its model, its cache, and what it asks for.
type setup struct {
	geometry kv.Geometry
	config   string
	// shape is the cache's, but for what the geometry says.
	shape layout.Config
	// tokens is how many each sequence has.
	tokens int
	// pages is the order in which pages are dealt; nil: shuffled.
	pages []int32
	// models are the layers' numbers in the model.
	models []int
	// edit, if not nil, edits the spec before the cache is registered.
	edit func(e *engine, spec *gpu.CacheSpec)
	// seed chooses keys, values and queries.
	seed uint64
}

// Configs, in which every layer is pruned.
const (
	keepAll = `{"skip_first_two_layers": false}`
	quest   = `{"skip_first_two_layers": false,
		"selector": {"type": "quest", "token_budget": 128},
		"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
		"weight_pruner": {"type": "top_p", "threshold": 0.8}}`
	questPerHead = `{"skip_first_two_layers": false, "group": "per_query_head",
		"selector": {"type": "quest", "token_budget": 128},
		"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
		"weight_pruner": {"type": "top_p", "threshold": 0.8}}`
)

// unequalized is quest without statistics of the keys, which would tell what a cache held before.
const unequalized = `{"skip_first_two_layers": false,
	"selector": {"type": "quest", "token_budget": 128},
	"weight_estimator": {"type": "min_max_quant", "quant_bit": 4, "equalize": false},
	"weight_pruner": {"type": "top_p", "threshold": 0.8}}`

// standard is the setup that tests vary: room for three sequences of 320 tokens.
func standard() setup {
	return setup{
		geometry: kv.Geometry{
			Layers: 2, QueryHeads: 4, KVHeads: 2, KDim: 64, VDim: 64,
			Scale: 0.125, Query: kv.F32, QueryScale: 1, Output: kv.F32,
		},
		config: quest,
		shape:  layout.Config{Kind: layout.NHD, DType: kv.F16, Sequences: 3, Tokens: 320, PageSize: 16},
		tokens: 320,
		models: []int{0, 5},
		seed:   1,
	}
}

// engine owns a cache and lends it to a lease.
type engine struct {
	setup
	t      testing.TB
	suite  *suite
	layout *layout.Layout
	lease  gpu.Lease
	lent   gpu.Memory
	spec   *gpu.CacheSpec
	cache  gpu.Cache

	buffer Buffer
	bytes  []byte // what the buffer must hold
	tables [][]int32

	// keys and values are what the cache stores of each sequence and layer: [KVHeads][tokens][dim].
	keys, values [][][]float32

	past past
}

// engine makes an engine with all its tokens in the cache, and skips the test if the device does not
// serve it.
func (s *suite) engine(t testing.TB, setup setup) *engine {
	t.Helper()
	e := &engine{setup: setup, t: t, suite: s, past: past{states: make(map[[3]int]*pipeline.State)}}
	g := &e.geometry
	e.shape.Layers, e.shape.KVHeads = g.Layers, g.KVHeads
	e.shape.KDim, e.shape.VDim = g.KDim, g.VDim
	if missing := s.undeclared(&setup); missing != "" {
		t.Skip("the device does not declare ", missing)
	}
	config := s.parse(t, e.config)

	e.layout = must(layout.New(e.shape))(t)
	if e.pages == nil {
		for _, p := range seeded(e.seed, 1).Perm(e.layout.NumPages) {
			e.pages = append(e.pages, int32(p))
		}
	}
	e.tables = e.layout.Tables(e.pages)
	r := seeded(e.seed, 0)
	for range e.layout.Sequences {
		e.keys = append(e.keys, e.tensors(r, g.KDim, e.layout.KScales))
		e.values = append(e.values, e.tensors(r, g.VDim, e.layout.VScales))
	}
	e.buffer = s.memory.Alloc(t, int(e.layout.Size()))
	e.bytes = make([]byte, e.layout.Size())
	for sequence := range e.keys {
		e.write(sequence, 0, e.tokens)
	}
	e.lend(config)
	return e
}

// lend opens a lease and registers the cache on it.
func (e *engine) lend(config *pipeline.Config) {
	e.t.Helper()
	ctx := e.t.Context()
	e.lease = must(e.suite.device.Open(ctx, &e.geometry, config))(e.t)
	e.t.Cleanup(e.close)
	e.lent = must(e.lease.Import(ctx, e.buffer.Region(e.t, len(e.bytes), false)))(e.t)
	e.spec = e.layout.Spec(e.lent, 0)
	for i := range e.spec.Layers {
		e.spec.Layers[i].Layer = e.models[i]
	}
	if e.edit != nil {
		e.edit(e, e.spec)
	}
	e.cache = must(e.lease.NewCache(ctx, e.spec))(e.t)
}

// fresh lends the cache as it is now once more, with nothing indexed yet.
func (e *engine) fresh() *engine {
	e.t.Helper()
	f := *e
	f.lend(e.suite.parse(e.t, e.config))
	return &f
}

// close ends the lease and sees to it that the cache is as the engine wrote it.
func (e *engine) close() {
	if err := e.lease.Close(); err != nil {
		e.t.Error(err)
	}
	now := make([]byte, len(e.bytes))
	if e.buffer.Read(0, now); !bytes.Equal(now, e.bytes) {
		e.t.Error("the device wrote to the cache")
	}
}

// tensors returns random [KVHeads][tokens][dim] for each layer, as the cache stores them.
func (e *engine) tensors(r *rand.Rand, dim int, scales []float32) [][]float32 {
	layers := make([][]float32, e.geometry.Layers)
	for i := range layers {
		for h := range e.geometry.KVHeads {
			scale := float32(1)
			if len(scales) > 0 {
				scale = scales[h%len(scales)]
			}
			layers[i] = append(layers[i], random(r, e.layout.DType, e.tokens*dim, 1, scale)...)
		}
	}
	return layers
}

// seeded gives the same numbers each time.
func seeded(a, b uint64) *rand.Rand {
	return rand.New(rand.NewPCG(a, b)) //nolint:gosec // test data, no secret
}

// random returns n normal values that t, times scale, holds exactly.
func random(r *rand.Rand, t kv.DType, n int, spread float64, scale float32) []float32 {
	x, data := make([]float32, n), make([]byte, n*t.Size())
	for i := range x {
		x[i] = float32(r.NormFloat64()*spread) / scale
	}
	t.Encode(data, x)
	t.Decode(x, data)
	for i := range x {
		x[i] *= scale
	}
	return x
}

// write stores tokens [from, to) of a sequence in all layers of the cache.
func (e *engine) write(sequence, from, to int) {
	for i := range e.geometry.Layers {
		e.layout.Write(e.bytes, i, e.tables[sequence], e.keys[sequence][i], e.values[sequence][i], from, to)
	}
	e.buffer.Write(0, e.bytes)
}

// replace gives tokens [from, to) of a sequence those of another, and stores them.
func (e *engine) replace(sequence, by, from, to int) {
	for _, p := range []struct {
		tensors [][][]float32
		dim     int
	}{{e.keys, e.geometry.KDim}, {e.values, e.geometry.VDim}} {
		for i := range e.geometry.Layers {
			for h := range e.geometry.KVHeads {
				at := h * e.tokens
				copy(p.tensors[sequence][i][(at+from)*p.dim:(at+to)*p.dim], p.tensors[by][i][(at+from)*p.dim:])
			}
		}
	}
	e.write(sequence, from, to)
}

// seq is a row of a batch: a sequence, by its number in the engine, which the device knows as that + 1.
type seq struct{ sequence, length, first int }

// batch declares rows with their whole tables.
func (e *engine) batch(rows ...seq) *kv.Step {
	step := &kv.Step{}
	for _, r := range rows {
		var table []int32
		if r.length > 0 {
			table = e.tables[r.sequence]
		}
		step.Sequences = append(step.Sequences, uint64(r.sequence+1))
		step.Lengths = append(step.Lengths, int32(r.length))
		step.FirstValid = append(step.FirstValid, int32(r.first))
		step.TableCounts = append(step.TableCounts, uint32(len(table)))
		step.TableEntries = append(step.TableEntries, table...)
	}
	return step
}

func (e *engine) step(step *kv.Step) {
	e.t.Helper()
	if err := e.cache.Step(e.t.Context(), step); err != nil {
		e.t.Fatal(err)
	}
	e.past.begin()
}

// queries returns the queries of rows in a layer, [B][Hq][KDim], as the query dtype stores them. They
// follow from sequence and length, so that a step can be repeated.
func (e *engine) queries(layer int, rows []seq) []float32 {
	g, all := &e.geometry, []float32(nil)
	for _, q := range rows {
		r := seeded(e.seed, uint64(2+layer<<40|q.sequence<<20|q.length))
		all = append(all, random(r, g.Query, g.QueryHeads*g.KDim, 3, g.QueryScale)...)
	}
	return all
}

// request asks for a layer with queries and lists in messages.
func (e *engine) request(layer int, rows []seq) *gpu.LayerRequest {
	g := &e.geometry
	queries := e.queries(layer, rows)
	for i := range queries {
		queries[i] /= g.QueryScale
	}
	data := make([]byte, len(queries)*g.Query.Size())
	g.Query.Encode(data, queries)
	return &gpu.LayerRequest{Layer: e.models[layer], Query: &gpu.Tensor{Inline: data}, Lists: true}
}

// run runs a layer, into a result that holds another's.
func (e *engine) run(request *gpu.LayerRequest) *gpu.LayerResult {
	e.t.Helper()
	result := &gpu.LayerResult{
		Candidates: []uint32{7}, Kept: []uint32{7}, Paths: []pipeline.Path{7}, Reasons: []pipeline.Reason{7},
		Lists: []int32{7}, Truncated: []uint32{7}, Output: slices.Repeat([]byte{7}, 1<<16),
		Mass: []float32{7}, Coverage: []float32{7},
		Index: kv.IndexStats{TokensIndexed: 7, TokensClaimed: 7},
	}
	if err := e.cache.Layer(e.t.Context(), request, result); err != nil {
		e.t.Fatal(err)
	}
	return result
}

// decode makes rows the batch and runs all layers.
func (e *engine) decode(rows ...seq) []*gpu.LayerResult {
	e.t.Helper()
	e.step(e.batch(rows...))
	return e.layers(rows...)
}

// layers runs all layers of a batch that is declared.
func (e *engine) layers(rows ...seq) []*gpu.LayerResult {
	e.t.Helper()
	var results []*gpu.LayerResult
	for i := range e.geometry.Layers {
		results = append(results, e.run(e.request(i, rows)))
	}
	return results
}

// indexed fails the test unless each layer indexed and claimed so many tokens.
func indexed(t testing.TB, results []*gpu.LayerResult, tokens, claimed int) {
	t.Helper()
	for i, r := range results {
		if r.Index.TokensIndexed != uint64(tokens) || r.Index.TokensClaimed != uint64(claimed) {
			t.Errorf("layer %d: indexed %d tokens and claimed %d, want %d and %d",
				i, r.Index.TokensIndexed, r.Index.TokensClaimed, tokens, claimed)
		}
	}
}

// same fails the test unless both are the same to the bit, timing and indexing aside.
func same(t testing.TB, what string, want, got []*gpu.LayerResult) {
	t.Helper()
	for i := range want {
		w, g := want[i], got[i]
		for _, c := range []struct {
			name string
			same bool
		}{
			{"candidates", slices.Equal(w.Candidates, g.Candidates)},
			{"kept", slices.Equal(w.Kept, g.Kept)},
			{"paths", slices.Equal(w.Paths, g.Paths)},
			{"reasons", slices.Equal(w.Reasons, g.Reasons)},
			{"lists", slices.Equal(w.Lists, g.Lists)},
			{"output", bytes.Equal(w.Output, g.Output)},
			{"mass", slices.EqualFunc(w.Mass, g.Mass, sameFloat)},
			{"coverage", slices.EqualFunc(w.Coverage, g.Coverage, sameFloat)},
		} {
			if !c.same {
				t.Errorf("%s: layer %d: other %s", what, i, c.name)
			}
		}
	}
}

func sameFloat(a, b float32) bool { return math.Float32bits(a) == math.Float32bits(b) }

// parse reads a config, and skips the test if the device has no such methods.
func (s *suite) parse(t testing.TB, config string) *pipeline.Config {
	t.Helper()
	all := must(methods.New())(t)
	c := must(all.Parse([]byte(config)))(t)
	for _, m := range []struct {
		name string
		has  []string
	}{
		{c.Selector.Type, s.info.Selectors},
		{c.Estimator.Type, s.info.Estimators},
		{c.Pruner.Type, s.info.Pruners},
		{c.Compressor.Type, s.info.Compressors},
	} {
		if !slices.Contains(m.has, m.name) {
			t.Skipf("the device has no method %q", m.name)
		}
	}
	return c
}

// undeclared says what of a setup the device does not declare, "" if it declares all.
func (s *suite) undeclared(setup *setup) string {
	g, info := &setup.geometry, &s.info
	headSize := func(d int) bool {
		return d <= info.MaxHeadSize && (info.HeadSizes == nil || slices.Contains(info.HeadSizes, d))
	}
	switch {
	case !slices.Contains(info.CacheDTypes, setup.shape.DType):
		return fmt.Sprint("caches of ", setup.shape.DType)
	case !slices.Contains(info.QueryDTypes, g.Query):
		return fmt.Sprint("queries of ", g.Query)
	case !headSize(g.KDim) || !headSize(g.VDim):
		return fmt.Sprint("head sizes ", g.KDim, " and ", g.VDim)
	case g.Group() > info.MaxGroup:
		return fmt.Sprint("groups of ", g.Group())
	}
	return ""
}

// must takes the results of a call and fails the test if one is an error.
func must[T any](value T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}
