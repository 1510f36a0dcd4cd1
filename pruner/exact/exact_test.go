package exact

import (
	"math"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

func TestLogits(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		dim := rapid.SampledFrom([]int{1, 3, 64, 80, 96, 128}).Draw(t, "dim")
		length := rapid.IntRange(1, 300).Draw(t, "length")
		row := &pruner.Row{Dim: dim, Queries: make([][]float32, rapid.SampledFrom([]int{1, 3, 7}).Draw(t, "heads"))}
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		draw := func(n int) []float32 {
			x := make([]float32, n)
			for i := range x {
				x[i] = float32(random.NormFloat64())
			}
			return x
		}
		keys := draw(length * dim)
		row.Keys = kvtest.Reader(kv.F32, keys, dim)
		var positions []int32
		for p := range length {
			if random.IntN(3) > 0 {
				positions = append(positions, int32(p))
			}
		}
		logits := make([][]float32, len(row.Queries))
		for i := range row.Queries {
			row.Queries[i] = draw(dim)
			logits[i] = make([]float32, len(positions))
		}
		exact{}.Logits(logits, row, positions)
		for i, query := range row.Queries {
			for j, p := range positions {
				want, size := 0.0, 0.0
				for d, q := range query {
					x := float64(q) * float64(keys[int(p)*dim+d])
					want += x
					size += math.Abs(x)
				}
				if got := float64(logits[i][j]); math.Abs(got-want) > 1e-6*size {
					t.Fatalf("query %d, position %d: %v, want %v", i, p, got, want)
				}
			}
		}
	})
}

func TestNoAllocation(t *testing.T) {
	const dim = 64
	keys := make([]float32, 500*dim)
	row := &pruner.Row{Queries: [][]float32{keys[:dim]}, Dim: dim, Keys: kvtest.Reader(kv.F16, keys, dim)}
	positions := make([]int32, 400)
	logits := [][]float32{make([]float32, len(positions))}
	kvtest.NoAllocation(t, func() { exact{}.Logits(logits, row, positions) })
}
