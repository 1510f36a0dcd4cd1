package quest

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/selectortest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
)

// example is a row with its keys.
type example struct {
	selector.Row
	keys []float32
}

func examples(t *rapid.T) *example {
	dim := rapid.SampledFrom([]int{1, 3, 64, 80, 96, 128}).Draw(t, "dim")
	length := rapid.IntRange(1, 700).Draw(t, "length")
	first := rapid.IntRange(0, min(40, length-1)).Draw(t, "first")
	heads := rapid.SampledFrom([]int{1, 3, 7}).Draw(t, "heads")
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	e := &example{keys: make([]float32, length*dim)}
	for i := range e.keys {
		e.keys[i] = float32(random.NormFloat64() * 3)
	}
	e.Row = selector.Row{
		Dim: dim, First: first, Len: length,
		TokenBudget: rapid.IntRange(0, length+20).Draw(t, "budget"),
		PinFirst:    rapid.Bool().Draw(t, "pin first"),
		PinCurrent:  rapid.Bool().Draw(t, "pin current"),
	}
	for range heads {
		q := make([]float32, dim)
		for i := range q {
			q[i] = float32(random.NormFloat64())
		}
		e.Queries = append(e.Queries, q)
	}
	e.Records = kvtest.Index(extremes{}, e.keys, dim, first)
	return e
}

// plainBound is the formula, in float64 from the keys themselves.
func (e *example) plainBound(query []float32, from, to int) float64 {
	sum := 0.0
	for d, q := range query {
		high, low := math.Inf(-1), math.Inf(1)
		for p := max(e.First, from); p < min(e.Len, to); p++ {
			high = max(high, float64(e.keys[p*e.Dim+d]))
			low = min(low, float64(e.keys[p*e.Dim+d]))
		}
		sum += max(float64(q)*high, float64(q)*low)
	}
	return sum
}

// TestBounds: each bound holds for every key below it, and is no looser than fp16 makes it.
func TestBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		size := 16 * rapid.IntRange(1, 3).Draw(t, "chunks a bound")
		first, end := e.First/size, ceilDiv(e.Len, size)
		quest{Config{ChunkSize: size}}.score(&e.Row, first, end)
		for h, query := range e.Queries {
			norm := 0.0
			for _, q := range query {
				norm += math.Abs(float64(q))
			}
			if got := len(e.Ranking.Bounds[h]); got != end-first {
				t.Fatalf("%d bounds, want %d", got, end-first)
			}
			for c, bound := range e.Ranking.Bounds[h] {
				plain := e.plainBound(query, (first+c)*size, (first+c+1)*size)
				slack := norm * 15 / 1024 // of fp16 values below 16
				if float64(bound) < plain-1e-4*norm || float64(bound) > plain+slack {
					t.Fatalf("head %d, chunk %d: bound %v, want %v..%v", h, c, bound, plain, plain+slack)
				}
				for p := max(e.First, (first+c)*size); p < min(e.Len, (first+c+1)*size); p++ {
					if logit := dot(query, e.keys[p*e.Dim:]); float64(bound) < logit-1e-4*norm {
						t.Fatalf("head %d, chunk %d: bound %v, but token %d has a logit of %v", h, c, bound, p, logit)
					}
				}
			}
		}
	})
}

func dot(query, key []float32) (sum float64) {
	for d, q := range query {
		sum += float64(q) * float64(key[d])
	}
	return sum
}

// TestRealBounds: of a real text, too, no key lies above the bound of its chunk.
func TestRealBounds(t *testing.T) {
	t.Parallel()
	c := selectortest.Capture(t)
	for l := range c.Layers {
		for kvHead := range c.KVHeads {
			keys := c.Keys(l, kvHead)
			row := &selector.Row{Dim: c.KDim, Len: c.Tokens(), Records: kvtest.Index(extremes{}, keys, c.KDim, 0)}
			for h := range c.Group() {
				row.Queries = append(row.Queries, c.Query(l, c.Steps-1, kvHead*c.Group()+h))
			}
			quest{Config{ChunkSize: 16}}.score(row, 0, ceilDiv(row.Len, 16))
			for h, query := range row.Queries {
				for p := range row.Len {
					if logit, bound := dot(query, keys[p*c.KDim:]), float64(row.Ranking.Bounds[h][p/16]); bound < logit-1e-3 {
						t.Fatalf("layer %d, head %d: token %d has a logit of %v, its chunk a bound of %v", l, h, p, logit, bound)
					}
				}
			}
		}
	}
}

// TestSelect compares with a plain selection: sort the chunks by score, pins before all.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		config := Config{
			TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
			SparsityRate: rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate"),
			ChunkSize:    16 * rapid.IntRange(1, 3).Draw(t, "chunks a bound"),
		}
		size := config.ChunkSize
		if rapid.Bool().Draw(t, "ties") {
			for _, q := range e.Queries {
				clear(q)
			}
		}

		budget := config.TokenBudget
		if config.SparsityRate > 0 {
			budget = int(math.Ceil(config.SparsityRate * float64(e.Len-e.First)))
		}
		if e.TokenBudget > 0 {
			budget = e.TokenBudget
		}
		keep := max(1, int(math.Ceil(float64(budget)/float64(size))))

		first, end := e.First/size, (e.Len-1)/size+1
		scores := slices.Clone(quest{config}.score(&e.Row, first, end))
		e.Ranking.Reset()
		chunks := make([]int, end-first)
		for i := range chunks {
			chunks[i] = i
		}
		isPinned := func(c int) bool { return e.PinFirst && c == 0 || e.PinCurrent && c == len(chunks)-1 }
		pins := 0
		for c := range chunks {
			if isPinned(c) {
				pins++
			}
		}
		slices.SortStableFunc(chunks, func(a, b int) int {
			if x, y := isPinned(a), isPinned(b); x != y {
				if x {
					return -1
				}
				return 1
			}
			if scores[a] == scores[b] {
				return 0
			} else if scores[a] > scores[b] {
				return -1
			}
			return 1
		})
		var want []int32
		for _, c := range chunks[:min(len(chunks), max(keep, pins))] {
			for p := (first + c) * size; p < (first+c+1)*size; p++ {
				if e.First <= p && p < e.Len {
					want = append(want, int32(p))
				}
			}
		}
		slices.Sort(want)

		if got := config.New().Select([]int32{-7}, &e.Row); !slices.Equal(got[1:], want) || got[0] != -7 {
			t.Fatalf("selected %v, want %v after what was there", got, want)
		}
		if all := keep >= len(chunks); all != (len(e.Ranking.Bounds) == 0) || all != (len(e.Ranking.Scores) == 0) {
			t.Fatalf("all are candidates: %v, but the ranking is %+v", all, e.Ranking)
		}
	})
}

