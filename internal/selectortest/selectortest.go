// Package selectortest makes rows for tests of selectors, random ones and real ones, and judges what is
// selected of them.
package selectortest

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/capture"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/selector"
	"github.com/twilight-sidecar/twilight/testdata"
)

// Example is a row with its keys, [Len][Dim]. It has no Records.
type Example struct {
	selector.Row
	All []float32
}

// Draw makes a random row, of normal keys and queries, with any budget of its own and any pins.
func Draw(t *rapid.T) *Example {
	dim := rapid.SampledFrom([]int{1, 3, 64, 80, 96, 128}).Draw(t, "dim")
	length := rapid.IntRange(1, 700).Draw(t, "length")
	e := &Example{Row: selector.Row{
		Layer: rapid.IntRange(0, 2).Draw(t, "layer"), Head: rapid.IntRange(0, 1).Draw(t, "head"),
		Dim: dim, Len: length,
		First:       rapid.IntRange(0, min(40, length-1)).Draw(t, "first"),
		TokenBudget: rapid.IntRange(0, length+20).Draw(t, "budget"),
		PinFirst:    rapid.Bool().Draw(t, "pin first"),
		PinCurrent:  rapid.Bool().Draw(t, "pin current"),
	}}
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0)) //nolint:gosec // a test is to be repeatable
	for range length * dim {
		e.All = append(e.All, float32(random.NormFloat64()))
	}
	for range rapid.SampledFrom([]int{1, 3, 7}).Draw(t, "heads") {
		query := make([]float32, dim)
		for d := range query {
			query[d] = float32(random.NormFloat64())
		}
		e.Queries = append(e.Queries, query)
	}
	e.Keys = kvtest.Reader(kv.F32, e.All, dim)
	return e
}

// Key returns the key of a position.
func (e *Example) Key(p int) []float32 { return e.All[p*e.Dim:][:e.Dim] }

// Index makes the shadow of the example's keys and sets its Records.
func (e *Example) Index(shadow kv.Shadow) *kvtest.Records {
	records := Index(shadow, e.Layer, e.Head, e.All, e.Dim, e.First)
	e.Records = records
	return records
}

// CheckTop fails the test unless got are all positions or as many as the budget or the pins say, ascending,
// pins among them, and no other has a score, score(p), that is larger by more than the tolerance than that
// of one which is.
func (e *Example) CheckTop(t rapid.TB, got []int32, budget int, tolerance float64, score func(p int) float64) {
	t.Helper()
	is, pins := make([]bool, e.Len), 0
	for i, p := range got {
		if int(p) < e.First || int(p) >= e.Len || i > 0 && p <= got[i-1] {
			t.Fatalf("selected %v, expected ascending positions in [%d, %d)", got, e.First, e.Len)
		}
		is[p] = true
	}
	least, most := math.Inf(1), math.Inf(-1)
	for p := e.First; p < e.Len; p++ {
		switch isPin := e.PinFirst && p/kv.ChunkTokens == e.First/kv.ChunkTokens ||
			e.PinCurrent && p/kv.ChunkTokens == (e.Len-1)/kv.ChunkTokens; {
		case isPin && !is[p]:
			t.Fatalf("position %d is pinned, but not selected", p)
		case isPin:
			pins++
		case is[p]:
			least = min(least, score(p))
		default:
			most = max(most, score(p))
		}
	}
	if want := min(e.Len-e.First, max(budget, pins)); len(got) != want {
		t.Fatalf("selected %d positions, want %d", len(got), want)
	}
	if most > least+tolerance {
		t.Fatalf("selected a score of %v, but not one of %v", least, most)
	}
}

// Index makes the shadow of keys [length][dim] of a (layer, KV head), seeded if it asks for that.
func Index(shadow kv.Shadow, layer, kvHead int, keys []float32, dim, first int) *kvtest.Records {
	if s, ok := shadow.(kv.Seeder); ok {
		return kvtest.Index(seeded{s, layer, kvHead}, keys, dim, first)
	}
	return kvtest.Index(shadow, keys, dim, first)
}

// seeded seeds its head record when it is trained on the first token.
type seeded struct {
	kv.Seeder
	layer, kvHead int
}

func (seeded) TrainLevels() []int { return []int{1} }

func (s seeded) Train(head []byte, _ []float32, dim int) { s.Seed(head, s.layer, s.kvHead, dim) }

// Coverage is what a selector does with the real rows of testdata: the share of softmax weight that its
// candidates hold, over all query heads and over the worst, and how many they are. Recall is the share of a
// query head's 100 heaviest tokens that are candidates, in the mean.
type Coverage struct{ Mean, Worst, Candidates, Recall float64 }

const heaviest = 100

// Cover runs a selector over the real rows, each asked by all heads of its group, pins set, of the decode
// steps from first on.
func Cover(t *testing.T, config selector.Config, first int) Coverage {
	t.Helper()
	if err := config.Validate(); err != nil {
		t.Fatal(err)
	}
	c := Capture(t)
	s := config.New()
	sum := Coverage{Worst: 1}
	rows := 0.0
	for l := range c.Layers {
		for kvHead := range c.KVHeads {
			row := selector.Row{
				Layer: c.Layers[l].Index, Head: kvHead, Dim: c.KDim, PinFirst: true, PinCurrent: true,
				Keys: kvtest.Reader(kv.F16, c.Keys(l, kvHead), c.KDim),
			}
			if records := Index(s.Shadow(), row.Layer, row.Head, c.Keys(l, kvHead), c.KDim, 0); records != nil {
				row.Records = records
			}
			for step := first; step < c.Steps; step++ {
				row.Len = c.N + step + 1
				row.Queries = row.Queries[:0]
				for h := range c.Group() {
					query := slices.Clone(c.Query(l, step, kvHead*c.Group()+h))
					for d := range query {
						query[d] *= float32(c.Scale)
					}
					row.Queries = append(row.Queries, query)
				}
				candidates := s.Select(nil, &row)
				sum.Candidates += float64(len(candidates))
				rows++
				for h := range c.Group() {
					_, weights := c.Dense(l, step, kvHead*c.Group()+h, nil)
					mass, err := capture.Mass(weights, candidates)
					if err != nil {
						t.Fatal(err)
					}
					sum.Recall += recall(weights, candidates) / float64(c.Group())
					sum.Mean += mass / float64(c.Group())
					sum.Worst = min(sum.Worst, mass)
				}
			}
		}
	}
	sum.Mean /= rows
	sum.Candidates /= rows
	sum.Recall /= rows
	return sum
}

// recall is the share of the heaviest positions that are candidates.
func recall(weights []float64, candidates []int32) float64 {
	order := make([]int32, len(weights))
	for i := range order {
		order[i] = int32(i)
	}
	slices.SortFunc(order, func(a, b int32) int { return cmp.Compare(weights[b], weights[a]) })
	found := 0
	for _, p := range order[:heaviest] {
		if _, is := slices.BinarySearch(candidates, p); is {
			found++
		}
	}
	return float64(found) / heaviest
}

// Capture is that of testdata.
func Capture(t *testing.T) *capture.Capture {
	t.Helper()
	c, err := capture.Decode(testdata.SmolLM2)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
