package gputest

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
)

// pageSizes are one for chunks that belong to pages and one for chunks that belong to sequences.
var pageSizes = []int{16, 7}

// forPageSizes runs a test for each of pageSizes.
func forPageSizes(t *testing.T, run func(t *testing.T, setup setup)) {
	for _, size := range pageSizes {
		t.Run(fmt.Sprintf("pages of %d", size), func(t *testing.T) {
			setup := standard()
			setup.shape.PageSize = size
			run(t, setup)
		})
	}
}

// testAppend decodes token by token, sending what is new of the table only; each step must give what a
// fresh lease gives at that length.
func testAppend(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		e := s.engine(t, setup)
		sent := 0
		for _, n := range []int{1, 2, 15, 16, 17, 63, 64, 65, 66, 255, 256, 257, 300, 301, 302} {
			row := seq{sequence: 1, length: n}
			step := e.batch(row)
			pages := (n + setup.shape.PageSize - 1) / setup.shape.PageSize
			step.TableEntries = e.tables[1][sent:pages]
			step.TableStarts, step.TableCounts = []uint32{uint32(sent)}, []uint32{uint32(pages - sent)}
			sent = pages
			e.step(step)
			same(t, fmt.Sprint(n, " tokens"), e.fresh().decode(row), e.layers(row))
		}
	})
}

// testIndexOnly indexes without attending, by Index and by layers without a query.
func testIndexOnly(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		row := seq{sequence: 0, length: 300}
		e := s.engine(t, setup)
		want := e.fresh().decode(row)
		indexed(t, want, 300, 0)

		e.step(e.batch(row))
		stats := must(e.cache.Index(t.Context()))(t)
		if n := uint64(300 * setup.geometry.Layers); stats.TokensIndexed != n {
			t.Errorf("Index: indexed %d tokens, want %d", stats.TokensIndexed, n)
		}
		got := e.layers(row)
		same(t, "after Index", want, got)
		indexed(t, got, 0, 0)

		e = e.fresh()
		for _, n := range []int{260, 300} {
			e.step(e.batch(seq{0, n, 0}))
			for i := range e.models {
				result := e.run(&gpu.LayerRequest{Layer: e.models[i]})
				if len(result.Output)+len(result.Kept)+len(result.Lists)+len(result.Mass) > 0 {
					t.Error("a layer without a query answers more than what it indexed")
				}
			}
		}
		got = e.layers(row)
		same(t, "after layers without a query", want, got)
		indexed(t, got, 0, 0)
	})
}

// testPageReuse gives the pages of a sequence to another, which claims nothing.
func testPageReuse(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		setup.config = unequalized
		old, row := seq{sequence: 0, length: 320}, seq{sequence: 1, length: 310}
		e := s.engine(t, setup)
		e.decode(old)
		e.tables[1] = e.tables[0]
		e.write(1, 0, e.tokens)
		step := e.batch(row)
		step.Ended = []uint64{1}
		e.step(step)
		got := e.layers(row)
		same(t, "reused pages", e.fresh().decode(row), got)
		indexed(t, got, 310, 0)
	})
}

// testPageClaim gives the pages of a sequence, with the tokens on them, to another that claims them.
func testPageClaim(t *testing.T, s *suite) {
	setup := standard()
	e := s.engine(t, setup)
	e.decode(seq{sequence: 0, length: 300})
	e.tables[1] = e.tables[0]
	e.replace(1, 0, 0, 280)
	e.write(1, 280, e.tokens)

	row := seq{sequence: 1, length: 310}
	step := e.batch(row)
	step.Ended, step.UnchangedPrefix = []uint64{1}, []int32{280}
	e.step(step)
	got := e.layers(row)
	indexed(t, got, 310-280, 280)
	same(t, "claimed pages", e.fresh().decode(row), got)
}

// testSequenceClaim claims a prefix of a sequence that ends, or goes on, where chunks belong to
// sequences: whole chunks of it need not be indexed.
func testSequenceClaim(t *testing.T, s *suite) {
	for name, ended := range map[string][]uint64{"ended": {1}, "live": nil} {
		t.Run(name, func(t *testing.T) {
			setup := standard()
			setup.shape.PageSize = 7
			row := seq{sequence: 1, length: 310}
			e := s.engine(t, setup)
			e.replace(1, 0, 0, 280)
			e.decode(seq{0, 300, 0})
			step := e.batch(row)
			step.Ended, step.UnchangedPrefix, step.PrefixOf = ended, []int32{280}, []uint64{1}
			e.step(step)
			got := e.layers(row)
			same(t, "claimed prefix", e.fresh().decode(row), got)
			shared := 280 / kv.ChunkTokens * kv.ChunkTokens
			indexed(t, got, 310-shared, shared)
		})
	}
}

