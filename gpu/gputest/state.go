package gputest

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/selector"
)

// past is what the reference remembers of rows, as a device should.
type past struct {
	carries map[[2]int][]selector.Carry // by row of the batch and KV head
	states  map[[3]int]*pipeline.State  // by sequence, layer and KV head
	step    uint64
}

// begin starts a step.
func (p *past) begin() {
	p.carries = make(map[[2]int][]selector.Carry)
	p.step++
}

func (p *past) carry(b, h, lists int) []selector.Carry {
	at := [2]int{b, h}
	if p.carries[at] == nil {
		p.carries[at] = make([]selector.Carry, lists)
	}
	return p.carries[at]
}

func (p *past) state(sequence, layer, h int) *pipeline.State {
	at := [3]int{sequence, layer, h}
	if p.states[at] == nil {
		p.states[at] = &pipeline.State{}
	}
	return p.states[at]
}

// truncate forgets a sequence from position n on.
func (p *past) truncate(sequence, n int) {
	for at, state := range p.states {
		if at[0] == sequence {
			state.Truncate(n)
		}
	}
}

// end forgets a sequence.
func (p *past) end(sequence int) {
	for at := range p.states {
		if at[0] == sequence {
			delete(p.states, at)
		}
	}
}

// inModes is a config of all layers in both group modes.
func inModes(stages string) map[string]string {
	configs := make(map[string]string)
	for _, mode := range []string{"union", "per_query_head"} {
		configs[mode] = fmt.Sprintf(`{"skip_first_two_layers": false, "group": %q, %s}`, mode, stages)
	}
	return configs
}

const (
	tidalStages = `"selector": {"type": "tidal_decode", "token_budget": 64, "reselection_layers": [0]},` + topP
	h2oStages   = `"selector": {"type": "h2o", "token_budget": 64, "recent_share": 0.25}`
	topP        = `"weight_pruner": {"type": "top_p", "threshold": 0.9}`
	snapStages  = `"compressor": {"type": "snap_kv", "window_size": 4, "max_capacity_prompt": 40, "kernel_size": 3}`
)

// testCarry lets layers reuse the lists of others: in order, in another order, twice, and in each step anew.
func testCarry(t *testing.T, s *suite) {
	for mode, config := range inModes(tidalStages) {
		t.Run(mode, func(t *testing.T) {
			setup := standard()
			setup.config = config
			e := s.engine(t, setup)
			// Layers by number, marked where they reuse a list of the step.
			for step, order := range []string{"0 1+", "0 1+ 1+ 0 1+", "1 0 1+", "1", "0 1+"} {
				rows := []seq{{0, 200 + step, 0}, {2, 0, 0}, {1, 300 + step, 21}}
				e.step(e.batch(rows...))
				for which := range strings.FieldsSeq(order) {
					layer := int(which[0] - '0')
					result := e.run(e.request(layer, rows))
					e.checkLayer(layer, rows, result)
					want := rows[0].length
					if len(which) > 1 {
						want = 64
					}
					if got := int(result.Candidates[0]); got != want {
						t.Errorf("step %d, layer %d: %d candidates, want %d", step, layer, got, want)
					}
				}
			}
		})
	}
}

// prefill makes observations of rows: window queries and mass, random but for what they are of.
func (e *engine) prefill(layer, window int, rows []seq, prompts []int) *gpu.Observation {
	g := &e.geometry
	n := slices.Max(prompts)
	var queries, mass []float32
	for b, row := range rows {
		r := seeded(e.seed, uint64(1<<60|layer<<40|row.sequence<<20|prompts[b]))
		queries = append(queries, random(r, g.Query, window*g.QueryHeads*g.KDim, 3, g.QueryScale)...)
		for range g.QueryHeads * n {
			mass = append(mass, float32(r.ExpFloat64()))
		}
	}
	data := make([]byte, len(queries)*g.Query.Size())
	g.Query.Encode(data, queries)
	massData := make([]byte, len(mass)*kv.F32.Size())
	kv.F32.Encode(massData, mass)
	o := &gpu.Observation{Mass: &gpu.Tensor{Inline: massData}, MassTokens: n}
	if window > 0 {
		o.Window, o.WindowQueries = window, &gpu.Tensor{Inline: data}
	}
	return o
}

