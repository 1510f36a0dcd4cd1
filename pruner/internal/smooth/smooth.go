package smooth

import (
	"math"
	"math/bits"
	"slices"
	"sync"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/lowbit"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

// Smoothing is what happens to keys before they are quantised.
type Smoothing uint8

// The smoothings.
const (
	None     Smoothing = iota
	Centre             // the channels' means are taken off
	Equalise           // and what is left is divided by s
)

// Estimator is an estimator and its own shadow. A chunk record is the format's. A head record holds, in
// fp32, the channels' means, their s, and their reaches: the largest |k - mean| of the keys it was
// trained on. Zeros stand for an untrained channel.
type Estimator struct {
	Format    lowbit.Format
	Smoothing Smoothing
}

var (
	_ kv.Shadow        = Estimator{}
	_ pruner.Estimator = Estimator{}
)

const (
	// scaleRange is how far the s of a head may lie apart: a channel that hardly varied in training
	// must not take all the codes once it does.
	scaleRange = 16
	// driftFactor times its reach is how far a channel may go before it is reported.
	driftFactor = 4
)

// Shadow implements pruner.Estimator.
func (e Estimator) Shadow() kv.Shadow { return e }

// Exact implements pruner.Estimator.
func (Estimator) Exact() bool { return false }

// HeadBytes implements kv.Shadow.
func (e Estimator) HeadBytes(dim int) int {
	if e.Smoothing == None {
		return 0
	}
	return 3 * dim * kv.F32.Size()
}

// ChunkBytes implements kv.Shadow.
func (e Estimator) ChunkBytes(dim int) int { return e.Format.ChunkBytes(dim) }

// TrainLevels implements kv.Shadow.
func (e Estimator) TrainLevels() []int {
	if e.Smoothing == None {
		return nil
	}
	return []int{16, 64, 256, 1024, 4096}
}

// Train implements kv.Shadow. A channel whose keys are not all finite is taken for constantly 0.
func (Estimator) Train(head []byte, keys []float32, dim int) {
	n := float64(len(keys) / dim)
	trained := make([]float32, 3*dim)
	means, scales, reaches := trained[:dim], trained[dim:2*dim], trained[2*dim:]
	for d := range dim {
		sum := 0.0
		for t := d; t < len(keys); t += dim {
			sum += float64(keys[t])
		}
		mean := float32(sum / n)
		square, reach := 0.0, 0.0
		for t := d; t < len(keys); t += dim {
			x := float64(keys[t] - mean)
			square += x * x
			reach = max(reach, math.Abs(x))
		}
		if scale := float32(math.Sqrt(math.Sqrt(square / n))); isFinite(mean) && isFinite(scale) {
			means[d], scales[d], reaches[d] = mean, scale, float32(reach)
		}
	}
	least := slices.Max(scales) / scaleRange
	for d := range scales {
		scales[d] = max(scales[d], least)
	}
	kv.F32.Encode(head, trained)
}

// readHead decodes a head record. An untrained channel has mean 0, s 1 and no limit to its reach.
func readHead(mean, s, reach []float32, head []byte) {
	dim := len(mean)
	kv.F32.Decode(mean, head)
	kv.F32.Decode(s, head[4*dim:])
	kv.F32.Decode(reach, head[8*dim:])
	for d, x := range s {
		if x == 0 {
			s[d], reach[d] = 1, math.MaxFloat32/driftFactor
		}
	}
}

// buffers are what Index works in; shadows keep no state of their own.
var buffers = sync.Pool{New: func() any { return new([]float32) }}

// Index implements kv.Shadow.
func (e Estimator) Index(head, chunk []byte, keys []float32, dim int, _, fresh uint16) (drifted bool) {
	pooled := buffers.Get().(*[]float32)
	defer buffers.Put(pooled)
	if cap(*pooled) < 5*dim {
		*pooled = make([]float32, 5*dim)
	}
	at := func(i int) []float32 { return (*pooled)[i*dim : (i+1)*dim] }
	mean, inverse, limit, key, beyond := at(0), at(1), at(2), at(3), at(4)

	if e.Smoothing != None {
		readHead(mean, inverse, limit, head)
		for d, s := range inverse {
			// Division by vek32 is only nearly exact, and not the same on all machines.
			inverse[d] = 1
			if e.Smoothing == Equalise {
				inverse[d] = 1 / s
			}
			limit[d] = driftFactor * (max(limit[d], s*s) * inverse[d]) // keys are compared as k'
		}
	}
	for left := fresh; left != 0; left &= left - 1 {
		t := bits.TrailingZeros16(left)
		copy(key, keys[t*dim:])
		if e.Smoothing != None {
			vek32.Sub_Inplace(key, mean)
			vek32.Mul_Inplace(key, inverse)
			vek32.Abs_Into(beyond, key)
			vek32.Sub_Inplace(beyond, limit)
			drifted = drifted || vek32.Max(beyond) > 0
		}
		e.Format.Put(chunk, t, key)
	}
	return drifted
}

// Logits implements pruner.Estimator.
func (e Estimator) Logits(logits [][]float32, row *pruner.Row, positions []int32) {
	dim, heads := row.Dim, len(row.Queries)
	f32 := slices.Grow(row.Scratch[:0], (3+heads)*dim+heads)
	row.Scratch = f32
	take := func(n int) []float32 {
		f32 = f32[:n]
		taken := f32[:n:n]
		f32 = f32[n:]
		return taken
	}

	// Smoothing moves into the query: q' = q*s, and q.mean is a constant.
	mean, s, reach := take(dim), take(dim), take(dim)
	if e.Smoothing != None {
		readHead(mean, s, reach, row.Records.Head())
	}
	folded, constants := take(heads*dim), take(heads)
	clear(constants)
	for h, query := range row.Queries {
		q := folded[h*dim:][:dim]
		copy(q, query)
		if e.Smoothing != None {
			constants[h] = vek32.Dot(query, mean)
		}
		if e.Smoothing == Equalise {
			vek32.Mul_Inplace(q, s)
		}
	}
	e.Format.Dots(logits, folded, constants, row.Records, positions)
}

func isFinite(f float32) bool { return f-f == 0 }