// testSharedPrefix runs two sequences with the same first pages in one batch.
func testSharedPrefix(t *testing.T, s *suite) {
	const prefix = 160
	setup := standard()
	rows := []seq{{0, 300, 0}, {1, 290, 0}}
	fresh := s.engine(t, setup)
	fresh.replace(1, 0, 0, prefix)
	want := fresh.decode(rows...)

	share := func(e *engine) {
		e.replace(1, 0, 0, prefix)
		copy(e.tables[1], e.tables[0][:prefix/setup.shape.PageSize])
	}
	t.Run("together", func(t *testing.T) {
		e := s.engine(t, setup)
		share(e)
		got := e.decode(rows...)
		same(t, "a shared prefix", want, got)
		indexed(t, got, 300+290-prefix, 0)
	})
	t.Run("with a claim", func(t *testing.T) {
		e := s.engine(t, setup)
		share(e)
		e.decode(rows[0])
		step := e.batch(rows...)
		step.UnchangedPrefix = []int32{0, prefix}
		e.step(step)
		got := e.layers(rows...)
		same(t, "a claimed prefix", want, got)
		indexed(t, got, 290-prefix, prefix)
	})
	t.Run("a fork within a page", func(t *testing.T) {
		e := s.engine(t, setup)
		e.replace(1, 0, 0, e.tokens)
		copy(e.tables[1], e.tables[0])
		rows := []seq{{1, 290, 0}, {0, 300, 0}}
		for i, result := range e.decode(rows...) {
			e.checkOutputs(i, rows, result)
			for _, list := range listsOf(result)[:setup.geometry.KVHeads] {
				if last := list[len(list)-1]; last >= 290 {
					t.Errorf("position %d is behind the sequence's end", last)
				}
			}
		}
	})
	t.Run("without a claim", func(t *testing.T) {
		e := s.engine(t, setup)
		share(e)
		e.decode(rows[0])
		got := e.decode(rows...)
		same(t, "a prefix that nobody claims", want, got)
		indexed(t, got, 290, 0)
	})
}

// testTruncation rolls a sequence back and grows it by other tokens.
func testTruncation(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		const kept, length = 270, 290
		row := seq{sequence: 0, length: length}
		e := s.engine(t, setup)
		e.decode(seq{0, 310, 0})
		e.replace(0, 1, kept, length)
		step := e.batch(row)
		step.TruncateTo = []int32{kept}
		e.step(step)
		got := e.layers(row)
		same(t, "truncated", e.fresh().decode(row), got)
		indexed(t, got, length-kept, 0)
	})
}

// testSlots overwrites tokens in place, and restarts a page by its first slot.
func testSlots(t *testing.T, s *suite) {
	setup := standard()
	setup.config = unequalized
	row := seq{sequence: 0, length: 300}
	size := setup.shape.PageSize
	for name, c := range map[string]struct {
		written []int // positions that change
		slots   []int // positions that are named
		indexed int
	}{
		"overwritten tokens": {[]int{3, 100, 101, 299}, []int{3, 100, 101, 299}, 4},
		"a restarted page":   {[]int{64, 65}, []int{64}, size},
		"nothing":            {nil, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			e := s.engine(t, setup)
			e.decode(row)
			for _, n := range c.written {
				e.replace(0, 1, n, n+1)
			}
			step := e.batch(row)
			step.BySlots, step.Slots = true, []int64{-1}
			for _, n := range c.slots {
				step.Slots = append(step.Slots, int64(e.tables[0][n/size])*int64(size)+int64(n%size))
			}
			e.step(step)
			got := e.layers(row)
			same(t, name, e.fresh().decode(row), got)
			indexed(t, got, c.indexed, 0)
		})
	}

	t.Run("anonymous rows", func(t *testing.T) {
		e := s.engine(t, setup)
		step := e.batch(row)
		step.Sequences, step.BySlots = nil, true
		for n := range row.length {
			step.Slots = append(step.Slots, int64(e.tables[0][n/size])*int64(size)+int64(n%size))
		}
		e.step(step)
		same(t, "anonymous rows", e.fresh().decode(row), e.layers(row))
	})
}

