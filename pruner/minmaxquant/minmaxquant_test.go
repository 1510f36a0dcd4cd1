package minmaxquant

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

// example is a row with its keys and its shadow's head record.
type example struct {
	Config
	pruner.Row
	keys          []float32
	first, length int
	records       *kvtest.Records
	mean, s       []float32 // by the formula
}

func examples(t *rapid.T) *example {
	e := &example{
		Config: Config{
			QuantBit: rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "quant_bit"),
			Equalize: rapid.Bool().Draw(t, "equalize"),
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
	e.records = kvtest.Index(e.New().Shadow(), e.keys, e.Dim, e.first)
	e.Records = e.records
	e.plainHead()
	return e
}

func half(x float32) float32 {
	var b [2]byte
	var y [1]float32
	kv.F16.Encode(b[:], []float32{x})
	kv.F16.Decode(y[:], b[:])
	return y[0]
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
	if level == 0 || !e.Equalize {
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
		e.s[d] = float32(math.Pow(square/float64(level), .25))
	}
	least := slices.Max(e.s) / 16
	for d := range e.s {
		e.s[d] = max(e.s[d], least)
	}
}

// plainKey is the key as the shadow keeps it, restored.
func (e *example) plainKey(p int) []float64 {
	even := make([]float32, e.Dim)
	for d := range even {
		even[d] = (e.keys[p*e.Dim+d] - e.mean[d]) * (1 / e.s[d])
	}
	top := float32(math.Pow(2, float64(e.QuantBit)) - 1)
	zero := half(slices.Min(even))
	scale := half((slices.Max(even) - slices.Min(even)) / top)
	restored := make([]float64, e.Dim)
	for d, x := range even {
		code := 0.0
		if scale > 0 {
			code = math.Floor(float64(float32((x-zero)*(1/scale)) + .5))
			code = math.Max(0, math.Min(float64(top), code))
		}
		restored[d] = (float64(scale)*code+float64(zero))*float64(e.s[d]) + float64(e.mean[d])
	}
	return restored
}

func TestLogits(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "positions"), 0))
		var positions []int32
		for p := e.first; p < e.length; p++ {
			if random.IntN(3) > 0 || p == e.length-1 {
				positions = append(positions, int32(p))
			}
		}
		logits := make([][]float32, len(e.Queries))
		for h := range logits {
			logits[h] = make([]float32, len(positions))
		}
		e.New().Logits(logits, &e.Row, positions)
		for i, p := range positions {
			key := e.plainKey(int(p))
			for h, query := range e.Queries {
				want, size := 0.0, 0.0
				for d, q := range query {
					want += float64(q) * key[d]
					size += math.Abs(float64(q)) * (math.Abs(key[d]) + math.Abs(float64(e.mean[d])) + 8*float64(e.s[d]))
				}
				if got := float64(logits[h][i]); !(math.Abs(got-want) <= 1e-6*size) {
					t.Fatalf("head %d, position %d: %v, want %v", h, p, got, want)
				}
			}
		}
	})
}

// TestStaysWithinHalfAStep: no channel is off by more than half a code and what fp16 costs.
func TestStaysWithinHalfAStep(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		p := rapid.IntRange(e.first, e.length-1).Draw(t, "position")
		e.Queries = [][]float32{make([]float32, e.Dim)}
		d := rapid.IntRange(0, e.Dim-1).Draw(t, "channel")
		e.Queries[0][d] = 1
		got := [][]float32{{0}}
		e.New().Logits(got, &e.Row, []int32{int32(p)})

		low, high := math.Inf(1), math.Inf(-1)
		for c := range e.Dim {
			x := float64((e.keys[p*e.Dim+c] - e.mean[c]) / e.s[c])
			low, high = math.Min(low, x), math.Max(high, x)
		}
		step := (high - low) / (math.Pow(2, float64(e.QuantBit)) - 1)
		fp16 := (high - low + math.Max(math.Abs(low), math.Abs(high))) / 1024
		want := float64(e.keys[p*e.Dim+d])
		if slack := float64(e.s[d]) * (step/2 + fp16); !(math.Abs(float64(got[0][0])-want) <= slack+1e-4) {
			t.Fatalf("%v, want %v +- %v", got[0][0], want, slack)
		}
	})
}

// TestEqualizeSavesOutliers: with channels like Gemma's, the paper's estimate is far off.
func TestEqualizeSavesOutliers(t *testing.T) {
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
	rms := map[bool]float64{}
	for _, equalize := range []bool{false, true} {
		e := (&Config{QuantBit: 4, Equalize: equalize}).New()
		row := &pruner.Row{Queries: [][]float32{query}, Dim: dim, Records: kvtest.Index(e.Shadow(), keys, dim, 0)}
		for p := range length {
			got, want := [][]float32{{0}}, 0.0
			e.Logits(got, row, []int32{int32(p)})
			for d, q := range query {
				want += float64(q) * float64(keys[p*dim+d])
			}
			rms[equalize] += (float64(got[0][0]) - want) * (float64(got[0][0]) - want) / length
		}
	}
	if plain, even := math.Sqrt(rms[false]), math.Sqrt(rms[true]); even > 1.2 || plain < 5*even {
		t.Errorf("error %v without and %v with equalised channels", plain, even)
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
		e.records.Update(e.New().Shadow(), stale, e.Dim, c, valid, valid)
		for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}).Draw(t, "order") {
			if bit := uint16(1) << i; valid&bit != 0 {
				e.records.Update(e.New().Shadow(), e.keys, e.Dim, c, valid, bit)
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
	s := Default().New().Shadow()
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
		strayed := slices.Clone(keys)
		strayed[20*dim+test.channel] = test.value
		r := kvtest.Index(s, keys[:16*dim], dim, 0)
		if !test.trained {
			r = kvtest.Index(s, keys[:10*dim], dim, 0)
		}
		r.Update(s, strayed, dim, 0, 1<<5-1, 1<<5-1)
		before := r.Drifted
		r.Update(s, strayed[16*dim:], dim, 0, 1<<5-1, 1<<4)
		if before != 0 || r.Drifted != test.want {
			t.Errorf("%s: %d reports, then %d, want 0, then %d", name, before, r.Drifted, test.want)
		}
		r.Update(s, strayed[16*dim:], dim, 0, 1<<5-1, 1<<3)
		if r.Drifted != test.want {
			t.Errorf("%s: reported for a token that is not fresh", name)
		}
	}
}

