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
// TestEqualizeSavesOutliers: with channels like Gemma's, the paper's estimate is far off.
// TestIndexIsIncremental: indexing tokens one by one gives the bytes that indexing them at once gives.
// TestTrainSurvivesBadKeys: keys that are not finite leave their channel alone, and only theirs.
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