// testHistory grows, rolls back, rewrites and restarts sequences at random. After each step the results
// are those of a fresh cache.
func testHistory(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		setup.config = unequalized
		e := s.engine(t, setup)
		r := seeded(5, uint64(setup.shape.PageSize))
		lengths := make([]int, len(e.keys)) // of live sequences
		for range 30 {
			var rows []seq
			var truncate []int32
			var ended []uint64
			for _, i := range r.Perm(len(lengths))[:1+r.IntN(len(lengths))] {
				to := int32(-1)
				kept := lengths[i]
				switch {
				case kept > 0 && r.IntN(4) == 0: // rolled back
					kept = r.IntN(kept)
					to = int32(kept)
				case kept > 0 && r.IntN(4) == 0: // over, and another starts on its pages
					ended = append(ended, uint64(i+1))
					kept = 0
				}
				lengths[i] = min(e.tokens, kept+1+r.IntN(60))
				e.rewrite(r, i, kept, lengths[i])
				rows, truncate = append(rows, seq{i, lengths[i], 0}), append(truncate, to)
			}
			step := e.batch(rows...)
			step.TruncateTo, step.Ended = truncate, ended
			e.step(step)
			same(t, "a step", e.fresh().decode(rows...), e.layers(rows...))
		}
	})
}

// rewrite gives tokens [from, to) of a sequence new keys and values.
func (e *engine) rewrite(r *rand.Rand, sequence, from, to int) {
	for _, p := range []struct {
		tensors [][][]float32
		dim     int
	}{{e.keys, e.geometry.KDim}, {e.values, e.geometry.VDim}} {
		for i := range e.geometry.Layers {
			for h := range e.geometry.KVHeads {
				at := h * e.tokens
				copy(p.tensors[sequence][i][(at+from)*p.dim:], random(r, e.layout.DType, (to-from)*p.dim, 1, 1))
			}
		}
	}
	e.write(sequence, from, to)
}

// testLeftPadding starts sequences behind padding, whole chunks of it and parts.
func testLeftPadding(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		for _, first := range []int{1, 15, 16, 37, 319} {
			e := s.engine(t, setup)
			rows := []seq{{0, 320, first}, {1, 320, 0}}
			results := e.decode(rows...)
			e.check(rows, results)
			indexed(t, results, 320-first+320, 0)
			for _, list := range listsOf(results[0])[:setup.geometry.KVHeads] {
				if int(list[0]) < first {
					t.Errorf("position %d is padding, the first token is at %d", list[0], first)
				}
			}
		}
	})
}

// testVoidRows puts rows of length 0 between others.
func testVoidRows(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		g := &setup.geometry
		rows := []seq{{0, 320, 0}, {1, 300, 0}}
		want := s.engine(t, setup).decode(rows...)

		e := s.engine(t, setup)
		void := []seq{rows[0], {2, 0, 0}, rows[1]}
		e.step(e.batch(void...))
		for i := range e.models {
			request := e.request(i, void)
			query := request.Query.Inline[g.QueryHeads*g.KDim*g.Query.Size():]
			g.Query.Encode(query, []float32{float32(math.NaN())}) // nobody reads a void row's query
			got := e.run(request)
			heads, output := g.KVHeads, g.QueryHeads*g.VDim*g.Output.Size()
			for r := heads; r < 2*heads; r++ {
				if got.Paths[r] != pipeline.Void || got.Reasons[r] != pipeline.Empty || got.Kept[r] != 0 || got.Candidates[r] != 0 {
					t.Errorf("layer %d: void row %d: path %d, reason %d, %d kept of %d",
						i, r, got.Paths[r], got.Reasons[r], got.Kept[r], got.Candidates[r])
				}
			}
			for _, b := range got.Output[output : 2*output] {
				if b != 0 {
					t.Fatalf("layer %d: the output of the void row is not all zeros", i)
				}
			}
			without := *got
			without.Candidates = slices.Delete(got.Candidates, heads, 2*heads)
			without.Kept = slices.Delete(got.Kept, heads, 2*heads)
			without.Paths = slices.Delete(got.Paths, heads, 2*heads)
			without.Reasons = slices.Delete(got.Reasons, heads, 2*heads)
			without.Output = slices.Delete(got.Output, output, 2*output)
			without.Mass = slices.Delete(got.Mass, g.QueryHeads, 2*g.QueryHeads)
			without.Coverage = slices.Delete(got.Coverage, g.QueryHeads, 2*g.QueryHeads)
			same(t, "beside a void row", want[i:i+1], []*gpu.LayerResult{&without})
		}

		empty := e.decode(seq{2, 0, 0})
		if len(empty[0].Lists) != 0 || len(empty[0].Mass) != 0 {
			t.Error("a batch of void rows has lists or mass")
		}
		e.step(&kv.Step{})
		if none := e.layers()[0]; len(none.Kept)+len(none.Output) != 0 {
			t.Error("a batch of no rows has results")
		}
	})
}

