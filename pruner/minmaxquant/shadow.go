package minmaxquant

import (
	"math"
	"math/bits"
	"slices"
	"sync"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// shadow is the keys in few bits. A chunk record holds scale and zero (fp16) of each token, then the
// tokens' codes. A head record holds, in fp32, the channels' means, their s, and their reaches: the
// largest |k - mean| of the keys it was trained on. Zeros stand for an untrained channel.
type shadow struct {
	bits     int
	equalize bool
}

const (
	paramBytes = 4 // scale and zero of a token
	headerSize = kv.ChunkTokens * paramBytes
	// scaleRange is how far the s of a head may lie apart: a channel that hardly varied in training
	// must not take all the codes once it does.
	scaleRange = 16
	// driftFactor times its reach is how far a channel may go before it is reported.
	driftFactor = 4
)

func (s shadow) HeadBytes(dim int) int {
	if !s.equalize {
		return 0
	}
	return 3 * dim * kv.F32.Size()
}

func (s shadow) ChunkBytes(dim int) int { return headerSize + kv.ChunkTokens*s.codeBytes(dim) }

func (s shadow) codeBytes(dim int) int { return (dim*s.bits + 7) / 8 }

func (s shadow) TrainLevels() []int {
	if !s.equalize {
		return nil
	}
	return []int{16, 64, 256, 1024, 4096}
}

// Train implements kv.Shadow. A channel whose keys are not all finite is taken for constantly 0.
func (s shadow) Train(head []byte, keys []float32, dim int) {
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
func (s shadow) Index(head, chunk []byte, keys []float32, dim int, _, fresh uint16) (drifted bool) {
	pooled := buffers.Get().(*[]float32)
	defer buffers.Put(pooled)
	if cap(*pooled) < 5*dim {
		*pooled = make([]float32, 5*dim)
	}
	at := func(i int) []float32 { return (*pooled)[i*dim : (i+1)*dim] }
	mean, inverse, limit, key, beyond := at(0), at(1), at(2), at(3), at(4)

	if s.equalize {
		readHead(mean, inverse, limit, head)
		for d, reach := range limit {
			// Keys are compared as k' = (k - mean)/s.
			limit[d] = driftFactor * max(reach/inverse[d], inverse[d])
			// Division by vek32 is only nearly exact, and not the same on all machines.
			inverse[d] = 1 / inverse[d]
		}
	}
	size := s.codeBytes(dim)
	for left := fresh; left != 0; left &= left - 1 {
		t := bits.TrailingZeros16(left)
		copy(key, keys[t*dim:])
		if s.equalize {
			vek32.Sub_Inplace(key, mean)
			vek32.Mul_Inplace(key, inverse)
			vek32.Abs_Into(beyond, key)
			vek32.Sub_Inplace(beyond, limit)
			drifted = drifted || vek32.Max(beyond) > 0
		}
		s.quantise(chunk[headerSize+t*size:][:size], chunk[t*paramBytes:][:paramBytes], key)
	}
	return drifted
}

// quantise stores a key as codes, scale and zero. It overwrites the key.
func (s shadow) quantise(codes, params []byte, key []float32) {
	top := float32(int(1)<<s.bits - 1)
	low, high := vek32.Min(key), vek32.Max(key)
	stored := [2]float32{(high - low) / top, low}
	if !isFinite(vek32.Sum(key)) {
		stored[0] = float32(math.NaN())
	}
	kv.F16.Encode(params, stored[:])
	kv.F16.Decode(stored[:], params)
	scale, zero := stored[0], stored[1]
	if !(scale > 0) || !isFinite(scale) || !isFinite(zero) {
		clear(codes) // all channels alike, as far as fp16 can tell, or lost
		return
	}
	vek32.SubNumber_Inplace(key, zero)
	vek32.MulNumber_Inplace(key, 1/scale)
	vek32.AddNumber_Inplace(key, .5) // truncated below
	vek32.MaximumNumber_Inplace(key, 0)
	vek32.MinimumNumber_Inplace(key, top)
	pack(codes, key, s.bits)
}

func isFinite(f float32) bool { return f-f == 0 }
