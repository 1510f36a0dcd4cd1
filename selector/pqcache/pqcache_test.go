package pqcache

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

func configs(t *rapid.T) *Config {
	return &Config{
		TokenBudget:  rapid.IntRange(1, 400).Draw(t, "token_budget"),
		SparsityRate: rapid.SampledFrom([]float64{-1, .1, .25, 1}).Draw(t, "sparsity_rate"),
		Partitions:   rapid.IntRange(1, 5).Draw(t, "partitions"), // more than channels, where they are few
		Bits:         rapid.IntRange(1, 8).Draw(t, "bits"),
	}
}

// plainBook reads a head record's centroids, [m][2^b][channels of the part].
func plainBook(c codes, head []byte, dim int) [][][]float32 {
	m := min(c.m, dim)
	book := make([][][]float32, m)
	at := 4
	for i := range book {
		channels := (i+1)*dim/m - i*dim/m
		book[i] = make([][]float32, 1<<c.b)
		for range channels {
			column := make([]float32, 1<<c.b)
			kv.F32.Decode(column, head[at:])
			at += 4 * len(column)
			for k, x := range column {
				book[i][k] = append(book[i][k], x)
			}
		}
		at += 4 << c.b // norms
	}
	return book
}

func distance(a, b []float32) float64 {
	sum := 0.0
	for d, x := range a {
		sum += (float64(x) - float64(b[d])) * (float64(x) - float64(b[d]))
	}
	return sum
}

// TestCodes: each part of a key has the code of a centroid that no other beats.
func TestCodes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		c := configs(t).New().(pqcache).codes
		records := e.Index(c)
		if got, want := trained(records.Head()), e.Len-e.First >= 1<<c.b; got != want {
			t.Fatalf("%d tokens, %d bits: trained is %v", e.Len-e.First, c.b, got)
		}
		if !trained(records.Head()) {
			return
		}
		book := plainBook(c, records.Head(), e.Dim)
		for p := e.First; p < e.Len; p++ {
			for i := range book {
				part := e.Key(p)[i*e.Dim/len(book) : (i+1)*e.Dim/len(book)]
				code := records.Chunk(p / 16)[2+p%16*c.m+i]
				least := math.Inf(1)
				for _, centroid := range book[i] {
					least = min(least, distance(part, centroid))
				}
				if got := distance(part, book[i][code]); got > least+1e-4*(1+least) {
					t.Fatalf("position %d, part %d: code %d is %v away, another %v", p, i, code, got, least)
				}
			}
		}
	})
}

// TestSelect compares with the formula: scores are those of the keys restored from their codes, or of the
// keys while no codebook is trained.
func TestSelect(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		e := selectortest.Draw(t)
		config := configs(t)
		s := config.New()
		c := s.(pqcache).codes
		records := e.Index(c)
		restored := e.Key
		if trained(records.Head()) {
			book := plainBook(c, records.Head(), e.Dim)
			restored = func(p int) (key []float32) {
				for i := range book {
					key = append(key, book[i][records.Chunk(p / 16)[2+p%16*c.m+i]]...)
				}
				return key
			}
		}
		got := s.Select(nil, &e.Row)
		budget := e.Budget(config.TokenBudget, config.SparsityRate)
		e.CheckTop(t, got, budget, 1e-5*float64(1+e.Dim*len(e.Queries)), func(p int) float64 {
			sum := 0.0
			for d, x := range restored(p) {
				for _, q := range e.Queries {
					sum += float64(q[d]) * float64(x)
				}
			}
			return sum
		})
	})
}

// TestKMeans: clusters far apart are found, each with its mean.
func TestKMeans(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const k = 8
		d, n := rapid.IntRange(1, 70).Draw(t, "d"), k*rapid.IntRange(1, 30).Draw(t, "points a cluster")
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		points := make([]float32, n*d)
		var means [k][]float64
		for c := range means {
			means[c] = make([]float64, d)
		}
		for p := range n { // point p is of cluster p*k/n, so that each cluster has one to start from
			for i := range d {
				x := float32(100*(p*k/n)) + float32(random.NormFloat64())
				points[p*d+i] = x
				means[p*k/n][i] += float64(x) / float64(n/k)
			}
		}
		centroids, norms := make([]float32, d*k), make([]float32, k)
		kmeans(centroids, norms, points)
		for c, mean := range means {
			norm := 0.0
			for i, want := range mean {
				if got := float64(centroids[i*k+c]); math.Abs(got-want) > 1e-3 {
					t.Fatalf("cluster %d, channel %d: %v, want %v", c, i, got, want)
				}
				norm += want * want / 2
			}
			if math.Abs(float64(norms[c])-norm) > 1e-4*norm+1e-2 {
				t.Fatalf("cluster %d: half its square is %v, want %v", c, norms[c], norm)
			}
		}
	})
}

// TestKMeansImproves: on real keys its rounds bring centroids nearer to the keys than those it starts from.
func TestKMeansImproves(t *testing.T) {
	t.Parallel()
	const k = 64
	c := selectortest.Capture(t)
	d, points := c.KDim, c.Keys(1, 0)
	n := len(points) / d
	spread := func(centroids [][]float32) (sum float64) {
		for p := range n {
			least := math.Inf(1)
			for _, centroid := range centroids {
				least = min(least, distance(points[p*d:][:d], centroid))
			}
			sum += least
		}
		return sum
	}
	centroids, norms := make([]float32, d*k), make([]float32, k)
	kmeans(centroids, norms, points)
	var before, after [][]float32
	for i := range k {
		before = append(before, points[i*n/k*d:][:d])
		var centroid []float32
		for j := range d {
			centroid = append(centroid, centroids[j*k+i])
		}
		after = append(after, centroid)
	}
	if x, y := spread(before), spread(after); y > .75*x {
		t.Errorf("summed square distances are %v, from %v at the start", y, x)
	}
}