// observe lets the reference see what prefill made.
func (e *engine) observe(layer int, rows []seq, prompts []int, o *gpu.Observation) {
	e.t.Helper()
	g := &e.geometry
	group := g.Group()
	p := must(pipeline.New(e.suite.parse(e.t, e.config), g))(e.t)
	for b, row := range rows {
		for h := range g.KVHeads {
			seen := &pipeline.Observation{Prompt: prompts[b], Window: o.Window}
			mass := make([]float32, len(o.Mass.Inline)/kv.F32.Size())
			kv.F32.Decode(mass, o.Mass.Inline)
			for i := h * group; i < (h+1)*group; i++ {
				for w := range o.Window {
					query := make([]float32, g.KDim)
					g.Query.Decode(query, o.WindowQueries.Inline[((b*o.Window+w)*g.QueryHeads+i)*g.KDim*g.Query.Size():])
					seen.Queries = append(seen.Queries, query...)
				}
				seen.Mass = append(seen.Mass, mass[(b*g.QueryHeads+i)*o.MassTokens:][:o.MassTokens]...)
			}
			r := &pipeline.Row{
				Layer: e.models[layer], KVHead: h, First: row.first, Len: row.length,
				Keys:  reader(e.head(e.keys, row.sequence, layer, h), g.KDim),
				State: e.past.state(row.sequence, layer, h),
			}
			p.Observe(&pipeline.Scratch{}, r, seen)
		}
	}
}

// testStates grows, rolls back, ends and restarts sequences at random, with an observation of their prompt
// or, where none is needed, without, and holds each step against a reference that remembers.
func testStates(t *testing.T, s *suite) {
	for name, stages := range map[string]string{
		"h2o": h2oStages, "snap_kv": snapStages,
		"h2o with top_p": h2oStages + "," + topP, "all": h2oStages + "," + snapStages + "," + topP,
		"adakv around h2o":     `"selector": {"type": "adakv", "token_budget": 64, "selector": {"type": "h2o"}}`,
		"snap_kv before quest": snapStages + `, "selector": {"type": "quest", "token_budget": 32}`,
	} {
		for mode, config := range inModes(stages) {
			t.Run(name+"/"+mode, func(t *testing.T) {
				forPageSizes(t, func(t *testing.T, setup setup) {
					setup.config = config
					s.engine(t, setup).remember(seeded(9, uint64(len(name))))
				})
			})
		}
	}
}

// remember is a random history.
func (e *engine) remember(r *rand.Rand) {
	lengths := make([]int, len(e.keys))
	for range 25 {
		var ended []uint64
		for i := range lengths {
			if lengths[i] > 0 && r.IntN(8) == 0 {
				ended, lengths[i] = append(ended, uint64(i+1)), 0
				e.past.end(i)
			}
		}
		ended = e.start(r, lengths, ended)

		var rows []seq
		var truncate []int32
		for i, n := range lengths {
			to := int32(-1)
			if r.IntN(5) == 0 {
				n = 1 + r.IntN(n)
				to = int32(n)
				e.past.truncate(i, n)
			}
			lengths[i] = min(e.tokens, n+1+r.IntN(3))
			rows, truncate = append(rows, seq{i, lengths[i], 0}), append(truncate, to)
		}
		step := e.batch(rows...)
		step.TruncateTo, step.Ended = truncate, ended
		e.step(step)
		for i := range e.models {
			result := e.run(e.request(i, rows))
			e.checkLayer(i, rows, result)
			again := e.run(e.request(i, rows))
			same(e.t, "a layer that runs twice", []*gpu.LayerResult{result}, []*gpu.LayerResult{again})
		}
	}
}