func TestUnusualKeys(t *testing.T) {
	t.Parallel()
	const dim, length = 66, 40
	inf := float32(math.Inf(1))
	query := slices.Repeat([]float32{1}, dim)
	for name, test := range map[string]struct {
		first, second float32 // channel 0, all others
		want          float64 // NaN: not finite
	}{
		"constant":        {2.5, 2.5, 2.5 * dim},
		"zero":            {0, 0, 0},
		"nearly constant": {1, 1 + 1e-7, dim},
		"tiny":            {-1e-9, 1e-9, 0},
		"NaN":             {inf - inf, 1, math.NaN()},
		"Inf":             {inf, 1, math.NaN()},
		"-Inf":            {1, -inf, math.NaN()},
		"beyond fp16":     {1e7, -1e7, math.NaN()},
		"beyond float32":  {3e38, -3e38, math.NaN()},
	} {
		for _, config := range []Config{{2, false}, {4, false}, {8, false}} {
			keys := slices.Repeat([]float32{test.second}, length*dim)
			for p := range length {
				keys[p*dim] = test.first
			}
			e := config.New()
			row := &pruner.Row{Queries: [][]float32{query}, Dim: dim, Records: kvtest.Index(e.Shadow(), keys, dim, 0)}
			got := [][]float32{{0}}
			e.Logits(got, row, []int32{17})
			if x := float64(got[0][0]); math.IsNaN(test.want) != (x-x != 0) || math.Abs(x-test.want) > 1e-5 {
				t.Errorf("%s, %d bits: %v, want %v", name, config.QuantBit, x, test.want)
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
	s := Default().New().Shadow()
	head := make([]byte, s.HeadBytes(dim))
	s.Train(head, keys, dim)
	mean, scale, reach := make([]float32, dim), make([]float32, dim), make([]float32, dim)
	readHead(mean, scale, reach, head)
	if !slices.Equal(mean, []float32{9, 0, 0}) || !slices.Equal(scale, []float32{2, .125, .125}) ||
		!slices.Equal(reach, []float32{4, 0, 0}) {
		t.Errorf("mean %v, s %v, reach %v, want [9 0 0], [2 .125 .125] and [4 0 0]", mean, scale, reach)
	}
}

func TestPack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.SampledFrom([]int{2, 4, 8}).Draw(t, "bits")
		values := rapid.SliceOfN(rapid.Map(rapid.IntRange(0, 1<<bits-1), func(i int) float32 { return float32(i) }), 1, 70).Draw(t, "values")
		packed := make([]byte, shadow{bits: bits}.codeBytes(len(values)))
		fractions := slices.Clone(values)
		for i := range fractions {
			fractions[i] += .4
		}
		pack(packed, fractions, bits)
		got := make([]float32, len(packed)*8/bits)
		unpack(got, packed, bits)
		if !slices.Equal(got[:len(values)], values) {
			t.Fatalf("%d bits: %v, want %v", bits, got, values)
		}
	})
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for _, bits := range []int{-4, 0, 1, 3, 5, 16} {
		var f *fault.Error
		if err := (&Config{QuantBit: bits}).Validate(); !errors.As(err, &f) || f.Field != "quant_bit" {
			t.Errorf("%d bits: error %v, want one about quant_bit", bits, err)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 600
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 13)
	}
	e := Default().New()
	records := kvtest.Index(e.Shadow(), keys, dim, 0)
	row := &pruner.Row{Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Records: records}
	positions := make([]int32, 500)
	logits := [][]float32{make([]float32, len(positions)), make([]float32, len(positions))}
	kvtest.NoAllocation(t, func() { e.Logits(logits, row, positions) })
}

func BenchmarkLogits(b *testing.B) {
	const dim, length, heads = 128, 8192, 4
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 13)
	}
	row := &pruner.Row{Dim: dim}
	positions, logits := make([]int32, length), make([][]float32, heads)
	for h := range heads {
		row.Queries = append(row.Queries, keys[h*dim:][:dim])
		logits[h] = make([]float32, length)
	}
	for p := range positions {
		positions[p] = int32(p)
	}
	e := Default().New()
	row.Records = kvtest.Index(e.Shadow(), keys, dim, 0)
	for b.Loop() {
		e.Logits(logits, row, positions)
	}
}

func BenchmarkIndex(b *testing.B) {
	const dim = 128
	keys := make([]float32, kv.ChunkTokens*dim)
	for i := range keys {
		keys[i] = float32(i % 13)
	}
	s := Default().New().Shadow()
	head, chunk := make([]byte, s.HeadBytes(dim)), make([]byte, s.ChunkBytes(dim))
	for b.Loop() {
		s.Index(head, chunk, keys, dim, 0xffff, 0xffff)
	}
}
