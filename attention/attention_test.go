package attention

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
)

// example is a row with its keys and values.
type example struct {
	Row
	keys, values []float32
	kDim, vDim   int
	first, end   int
}

func normal(random *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(random.NormFloat64())
	}
	return x
}

func examples(t *rapid.T) *example {
	dim := rapid.SampledFrom([]int{1, 3, 64, 80, 96, 128, 256})
	e := &example{kDim: dim.Draw(t, "kDim"), vDim: dim.Draw(t, "vDim"), end: rapid.IntRange(1, 700).Draw(t, "length")}
	e.first = rapid.IntRange(0, min(40, e.end-1)).Draw(t, "first")
	random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	e.keys, e.values = normal(random, e.end*e.kDim), normal(random, e.end*e.vDim)
	e.Keys, e.Values = kvtest.Reader(kv.F32, e.keys, e.kDim), kvtest.Reader(kv.F32, e.values, e.vDim)
	for range rapid.SampledFrom([]int{1, 3, 7, 16}).Draw(t, "heads") {
		query := normal(random, e.kDim)
		for d := range query {
			query[d] *= 4 / float32(math.Sqrt(float64(e.kDim))) // logits with a deviation of 4
		}
		e.Queries = append(e.Queries, query)
	}
	if rapid.Bool().Draw(t, "softcap") {
		e.Softcap = rapid.Float32Range(.5, 50).Draw(t, "cap")
	}
	if rapid.Bool().Draw(t, "sinks") {
		for range e.Queries {
			e.Sinks = append(e.Sinks, rapid.Float32Range(-100, 100).Draw(t, "sink"))
		}
	}
	return e
}

func (e *example) all() (positions []int32) {
	for p := e.first; p < e.end; p++ {
		positions = append(positions, int32(p))
	}
	return positions
}

// plainLogits and plain are the formula in float64.
func (e *example) plainLogits(h int, positions []int32) []float64 {
	logits := make([]float64, len(positions))
	for i, p := range positions {
		for d, q := range e.Queries[h] {
			logits[i] += float64(q) * float64(e.keys[int(p)*e.kDim+d])
		}
		if c := float64(e.Softcap); c > 0 {
			logits[i] = c * math.Tanh(logits[i]/c)
		}
	}
	return logits
}

func (e *example) plain(h int, positions []int32) []float64 {
	logits := e.plainLogits(h, positions)
	top, total := slices.Max(logits), 0.0
	if e.Sinks != nil {
		top = math.Max(top, float64(e.Sinks[h]))
		total = math.Exp(float64(e.Sinks[h]) - top)
	}
	out := make([]float64, e.vDim)
	for i, p := range positions {
		w := math.Exp(logits[i] - top)
		total += w
		for d := range out {
			out[d] += w * float64(e.values[int(p)*e.vDim+d])
		}
	}
	for d := range out {
		out[d] /= total
	}
	return out
}

func (e *example) check(t *rapid.T, out []float32, positions []int32) {
	t.Helper()
	for h := range e.Queries {
		for d, want := range e.plain(h, positions) {
			if got := float64(out[h*e.vDim+d]); !(math.Abs(got-want) <= 2e-5) {
				t.Fatalf("head %d, channel %d: %v, want %v", h, d, got, want)
			}
		}
	}
}

func TestDense(t *testing.T) {
	t.Parallel()
	var s Scratch // reused, as it will be
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		out := make([]float32, len(e.Queries)*e.vDim)
		Dense(out, &s, &e.Row, e.first, e.end)
		e.check(t, out, e.all())

		sparse := slices.Repeat([]float32{7}, len(out))
		Sparse(sparse, &s, &e.Row, e.all())
		if !slices.Equal(sparse, out) {
			t.Fatal("Sparse over all positions is not Dense")
		}
	})
}

