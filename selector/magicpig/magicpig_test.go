package magicpig

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
	"github.com/twilight-sidecar/twilight/selector"
)

func configs(t *rapid.T) *Config {
	return &Config{
		K: rapid.IntRange(1, maxK).Draw(t, "K"), L: rapid.IntRange(2, 40).Draw(t, "L"),
		NumSinks: rapid.IntRange(0, 30).Draw(t, "num_sinks"), Window: rapid.IntRange(1, 100).Draw(t, "window"),
		Seed: rapid.IntRange(-5, 5).Draw(t, "seed"),
	}
}

// TestSelect compares with the formula, in float64. A product so close to 0 that float32 may have its sign
// either way leaves it open whether a table matches.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := configs(t)
		s := config.New()
		p := s.(magicpig).hashes.projector
		e.Index(s.Shadow())
		mean := plainMean(e)
		w := p.projections(e.Dim)

		// products[i] are those of vector i: the queries', then the keys'.
		dot := func(i int, vector []float32, mean []float64) float64 {
			sum := 0.0
			for d, x := range vector {
				sum += (float64(x) - mean[d]) * float64(w[i*e.Dim+d])
			}
			return sum
		}
		all := func(vector []float32, mean []float64) (products []float64) {
			for i := range config.K * config.L {
				products = append(products, dot(i, vector, mean))
			}
			return products
		}
		var queries [][]float64
		for _, q := range e.Queries {
			queries = append(queries, all(q, make([]float64, e.Dim)))
		}
		is := make([]bool, e.Len)
		got := s.Select([]int32{-7}, &e.Row)
		for i, p := range got[1:] {
			if p <= got[i] {
				t.Fatalf("selected %v, expected ascending positions after what was there", got)
			}
			is[p] = true
		}
		for p := e.First; p < e.Len; p++ {
			certain := p < e.First+config.NumSinks || p >= e.Len-config.Window ||
				e.PinFirst && p/16 == e.First/16 || e.PinCurrent && p/16 == (e.Len-1)/16
			possible := certain
			key := all(e.Key(p), mean)
			for _, query := range queries {
				surely, maybe := 0, 0
				for l := range config.L {
					match, open := true, false
					for i := l * config.K; i < (l+1)*config.K; i++ {
						match = match && (key[i] > 0) == (query[i] > 0)
						open = open || math.Abs(key[i]) < 1e-4 || math.Abs(query[i]) < 1e-4
					}
					if match && !open {
						surely++
					}
					if match || open {
						maybe++
					}
				}
				certain = certain || surely >= 2
				possible = possible || maybe >= 2
			}
			if certain && !is[p] || is[p] && !possible {
				t.Fatalf("position %d is a candidate: %v, but certainly one: %v, possibly: %v", p, is[p], certain, possible)
			}
		}
	})
}

// plainMean is that of the first 256 valid keys, or 64, or 16; 0 of fewer.
func plainMean(e *selectortest.Example) []float64 {
	mean := make([]float64, e.Dim)
	for _, level := range []int{256, 64, 16} {
		if e.Len-e.First < level {
			continue
		}
		for p := e.First; p < e.First+level; p++ {
			for d, x := range e.Key(p) {
				mean[d] += float64(x) / float64(level)
			}
		}
		break
	}
	return mean
}

// TestProbability: keys at an angle to the query are drawn as often as the formula says.
func TestProbability(t *testing.T) {
	t.Parallel()
	const dim, tokens, seeds = 64, 4, 2000
	config := Config{K: 4, L: 10, Window: 1}
	for _, angle := range []float64{.3, .8, 1.2, math.Pi / 2, 2} {
		// Keys in pairs x, -x have mean 0; those of interest come after the 16 that train it.
		query := make([]float32, dim)
		query[0] = 2
		keys := make([]float32, (16+tokens+1)*dim)
		for p := 16; p < 16+tokens; p++ {
			keys[p*dim] = float32(math.Cos(angle))
			keys[p*dim+p-15] = float32(math.Sin(angle))
		}
		drawn := 0
		for seed := range seeds {
			config.Seed = seed
			s := config.New()
			row := &selector.Row{
				Queries: [][]float32{query}, Dim: dim, Len: 16 + tokens + 1, Records: kvtest.Index(s.Shadow(), keys, dim, 0),
			}
			for _, p := range s.Select(nil, row) {
				if p >= 16 && p < 16+tokens {
					drawn++
				}
			}
		}
		same := math.Pow(1-angle/math.Pi, float64(config.K))
		miss, l := 1-same, float64(config.L)
		want := 1 - math.Pow(miss, l) - l*same*math.Pow(miss, l-1)
		if got := float64(drawn) / (tokens * seeds); math.Abs(got-want) > .03 {
			t.Errorf("angle %.2f: drawn with probability %.3f, want %.3f", angle, got, want)
		}
	}
}

// TestSeed: the same seed gives the same hashes, another one others.
func TestSeed(t *testing.T) {
	t.Parallel()
	vector := slices.Repeat([]float32{1, -2, 3, .5}, 16)
	hash := func(seed uint64) []uint16 {
		codes := make([]uint16, 150)
		newProjector(10, 150, seed).hash(codes, 150, vector, 64, new([block]float32))
		return codes
	}
	if !slices.Equal(hash(1), hash(1)) {
		t.Error("hashes of one seed differ")
	}
	if slices.Equal(hash(1), hash(2)) {
		t.Error("hashes do not depend on the seed")
	}
}

