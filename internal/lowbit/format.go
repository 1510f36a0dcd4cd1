package lowbit

import (
	"math"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/simd"
	"github.com/twilight-sidecar/twilight/kv"
)

// Format says how vectors are quantised. A chunk record holds the parameters of its kv.ChunkTokens
// vectors, then their codes.
type Format struct {
	Bits      int // of a code: 2, 4 or 8
	Symmetric bool
}

// CheckBits reports a width that is none of 2, 4 and 8 bits, as a fault of the key quant_bit.
func CheckBits(bits int) error {
	switch bits {
	case 2, 4, 8:
		return nil
	}
	return fault.Newf(fault.Invalid, "quant_bit", "quant_bit is %d, expected 2, 4 or 8", bits)
}

// ChunkBytes is the size of a chunk record of vectors of dim elements.
func (f Format) ChunkBytes(dim int) int { return kv.ChunkTokens * (f.paramBytes() + f.codeBytes(dim)) }

// params is how many fp16 parameters a vector has.
func (f Format) params() int {
	if f.Symmetric {
		return 1
	}
	return 2
}

func (f Format) paramBytes() int { return f.params() * kv.F16.Size() }

func (f Format) codeBytes(dim int) int { return simd.CodeBytes(f.Bits, dim) }

// top is the largest code.
func (f Format) top() float32 {
	if f.Symmetric {
		return float32(int(1)<<f.Bits - 2)
	}
	return float32(int(1)<<f.Bits - 1)
}

// zeroOf is a symmetric format's zero.
func (f Format) zeroOf(scale float32) float32 { return -f.top() / 2 * scale }

// Put stores the vector of token t of a chunk. It overwrites the vector.
func (f Format) Put(chunk []byte, t int, vector []float32) {
	params, codes := f.of(chunk, t, 1, len(vector))
	low, high := vek32.Min(vector), vek32.Max(vector)
	if f.Symmetric {
		high = max(high, -low)
		low = -high
	}
	stored := [2]float32{(high - low) / f.top(), low}
	if !isFinite(vek32.Sum(vector)) {
		stored[0] = float32(math.NaN())
	}
	kv.F16.Encode(params, stored[:f.params()])
	kv.F16.Decode(stored[:f.params()], params)
	scale, zero := stored[0], stored[1]
	if f.Symmetric {
		zero = f.zeroOf(scale)
	}
	if !(scale > 0) || !isFinite(scale) || !isFinite(zero) {
		clear(codes) // all elements alike, as far as fp16 can tell, or lost
		return
	}
	vek32.SubNumber_Inplace(vector, zero)
	vek32.MulNumber_Inplace(vector, 1/scale)
	vek32.AddNumber_Inplace(vector, .5) // truncated below
	vek32.MaximumNumber_Inplace(vector, 0)
	vek32.MinimumNumber_Inplace(vector, f.top())
	pack(codes, vector, f.Bits)
}

// of returns the parameters and the codes of n tokens of a chunk, from token t on.
func (f Format) of(chunk []byte, t, n, dim int) (params, codes []byte) {
	size := f.codeBytes(dim)
	return chunk[t*f.paramBytes():][:n*f.paramBytes()], chunk[kv.ChunkTokens*f.paramBytes()+t*size:][:n*size]
}

// at returns those of n positions from one on, within a chunk.
func (f Format) at(records kv.Records, position int32, n, dim int) (params, codes []byte) {
	chunk, t := uint32(position)/kv.ChunkTokens, uint32(position)%kv.ChunkTokens
	return f.of(records.Chunk(int(chunk)), int(t), n, dim)
}

// Dots writes queries[n].vector(positions[i]) + constants[n] to out[n][i]. queries is [len(constants)][dim], and
// positions ascend.
func (f Format) Dots(out [][]float32, queries, constants []float32, records kv.Records, positions []int32) {
	dim := len(queries) / len(constants)
	for from := 0; from < len(out); from += simd.Most {
		to := min(from+simd.Most, len(out))
		asked := simd.NewCodeQueries(f.Bits, queries[from*dim:to*dim], constants[from:to])
		f.dots(out[from:to], &asked, records, positions, dim)
	}
}

// ahead is for how many positions from the one it works on dots asks memory.
const ahead = 4 * kv.ChunkTokens

// found are vectors that adjoin.
type found struct{ params, codes []byte }

func (f Format) dots(out [][]float32, asked *simd.CodeQueries, records kv.Records, positions []int32, dim int) {
	var pairs [2 * kv.ChunkTokens]float32
	var ring [ahead]found
	first, end, next := 0, 0, 0 // of the ring, and the position behind it
	for at := 0; at < len(positions); first++ {
		var codes []byte
		for next < min(at+ahead, len(positions)) {
			simd.Fetch(codes)
			n := run(positions[next:])
			next += n
			r := &ring[end%ahead]
			r.params, r.codes = f.at(records, positions[next-n], n, dim)
			end++
			simd.Fetch(r.params)
			codes = r.codes
		}
		r := &ring[first%ahead]
		n := len(r.params) / f.paramBytes()
		f.decode(pairs[:2*n], r.params)
		asked.Dots(out, at, r.codes, pairs[:2*n], codes)
		if len(codes) > len(r.codes) {
			simd.Fetch(codes[len(r.codes):])
		}
		at += n
	}
}

// run is how many of the positions, from the first on, are adjacent and within a chunk.
func run(positions []int32) int {
	first := positions[0]
	n := min(kv.ChunkTokens-int(uint32(first)%kv.ChunkTokens), len(positions))
	if positions[n-1] == first+int32(n-1) {
		return n
	}
	for n = 1; positions[n] == first+int32(n); n++ {
	}
	return n
}

// decode restores scales and zeros, in pairs.
func (f Format) decode(params []float32, stored []byte) {
	if !f.Symmetric {
		simd.Decode(simd.F16, params, stored)
		return
	}
	n := len(params) / 2
	kv.F16.Decode(params[:n], stored)
	for i := n - 1; i >= 0; i-- {
		scale := params[i]
		params[2*i], params[2*i+1] = scale, f.zeroOf(scale)
	}
}

func isFinite(f float32) bool { return f-f == 0 }