// TestIndexFollowsValid: a record covers exactly the valid tokens, whatever it covered before.
func TestIndexFollowsValid(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		c := rapid.IntRange(e.First/16, (e.Len-1)/16).Draw(t, "chunk")
		all := kvtest.Valid(c, e.First, e.Len)
		some := all & rapid.Uint16Range(1, math.MaxUint16).Draw(t, "some")
		if some == 0 {
			some = all
		}
		records := e.Records.(*kvtest.Records)
		want := slices.Clone(records.Chunk(c))
		records.Update(extremes{}, e.keys, e.Dim, c, some, some) // as after a truncation
		records.Update(extremes{}, e.keys, e.Dim, c, all, all&^some)
		if !slices.Equal(records.Chunk(c), want) {
			t.Fatal("the record depends on the order of its tokens")
		}
	})
}

// TestUnboundedChunkRanksFirst: what cannot be bounded is a candidate, before any other chunk.
func TestUnboundedChunkRanksFirst(t *testing.T) {
	t.Parallel()
	inf := float32(math.Inf(1))
	for name, bad := range map[string]float32{
		"beyond fp16": 70000, "below fp16": -70000, "Inf": inf, "-Inf": -inf, "NaN": inf - inf, "huge": -3e38,
	} {
		for _, q := range []float32{2, -2, 0} {
			for _, size := range []int{16, 48} {
				const dim, length = 70, 400
				keys := make([]float32, length*dim)
				for i := range keys {
					keys[i] = float32(i % 7)
				}
				keys[200*dim+66] = bad
				query := make([]float32, dim)
				for i := range query {
					query[i] = q
				}
				row := &selector.Row{
					Queries: [][]float32{query}, Dim: dim, Len: length, TokenBudget: size,
					Records: kvtest.Index(extremes{}, keys, dim, 0),
				}
				got := (&Config{SparsityRate: -1, ChunkSize: size}).New().Select(nil, row)
				if len(got) != size || !slices.Contains(got, 200) {
					t.Errorf("%s, q %v, chunks of %d: selected %v, want the chunk of 200", name, q, size, got)
				}
				for c, b := range row.Ranking.Bounds[0] {
					if math.IsNaN(float64(b)) || (c == 200/size) != (b == inf) {
						t.Errorf("%s, q %v: chunk %d has bound %v", name, q, c, b)
					}
				}
			}
		}
	}
}

func TestRoundsOutwards(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		x := rapid.OneOf(rapid.Float32Range(-70000, 70000), rapid.Float32Range(-1e-4, 1e-4)).Draw(t, "x")
		for _, direction := range []float32{1, -1} {
			var half [2]byte
			var got, back [1]float32
			encodeOutwards(half[:], []float32{x}, direction)
			kv.F16.Decode(got[:], half[:])
			if (x-got[0])*direction > 0 {
				t.Fatalf("%v became %v against direction %v", x, got[0], direction)
			}
			// The next number against the direction must lie on the other side of x.
			if !math.IsInf(float64(got[0]), 0) {
				inner := next(uint16(half[0])|uint16(half[1])<<8, -direction)
				kv.F16.Decode(back[:], []byte{byte(inner), byte(inner >> 8)})
				if got[0] != x && (back[0]-x)*direction >= 0 {
					t.Fatalf("%v became %v, though %v is closer", x, got[0], back[0])
				}
			}
		}
	})
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"token_budget":  {{0, -1, 16}, {-5, -1, 16}, {math.MaxInt32 + 1, -1, 16}},
		"sparsity_rate": {{1, 0, 16}, {1, -.5, 16}, {1, 1.1, 16}, {1, math.NaN(), 16}, {1, math.Inf(1), 16}},
		"chunk_size":    {{1, -1, 0}, {1, -1, 8}, {1, -1, 24}, {1, -1, -16}, {1, -1, 1 << 21}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field || f.Kind != fault.Invalid {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 2000
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length, TokenBudget: 300,
		Records: kvtest.Index(extremes{}, keys, dim, 0), PinFirst: true,
	}
	s := Default().New()
	var dst []int32
	kvtest.NoAllocation(t, func() {
		row.Ranking.Reset()
		dst = s.Select(dst[:0], row)
		dst = row.Ranking.Take(dst, row, row.Ranking.Taken+5)
	})
	chunk := make([]byte, s.Shadow().ChunkBytes(dim))
	kvtest.NoAllocation(t, func() { s.Shadow().Index(nil, chunk, keys, dim, 0xffff, 1) })
}
