package smooth

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/internal/lowbit"
	"github.com/twilight-sidecar/twilight/pruner"
)

// example is a row with its keys and its shadow's head record.
type example struct {
	Estimator
	pruner.Row
	keys          []float32
	first, length int
	records       *kvtest.Records
	mean, s       []float32 // by the formula
}

func examples(t *rapid.T) *example {
	e := &example{
		Estimator: Estimator{
			Format: lowbit.Format{
				Bits:      rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "bits"),
				Symmetric: rapid.Bool().Draw(t, "symmetric"),
			},
			Smoothing: rapid.SampledFrom([]Smoothing{None, Centre, Equalise}).Draw(t, "smoothing"),
		},
		length: rapid.IntRange(1, 700).Draw(t, "length"),
	}
	e.Dim = rapid.SampledFrom([]int{1, 3, 64, 80, 96, 128}).Draw(t, "dim")
	e.first = rapid.IntRange(0, min(40, e.length-1)).Draw(t, "first")
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	e.keys = make([]float32, e.length*e.Dim)
	for i := range e.keys {
		e.keys[i] = float32(random.NormFloat64())
		switch i % e.Dim {
		case 1: // a channel that hardly varies
			e.keys[i] = 5 + 1e-4*e.keys[i]
		case 2: // a channel with a large mean and a large range
			e.keys[i] = 70 + 9*e.keys[i]
		}
	}
	for range rapid.SampledFrom([]int{1, 3, 7}).Draw(t, "heads") {
		q := make([]float32, e.Dim)
		for i := range q {
			q[i] = float32(random.NormFloat64())
		}
		e.Queries = append(e.Queries, q)
	}
	e.records = kvtest.Index(e.Estimator, e.keys, e.Dim, e.first)
	e.Records = e.records
	e.plainHead()
	return e
}

// plainHead computes the channels' mean and s by the formula: of the first 256 valid keys, or 64, or 16.
func (e *example) plainHead() {
	e.mean, e.s = make([]float32, e.Dim), slices.Repeat([]float32{1}, e.Dim)
	level := 0
	for _, l := range []int{16, 64, 256} {
		if l <= e.length-e.first {
			level = l
		}
	}
	if level == 0 || e.Smoothing == None {
		return
	}
	for d := range e.Dim {
		sum, square := 0.0, 0.0
		for p := e.first; p < e.first+level; p++ {
			sum += float64(e.keys[p*e.Dim+d])
		}
		e.mean[d] = float32(sum / float64(level))
		for p := e.first; p < e.first+level; p++ {
			square += math.Pow(float64(e.keys[p*e.Dim+d]-e.mean[d]), 2)
		}
		if e.Smoothing == Equalise {
			e.s[d] = float32(math.Pow(square/float64(level), .25))
		}
	}
	least := slices.Max(e.s) / 16
	for d := range e.s {
		e.s[d] = max(e.s[d], least)
	}
}

// TestLogits: a channel is off by no more than half a code of its key's scale, what fp16 costs, and what s
// makes of it; and so is a logit, in sum.
func TestLogits(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		var positions []int32
		for p := e.first; p < e.length; p++ {
			if p%3 > 0 || p == e.length-1 {
				positions = append(positions, int32(p))
			}
		}
		logits := make([][]float32, len(e.Queries))
		for h := range logits {
			logits[h] = make([]float32, len(positions))
		}
		e.Logits(logits, &e.Row, positions)
		for i, p := range positions {
			key := e.keys[int(p)*e.Dim:][:e.Dim]
			slack := e.slack(key)
			for h, query := range e.Queries {
				want, allowed := 0.0, 1e-4
				for d, q := range query {
					want += float64(q) * float64(key[d])
					allowed += math.Abs(float64(q)) * (slack*float64(e.s[d]) + 1e-6*math.Abs(float64(e.mean[d])))
				}
				if got := float64(logits[h][i]); !(math.Abs(got-want) <= allowed) {
					t.Fatalf("head %d, position %d: %v, want %v +- %v", h, p, got, want, allowed)
				}
			}
		}
	})
}

// slack is how far a channel of a smoothed key may be off.
func (e *example) slack(key []float32) float64 {
	low, high := math.Inf(1), math.Inf(-1)
	for d, x := range key {
		even := float64((x - e.mean[d]) / e.s[d])
		low, high = min(low, even), max(high, even)
	}
	steps := math.Pow(2, float64(e.Format.Bits)) - 1
	if e.Format.Symmetric {
		steps--
		high = max(high, -low)
		low = -high
	}
	return (high-low)/steps/2 + (high-low+max(math.Abs(low), math.Abs(high)))/1024
}

// TestSmoothingSavesOutliers: with channels like Gemma's, keys as they are give estimates far off.
func TestSmoothingSavesOutliers(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 600
	random := rand.New(rand.NewPCG(3, 4))
	keys, query := make([]float32, length*dim), make([]float32, dim)
	for i := range keys {
		keys[i] = float32(random.NormFloat64())
		if i%dim == 5 {
			keys[i] += 80
		}
	}
	for d := range query {
		query[d] = float32(random.NormFloat64())
	}
	for _, symmetric := range []bool{false, true} {
		var rms [3]float64
		for s := range rms {
			e := Estimator{lowbit.Format{Bits: 4, Symmetric: symmetric}, Smoothing(s)}
			row := &pruner.Row{Queries: [][]float32{query}, Dim: dim, Records: kvtest.Index(e, keys, dim, 0)}
			for p := range length {
				got, want := [][]float32{{0}}, 0.0
				e.Logits(got, row, []int32{int32(p)})
				for d, q := range query {
					want += float64(q) * float64(keys[p*dim+d])
				}
				rms[s] += (float64(got[0][0]) - want) * (float64(got[0][0]) - want) / length
			}
		}
		for s := Centre; s <= Equalise; s++ {
			if plain, even := math.Sqrt(rms[None]), math.Sqrt(rms[s]); even > 1.3 || plain < 5*even {
				t.Errorf("symmetric %v: error %v as they are and %v smoothed by %d", symmetric, plain, even, s)
			}
		}
	}
}