// testValuePages puts values on other pages than their keys.
func testValuePages(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		row := seq{sequence: 0, length: 320}
		want := s.engine(t, setup).decode(row)

		e := s.engine(t, setup)
		pages := e.tables[2] // sequence 2's, which does not need them
		for i := range e.models {
			e.layout.WriteV(e.bytes, i, pages, e.values[0][i], 0, e.tokens)
			e.layout.WriteV(e.bytes, i, e.tables[0], e.values[1][i], 0, e.tokens)
		}
		e.buffer.Write(0, e.bytes)
		step := e.batch(row)
		step.VTableEntries = pages
		e.step(step)
		same(t, "values on other pages", want, e.layers(row))
	})
}

// testNullPage pads tables by a page that holds no tokens.
func testNullPage(t *testing.T, s *suite) {
	forPageSizes(t, func(t *testing.T, setup setup) {
		size := setup.shape.PageSize
		null := int32(-1)
		setup.edit = func(e *engine, spec *gpu.CacheSpec) {
			null = e.tables[2][0]
			spec.NullPage = null
		}
		e := s.engine(t, setup)
		row := seq{sequence: 0, length: 300, first: 2 * size}
		want := e.decode(row)

		e = s.engine(t, setup)
		e.tables[0][0], e.tables[0][1] = null, null
		e.tables[0][len(e.tables[0])-1] = null // behind the last token
		same(t, "padded by null pages", want, e.decode(row))

		step := e.batch(seq{1, 300, 0})
		step.TableEntries = slices.Clone(step.TableEntries)
		step.TableEntries[1] = null
		refused(t, e.cache.Step(t.Context(), step), fault.OutOfRange, "table.entries[1]")
		same(t, "after a refused step", want, e.layers(row))
	})
}

// testOverrides asks for another p and another budget than the config's, for some rows.
func testOverrides(t *testing.T, s *suite) {
	rows := []seq{{0, 320, 0}, {1, 320, 0}}
	setup := standard()
	e := s.engine(t, setup)
	want := e.decode(rows...)
	for name, c := range map[string]struct {
		config string
		change func(*gpu.LayerRequest)
	}{
		"p": {
			`{"skip_first_two_layers": false,
				"selector": {"type": "quest", "token_budget": 128},
				"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
				"weight_pruner": {"type": "top_p", "threshold": 0.3}}`,
			func(r *gpu.LayerRequest) { r.P = []float32{0, 0.3} },
		},
		"token_budget": {
			`{"skip_first_two_layers": false,
				"selector": {"type": "quest", "token_budget": 64},
				"weight_estimator": {"type": "min_max_quant", "quant_bit": 4},
				"weight_pruner": {"type": "top_p", "threshold": 0.8}}`,
			func(r *gpu.LayerRequest) { r.TokenBudget = []uint32{0, 64} },
		},
	} {
		t.Run(name, func(t *testing.T) {
			setup.config = c.config
			other := s.engine(t, setup).decode(rows...)
			for i := range e.models {
				request := e.request(i, rows)
				c.change(request)
				lists := listsOf(e.run(request))
				plain, changed := listsOf(want[i]), listsOf(other[i])
				for r, list := range lists {
					expected := plain[r]
					if r >= setup.geometry.KVHeads {
						expected = changed[r]
						if slices.Equal(expected, plain[r]) {
							t.Fatal("the override makes no difference")
						}
					}
					if !slices.Equal(list, expected) {
						t.Errorf("layer %d, list row %d: not the list of the config with this %s", i, r, name)
					}
				}
			}
		})
	}
}