// TestTrainIsAFunctionOfKeys: the same keys give the same codebook, whatever the record held.
func TestTrainIsAFunctionOfKeys(t *testing.T) {
	t.Parallel()
	c := codes{2, 4}
	keys := make([]float32, 300*6)
	random := rand.New(rand.NewPCG(1, 2))
	for i := range keys {
		keys[i] = float32(random.NormFloat64())
	}
	one, two := make([]byte, c.HeadBytes(6)), slices.Repeat([]byte{0xab}, c.HeadBytes(6))
	c.Train(one, keys, 6)
	c.Train(two, keys, 6)
	if !slices.Equal(one, two) {
		t.Error("codebooks differ")
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

// TestBadKeys: keys that are not finite spoil no codebook and are candidates.
func TestBadKeys(t *testing.T) {
	t.Parallel()
	const dim, length = 64, 300
	random := rand.New(rand.NewPCG(1, 2))
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(random.NormFloat64())
	}
	keys[150*dim+3], keys[17*dim] = float32(math.NaN()), float32(math.Inf(-1))
	s := Default().New()
	row := &selector.Row{Dim: dim, Len: length, TokenBudget: 3, Records: kvtest.Index(s.Shadow(), keys, dim, 0)}
	for from := range 20 {
		row.Queries = [][]float32{keys[200*dim+from:][:dim]}
		if got := s.Select(nil, row); len(got) != 3 || !slices.Contains(got, 150) || !slices.Contains(got, 17) {
			t.Errorf("selected %v, want 150 and 17 among 3", got)
		}
	}
	for _, part := range plainBook(s.(pqcache).codes, row.Records.Head(), dim) {
		for _, centroid := range part {
			if sum := distance(centroid, make([]float32, len(centroid))); sum-sum != 0 {
				t.Fatalf("a centroid is %v", centroid)
			}
		}
	}
	for i := range keys {
		keys[i] = float32(math.NaN())
	}
	head := make([]byte, s.Shadow().HeadBytes(dim))
	if s.Shadow().Train(head, keys, dim); trained(head) {
		t.Error("a codebook was trained on nothing")
	}
}

// TestHugeKeys: keys whose squares are beyond float32 do no harm.
func TestHugeKeys(t *testing.T) {
	t.Parallel()
	const dim, length = 8, 100
	keys := slices.Repeat([]float32{1e30, -1e30}, length*dim/2)
	s := Default().New()
	row := &selector.Row{
		Queries: [][]float32{keys[:dim]}, Dim: dim, Len: length, TokenBudget: 3,
		Records: kvtest.Index(s.Shadow(), keys, dim, 0),
	}
	if got := s.Select(nil, row); len(got) != 3 {
		t.Errorf("selected %v, want 3", got)
	}
}

// TestCoverage: the published codes find most of what there is to find in a quarter of real rows
// (oracle_topk: .981, at worst .85).
func TestCoverage(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		partitions          int
		mean, worst, recall float64
	}{{2, .955, .65, .92}, {4, .96, .7, .93}} {
		got := selectortest.Cover(t, &Config{TokenBudget: 1024, SparsityRate: -1, Partitions: test.partitions, Bits: 6}, 0)
		if got.Mean < test.mean || got.Worst < test.worst || got.Recall < test.recall || got.Candidates != 1024 {
			t.Errorf("%d parts: %+v, want a mean of %v, at worst %v, and a recall of %v with 1024 candidates",
				test.partitions, got, test.mean, test.worst, test.recall)
		}
	}
}

func TestFits(t *testing.T) {
	t.Parallel()
	for m, want := range map[int]bool{1: true, 3: true, 4: false} {
		err := (&Config{TokenBudget: 1, SparsityRate: -1, Partitions: m, Bits: 6}).New().(selector.Fitter).Fits(0, &kv.Geometry{KDim: 3})
		var f *fault.Error
		if (err == nil) != want || err != nil && (!errors.As(err, &f) || f.Field != "partitions") {
			t.Errorf("%d parts of 3 channels: error %v", m, err)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for field, bad := range map[string][]Config{
		"token_budget":  {{0, -1, 2, 6}},
		"sparsity_rate": {{1, 2, 2, 6}},
		"partitions":    {{1, -1, 0, 6}, {1, -1, maxPartitions + 1, 6}},
		"bits":          {{1, -1, 2, 0}, {1, -1, 2, 9}},
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
	const dim, length = 128, 1000
	keys := make([]float32, length*dim)
	for i := range keys {
		keys[i] = float32(i % 11)
	}
	s := Default().New()
	shadow := s.Shadow()
	row := &selector.Row{
		Queries: [][]float32{keys[:dim], keys[dim : 2*dim]}, Dim: dim, Len: length, TokenBudget: 300,
		Records: kvtest.Index(shadow, keys, dim, 0), PinFirst: true,
	}
	var dst []int32
	kvtest.NoAllocation(t, func() { dst = s.Select(dst[:0], row) })
	chunk := make([]byte, shadow.ChunkBytes(dim))
	kvtest.NoAllocation(t, func() { shadow.Index(row.Records.Head(), chunk, keys, dim, 0xffff, 0xffff) })
}