// start prefills the sequences that have no tokens, by layers without a query, and returns what of ended
// is still to be told.
func (e *engine) start(r *rand.Rand, lengths []int, ended []uint64) []uint64 {
	var rows []seq
	var prompts []int
	for i, n := range lengths {
		if n == 0 {
			lengths[i] = 1 + r.IntN(e.tokens/2)
			rows, prompts = append(rows, seq{i, lengths[i], 0}), append(prompts, lengths[i])
		}
	}
	if len(rows) == 0 {
		return ended
	}
	step := e.batch(rows...)
	step.Ended = ended
	e.step(step)
	needs := must(pipeline.New(e.suite.parse(e.t, e.config), &e.geometry))(e.t).Needs()
	if needs.Window == 0 && r.IntN(2) == 0 {
		return nil
	}
	for i := range e.models {
		o := e.prefill(i, 4+r.IntN(3), rows, prompts)
		e.run(&gpu.LayerRequest{Layer: e.models[i], Observation: o})
		e.observe(i, rows, prompts, o)
	}
	return nil
}

// testObservations gives observations with a query, in memory, and such as cannot be.
func testObservations(t *testing.T, s *suite) {
	setup := standard()
	setup.config = inModes(h2oStages + "," + snapStages)["union"]
	rows, prompts := []seq{{0, 301, 0}, {1, 251, 0}}, []int{300, 250}

	t.Run("with a query", func(t *testing.T) {
		e := s.engine(t, setup)
		e.step(e.batch(rows...))
		for i := range e.models {
			request := e.request(i, rows)
			request.Observation = e.prefill(i, 4, rows, prompts)
			e.observe(i, rows, prompts, request.Observation)
			e.checkLayer(i, rows, e.run(request))
		}
	})
	t.Run("in memory", func(t *testing.T) {
		want, e := s.engine(t, setup), s.engine(t, setup)
		want.step(want.batch(rows...))
		e.step(e.batch(rows...))
		request := e.request(0, rows)
		request.Observation = e.prefill(0, 4, rows, prompts)
		expected := want.run(request)

		queries, mass := request.Observation.WindowQueries.Inline, request.Observation.Mass.Inline
		size := len(queries) + len(mass)
		buffer := s.memory.Alloc(t, size)
		buffer.Write(0, slices.Concat(mass, queries))
		memory := must(e.lease.Import(t.Context(), buffer.Region(t, size, false)))(t)
		request.Observation.Mass = &gpu.Tensor{Memory: memory}
		request.Observation.WindowQueries = &gpu.Tensor{Memory: memory, Offset: uint64(len(mass))}
		same(t, "in memory", []*gpu.LayerResult{expected}, []*gpu.LayerResult{e.run(request)})
	})
	t.Run("refused", func(t *testing.T) {
		e := s.engine(t, setup)
		e.step(e.batch(rows...))
		refuse := func(kind fault.Kind, field string, change func(o *gpu.Observation)) {
			t.Helper()
			request := e.request(0, rows)
			request.Observation = e.prefill(0, 4, rows, prompts)
			change(request.Observation)
			refused(t, e.cache.Layer(t.Context(), request, &gpu.LayerResult{}), kind, field)
		}
		g := &setup.geometry
		refuse(fault.Invalid, "observation.window", func(o *gpu.Observation) { o.Window = 0 })
		refuse(fault.Invalid, "observation.window", func(o *gpu.Observation) { o.Window = -1 })
		refuse(fault.Invalid, "observation.window", func(o *gpu.Observation) { o.Window = 1 << 30 })
		refuse(fault.Invalid, "observation.window", func(o *gpu.Observation) {
			*o = *e.prefill(0, 3, rows, prompts)
		})
		refuse(fault.Invalid, "observation.window_queries_inline", func(o *gpu.Observation) {
			o.WindowQueries.Inline = o.WindowQueries.Inline[1:]
		})
		refuse(fault.Invalid, "observation.window_queries_inline", func(o *gpu.Observation) { o.Window, o.WindowQueries = 0, nil })
		refuse(fault.Invalid, "observation.window_queries[1][2][3][5]", func(o *gpu.Observation) {
			at := ((1*4+2)*g.QueryHeads+3)*g.KDim + 5
			g.Query.Encode(o.WindowQueries.Inline[at*g.Query.Size():], []float32{float32(math.NaN())})
		})
		refuse(fault.Invalid, "observation.mass_tokens", func(o *gpu.Observation) { o.MassTokens = -1 })
		refuse(fault.Invalid, "observation.mass_tokens", func(o *gpu.Observation) { o.MassTokens = 0 })
		refuse(fault.Invalid, "observation.mass_tokens", func(o *gpu.Observation) {
			o.MassTokens, o.Mass.Inline = 299, o.Mass.Inline[:len(o.Mass.Inline)/300*299]
		})
		refuse(fault.Invalid, "observation.mass_inline", func(o *gpu.Observation) { o.MassTokens = 299 })
		for _, bad := range []float64{-1, math.NaN(), math.Inf(1)} {
			refuse(fault.Invalid, "observation.mass[0][1][7]", func(o *gpu.Observation) {
				kv.F32.Encode(o.Mass.Inline[(300+7)*kv.F32.Size():], []float32{float32(bad)})
			})
		}
		refuse(fault.NotFound, "observation.mass_at", func(o *gpu.Observation) {
			o.Mass = &gpu.Tensor{Memory: s.engine(t, setup).lent}
		})
		refuse(fault.OutOfRange, "observation.window_queries_at.offset", func(o *gpu.Observation) {
			o.WindowQueries = &gpu.Tensor{Memory: e.lent, Offset: uint64(len(e.bytes))}
		})
		refuse(fault.Invalid, "observation", func(o *gpu.Observation) { *o = gpu.Observation{} })
		err := e.cache.Layer(t.Context(), e.request(0, rows), &gpu.LayerResult{})
		refused(t, err, fault.Precondition, "observation")

		anonymous := e.batch(rows...)
		anonymous.Sequences, anonymous.BySlots = nil, true
		refused(t, e.cache.Step(t.Context(), anonymous), fault.Unsupported, "sequences")
		e.spec.MaxTokens = 600
		small := must(e.lease.NewCache(t.Context(), e.spec))(t)
		refused(t, small.Step(t.Context(), e.batch(seq{0, 301, 0}, seq{1, 300, 0})), fault.Exhausted, "lengths")
		if err := small.Step(t.Context(), e.batch(seq{0, 300, 0}, seq{1, 300, 0})); err != nil {
			t.Error(err)
		}

		request := e.request(0, rows)
		request.Observation = e.prefill(0, 4, rows, prompts)
		e.observe(0, rows, prompts, request.Observation)
		e.checkLayer(0, rows, e.run(request))
	})
	t.Run("for nothing", func(t *testing.T) {
		e := s.engine(t, standard())
		e.step(e.batch(rows...))
		request := e.request(0, rows)
		request.Observation = e.prefill(0, 4, rows, prompts)
		refused(t, e.cache.Layer(t.Context(), request, &gpu.LayerResult{}), fault.Unsupported, "observation")
	})
}

// testRewrittenSlots overwrites tokens in place, whose scores then start anew, as for a token that is new.
func testRewrittenSlots(t *testing.T, s *suite) {
	setup := standard()
	setup.config = inModes(h2oStages)["union"]
	e := s.engine(t, setup)
	row, size := seq{0, 300, 0}, setup.shape.PageSize
	e.step(e.batch(row))
	for i := range e.models {
		request := e.request(i, []seq{row})
		request.Observation = e.prefill(i, 0, []seq{row}, []int{299})
		e.observe(i, []seq{row}, []int{299}, request.Observation)
		e.checkLayer(i, []seq{row}, e.run(request))
	}
	for _, slots := range [][]int{{3, 100, 101}, {64}, {}} {
		step := e.batch(row)
		step.BySlots, step.Slots = true, []int64{-1}
		for _, n := range slots {
			step.Slots = append(step.Slots, int64(e.tables[0][n/size])*int64(size)+int64(n%size))
			to := n + 1
			if n%size == 0 {
				to = n + size
			}
			for _, state := range e.past.states {
				state.Forget(n, to)
			}
		}
		e.step(step)
		for i := range e.models {
			e.checkLayer(i, []seq{row}, e.run(e.request(i, []seq{row})))
		}
	}
}