// TestCentred: keys that lie all on one side of the origin are told apart.
func TestCentred(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 1024
	random := rand.New(rand.NewPCG(1, 2))
	keys, query := make([]float32, length*dim), make([]float32, dim)
	for i := range keys {
		keys[i] = 5 + float32(random.NormFloat64())
	}
	for d := range query {
		query[d] = 1 + float32(random.NormFloat64())
	}
	s := (&Config{K: 8, L: 75, Window: 1}).New()
	row := &selector.Row{
		Queries: [][]float32{query}, Dim: dim, Len: length, Records: kvtest.Index(s.Shadow(), keys, dim, 0),
	}
	if n := len(s.Select(nil, row)); n > length/3 {
		t.Errorf("%d of %d keys are candidates", n, length)
	}
}

// TestIndexIsIncremental: indexing tokens one by one gives the bytes that indexing them at once gives.
func TestIndexIsIncremental(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		shadow := configs(t).New().Shadow()
		e.All[(e.Len-1)*e.Dim] = float32(math.NaN())
		records := e.Index(shadow)
		c := rapid.IntRange(e.First/16, (e.Len-1)/16).Draw(t, "chunk")
		want := slices.Clone(records.Chunk(c))
		valid := kvtest.Valid(c, e.First, e.Len)
		stale := slices.Repeat([]float32{3, float32(math.Inf(1))}, len(e.All))[:len(e.All)]
		records.Update(shadow, stale, e.Dim, c, valid, valid)
		for _, i := range rapid.Permutation([]int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}).Draw(t, "order") {
			if bit := uint16(1) << i; valid&bit != 0 {
				records.Update(shadow, e.All, e.Dim, c, valid, bit)
			}
		}
		if !slices.Equal(records.Chunk(c), want) {
			t.Fatal("the record depends on how it came about")
		}
	})
}

// TestBadKeys: a key that is not finite is a candidate, and spoils its channel's mean only.
func TestBadKeys(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 300
	keys := slices.Repeat([]float32{3}, length*dim)
	keys[150*dim+3], keys[17*dim] = float32(math.NaN()), float32(math.Inf(-1))
	s := (&Config{K: 15, L: 2, Window: 1}).New()
	records := kvtest.Index(s.Shadow(), keys, dim, 0)
	row := &selector.Row{Queries: [][]float32{make([]float32, dim)}, Dim: dim, Len: length, Records: records}
	row.Queries[0][5] = 1
	if got := s.Select(nil, row); !slices.Contains(got, 150) || !slices.Contains(got, 17) {
		t.Errorf("selected %v, want 150 and 17 among them", got)
	}
}

// TestCollide compares with counting, hash by hash.
func TestCollide(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.IntRange(1, 40).Draw(t, "words")
		heads := rapid.IntRange(1, 3).Draw(t, "queries")
		hash := rapid.SampledFrom([]uint16{0, 1, 2, 0x4000, 0x7fff, 0x7ffe, 0x3fff})
		key := make([]byte, 8*words)
		own := rapid.SliceOfN(hash, 4*words, 4*words).Draw(t, "key")
		for i, h := range own {
			key[2*i], key[2*i+1] = byte(h), byte(h>>8)
		}
		queries := make([]uint64, words*heads)
		want := false
		for h := range heads {
			same := 0
			for i, q := range rapid.SliceOfN(hash, 4*words, 4*words).Draw(t, "query") {
				// Most differ, so that no match, one and two all come up.
				if rapid.IntRange(0, 2*words).Draw(t, "differ") > 0 && q == own[i] {
					q ^= 5
				}
				queries[h*words+i/4] |= uint64(q) << (i % 4 * 16)
				if q == own[i] {
					same++
				}
			}
			want = want || same >= 2
		}
		if got := collide(key, queries); got != want {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}

// TestCoverage: what the published settings draw of real rows.
func TestCoverage(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		k, l                            int
		mean, worst, recall, candidates float64
	}{{10, 150, .89, .5, .77, 600}, {8, 75, .92, .55, .83, 1000}} {
		got := selectortest.Cover(t, &Config{K: test.k, L: test.l, NumSinks: 4, Window: 64}, 0)
		if got.Mean < test.mean || got.Worst < test.worst || got.Recall < test.recall || got.Candidates > test.candidates {
			t.Errorf("K %d, L %d: %+v, want a mean of %v, at worst %v, and a recall of %v with at most %v candidates",
				test.k, test.l, got, test.mean, test.worst, test.recall, test.candidates)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"K":         {{0, 2, 0, 1, 0}, {16, 2, 0, 1, 0}},
		"L":         {{1, 1, 0, 1, 0}, {1, maxL + 1, 0, 1, 0}},
		"num_sinks": {{1, 2, -1, 1, 0}},
		"window":    {{1, 2, 0, 0, 0}},
	} {
		for _, c := range bad {
			var f *fault.Error
			if err := c.Validate(); !errors.As(err, &f) || f.Field != field {
				t.Errorf("%+v: error %v, want one about %s", c, err, field)
			}
		}
	}
}

func TestNoAllocation(t *testing.T) {
	const dim, length = 128, 200
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	s := Default().New()
	shadow := s.Shadow()
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length,
		Records: kvtest.Index(shadow, keys, dim, 0), PinFirst: true,
	}
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = s.Select(dst[:0], row) })
	chunk := make([]byte, shadow.ChunkBytes(dim))
	kvtest.NoAllocation(t, func() { shadow.Index(row.Records.Head(), chunk, keys, dim, 0xffff, 0xffff) })
}