// TestIndexIsIncremental: indexing tokens one by one gives the bytes that indexing them at once gives.
func TestIndexIsIncremental(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		c := rapid.IntRange(e.first/16, (e.length-1)/16).Draw(t, "chunk")
		want := slices.Clone(e.records.Chunk(c))
		valid := kvtest.Valid(c, e.first, e.length)
		stale := slices.Repeat([]float32{3}, len(e.keys))
		e.records.Update(e.Estimator, stale, e.Dim, c, valid, valid)
		for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}).Draw(t, "order") {
			if bit := uint16(1) << i; valid&bit != 0 {
				e.records.Update(e.Estimator, e.keys, e.Dim, c, valid, bit)
			}
		}
		if !slices.Equal(e.records.Chunk(c), want) {
			t.Fatal("the record depends on how it came about")
		}
	})
}

func TestDrift(t *testing.T) {
	t.Parallel()
	const dim = 3
	keys := make([]float32, 32*dim)
	for p := range 32 {
		copy(keys[p*dim:], []float32{100 + float32(p%2*2), 7, float32(p%2)*2 - 1}) // means 101, 7, 0; reaches 1, 0, 1; s 1, 1/16, 1
	}
	for name, test := range map[string]struct {
		trained bool
		channel int
		value   float32
		want    int
	}{
		"within":              {true, 0, 104.9, 0},
		"within, below":       {true, 0, 97.1, 0},
		"beyond":              {true, 0, 105.2, 1},
		"beyond, below":       {true, 2, -4.1, 1},
		"of a constant":       {true, 1, 7.1, 1}, // its s is 1/16 of the largest
		"almost constant":     {true, 1, 7.01, 0},
		"nothing was trained": {false, 0, 1e4, 0},
	} {
		for _, s := range []Smoothing{None, Centre, Equalise} {
			e := Estimator{lowbit.Format{Bits: 4}, s}
			want := test.want
			if s == None {
				want = 0
			}
			strayed := slices.Clone(keys)
			strayed[20*dim+test.channel] = test.value
			r := kvtest.Index(e, keys[:16*dim], dim, 0)
			if !test.trained {
				r = kvtest.Index(e, keys[:10*dim], dim, 0)
			}
			r.Update(e, strayed, dim, 0, 1<<5-1, 1<<5-1)
			before := r.Drifted
			r.Update(e, strayed[16*dim:], dim, 0, 1<<5-1, 1<<4)
			if before != 0 || r.Drifted != want {
				t.Errorf("%s, smoothing %d: %d reports, then %d, want 0, then %d", name, s, before, r.Drifted, want)
			}
			r.Update(e, strayed[16*dim:], dim, 0, 1<<5-1, 1<<3)
			if r.Drifted != want {
				t.Errorf("%s, smoothing %d: reported for a token that is not fresh", name, s)
			}
		}
	}
}

// TestTrainSurvivesBadKeys: keys that are not finite leave their channel alone, and only theirs.
func TestTrainSurvivesBadKeys(t *testing.T) {
	t.Parallel()
	const dim = 3
	keys := make([]float32, 16*dim)
	for p := range 16 {
		copy(keys[p*dim:], []float32{5 + float32(p%2)*8, 1, 1})
	}
	keys[7*dim+1], keys[9*dim+2] = float32(math.NaN()), float32(math.Inf(-1))
	e := Estimator{lowbit.Format{Bits: 4}, Equalise}
	head := make([]byte, e.HeadBytes(dim))
	e.Train(head, keys, dim)
	mean, scale, reach := make([]float32, dim), make([]float32, dim), make([]float32, dim)
	readHead(mean, scale, reach, head)
	if !slices.Equal(mean, []float32{9, 0, 0}) || !slices.Equal(scale, []float32{2, .125, .125}) ||
		!slices.Equal(reach, []float32{4, 0, 0}) {
		t.Errorf("mean %v, s %v, reach %v, want [9 0 0], [2 .125 .125] and [4 0 0]", mean, scale, reach)
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 600
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 13)
	}
	positions := make([]int32, 500)
	logits := [][]float32{make([]float32, len(positions)), make([]float32, len(positions))}
	for s := None; s <= Equalise; s++ {
		e := Estimator{lowbit.Format{Bits: 4}, s}
		row := &pruner.Row{Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Records: kvtest.Index(e, keys, dim, 0)}
		kvtest.NoAllocation(t, func() { e.Logits(logits, row, positions) })
		head, chunk := make([]byte, e.HeadBytes(dim)), make([]byte, e.ChunkBytes(dim))
		kvtest.NoAllocation(t, func() { e.Index(head, chunk, keys, dim, 0xffff, 0xffff) })
	}
}
