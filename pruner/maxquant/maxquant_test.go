package maxquant

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/kvtest"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

// TestLogits compares with the formula.
func TestLogits(t *testing.T) {
	t.Parallel()
	const dim, length = 48, 300
	random := rand.New(rand.NewPCG(5, 6))
	keys, query := make([]float32, length*dim), make([]float32, dim)
	for i := range keys {
		keys[i] = float32(random.NormFloat64())
		if i%dim == 7 {
			keys[i] += 10
		}
	}
	for d := range query {
		query[d] = float32(random.NormFloat64())
	}
	for _, config := range []Config{{2, false}, {4, false}, {8, false}, {2, true}, {4, true}, {8, true}} {
		e := config.New()
		if e.Exact() {
			t.Fatal("it claims to be exact")
		}
		mean := make([]float32, dim) // of the first 256
		if config.SmoothK {
			for d := range mean {
				sum := 0.0
				for p := range 256 {
					sum += float64(keys[p*dim+d])
				}
				mean[d] = float32(sum / 256)
			}
		}
		row := &pruner.Row{Queries: [][]float32{query}, Dim: dim, Records: kvtest.Index(e.Shadow(), keys, dim, 0)}
		top := math.Pow(2, float64(config.QuantBit-1)) - 1
		for p := range length {
			largest := 0.0
			for d, m := range mean {
				largest = max(largest, math.Abs(float64(keys[p*dim+d]-m)))
			}
			scale := half(largest / top)
			// The next code either way would be a different estimate; rounding decides what is
			// halfway.
			want, halfway := 0.0, 0.0
			for d, m := range mean {
				code := float64(keys[p*dim+d]-m) / scale
				rounded := max(-top, min(top, math.Round(code)))
				want += float64(query[d]) * (scale*rounded + float64(m))
				if math.Abs(math.Abs(code-math.Trunc(code))-.5) < 1e-4 {
					halfway += math.Abs(float64(query[d])) * scale
				}
			}
			got := [][]float32{{0}}
			e.Logits(got, row, []int32{int32(p)})
			if x := float64(got[0][0]); !(math.Abs(x-want) <= 1e-3+halfway) {
				t.Fatalf("%+v, position %d: %v, want %v", config, p, x, want)
			}
		}
	}
}

func half(x float64) float64 {
	var b [2]byte
	var y [1]float32
	kv.F16.Encode(b[:], []float32{float32(x)})
	kv.F16.Decode(y[:], b[:])
	return float64(y[0])
}

// TestMemory: what doc.go says a token and a head take.
func TestMemory(t *testing.T) {
	t.Parallel()
	const dim = 128
	for _, config := range []Config{{2, false}, {4, true}, {8, true}} {
		s := config.New().Shadow()
		head := 0
		if config.SmoothK {
			head = 12 * dim
		}
		if got, want := s.ChunkBytes(dim), kv.ChunkTokens*(config.QuantBit*dim/8+2); got != want || s.HeadBytes(dim) != head {
			t.Errorf("%+v: %d bytes a chunk and %d a head, want %d and %d", config, got, s.HeadBytes(dim), want, head)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := Method().Default().Validate(); err != nil {
		t.Errorf("default: %v", err)
	}
	for _, bits := range []int{-4, 0, 1, 3, 5, 16} {
		var f *fault.Error
		if err := (&Config{QuantBit: bits}).Validate(); !errors.As(err, &f) || f.Field != "quant_bit" {
			t.Errorf("%d bits: error %v, want one about quant_bit", bits, err)
		}
	}
}