func TestSparse(t *testing.T) {
	t.Parallel()
	var s Scratch
	rapid.Check(t, func(t *rapid.T) {
		e := examples(t)
		var positions []int32
		for _, p := range e.all() {
			if p == int32(e.end-1) || rapid.Uint8().Draw(t, "keep")%3 == 0 {
				positions = append(positions, p)
			}
		}
		out := make([]float32, len(e.Queries)*e.vDim)
		Sparse(out, &s, &e.Row, positions)
		e.check(t, out, positions)

		logits := make([][]float32, len(e.Queries))
		for h := range logits {
			for _, l := range e.plainLogits(h, positions) {
				logits[h] = append(logits[h], float32(l))
			}
		}
		e.Keys = kv.Reader{} // must not be read
		Weighted(out, &s, &e.Row, positions, logits)
		e.check(t, out, positions)
	})
}

func TestExtremes(t *testing.T) {
	t.Parallel()
	const n, dim = 200, 8
	ones := slices.Repeat([]float32{1}, n*dim)
	nan := float32(math.NaN())
	at := func(i int, x float32) []float32 {
		keys := slices.Clone(ones)
		keys[i*dim] = x
		return keys
	}
	for name, test := range map[string]struct {
		keys []float32
		sink float32
		want float32
	}{
		"plain":                  {ones, -1e30, 1},
		"a far smaller logit":    {at(100, -1e6), -1e30, 1},
		"a far larger logit":     {at(100, 1e6), -1e30, 1},
		"all weight on the sink": {ones, 1e30, 0},
		"half on the sink":       {ones, float32(dim + math.Log(n)), .5},
		"NaN in a key":           {at(100, nan), -1e30, nan},
		"Inf in a key":           {at(100, float32(math.Inf(1))), -1e30, nan},
		"-Inf in a key":          {at(100, float32(math.Inf(-1))), -1e30, 1},
	} {
		for _, softcap := range []float32{0, 1e4} {
			out := make([]float32, dim)
			row := &Row{
				Queries: [][]float32{ones[:dim]}, Softcap: softcap, Sinks: []float32{test.sink},
				Keys: kvtest.Reader(kv.F32, test.keys, dim), Values: kvtest.Reader(kv.F32, ones, dim),
			}
			Dense(out, new(Scratch), row, 0, n)
			got, want := out[3], test.want
			if softcap > 0 && name == "Inf in a key" {
				want = 1 // capped
			}
			if (got != got) != (want != want) || math.Abs(float64(got-want)) > 1e-6 {
				t.Errorf("%s, softcap %v: %v, want %v", name, softcap, got, want)
			}
		}
	}
}

func TestSoftcap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		softcap := rapid.SampledFrom([]float32{1, 30, 50}).Draw(t, "softcap")
		logits := rapid.SliceOfN(rapid.OneOf(rapid.Float32Range(-1e-3, 1e-3), rapid.Float32Range(-1e6, 1e6)), 1, 20).Draw(t, "logits")
		got := slices.Clone(logits)
		Softcap(got, softcap)
		for i, l := range logits {
			want := float64(softcap) * math.Tanh(float64(l)/float64(softcap))
			if math.Abs(float64(got[i])-want) > 3e-7*float64(softcap) {
				t.Fatalf("softcap %v of %v: %v, want %v", softcap, l, got[i], want)
			}
		}
	})
}

func TestNoAllocation(t *testing.T) {
	e := benchmarkRow(1000, 16, 128)
	var s Scratch
	out := make([]float32, 16*128)
	positions := []int32{1, 5, 900}
	kvtest.NoAllocation(t, func() {
		Dense(out, &s, &e.Row, 0, 1000)
		Sparse(out, &s, &e.Row, positions)
	})
}

func benchmarkRow(n, heads, dim int) *example {
	random := rand.New(rand.NewPCG(1, 2))
	e := &example{kDim: dim, vDim: dim, end: n, keys: normal(random, n*dim), values: normal(random, n*dim)}
	e.Keys, e.Values = kvtest.Reader(kv.F16, e.keys, dim), kvtest.Reader(kv.F16, e.values, dim)
	for range heads {
		e.Queries = append(e.Queries, normal(random, dim))
	}
	return e
}

func BenchmarkDense(b *testing.B) {
	e := benchmarkRow(4096, 4, 128)
	var s Scratch
	out := make([]float32, 4*128)
	for b.Loop() {
		Dense(out, &s, &e.Row, 0, 4096)
	}
}
