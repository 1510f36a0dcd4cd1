package lowbit

import (
	"math"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/internal/fault"
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

func (f Format) codeBytes(dim int) int { return (dim*f.Bits + 7) / 8 }

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
	params, codes := f.split(chunk, t, len(vector))
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

// split returns the parameters and the codes of token t.
func (f Format) split(chunk []byte, t, dim int) (params, codes []byte) {
	size := f.codeBytes(dim)
	return chunk[t*f.paramBytes():][:f.paramBytes()], chunk[kv.ChunkTokens*f.paramBytes()+t*size:][:size]
}

const (
	block = 64 // vectors unpacked at a time: they stay in the first cache for all queries
	spare = 3  // codes that the last byte of a vector may hold beyond its elements
)

// ScratchFloats is how much scratch Dots needs.
func ScratchFloats(queries, dim int) int { return queries + block*dim + spare }

// Dots writes queries[n].vector(positions[i]) + constants[n] to out[n][i]. queries is [len(out)][dim],
// constants [len(out)], and positions ascend.
func (f Format) Dots(
	out [][]float32, queries, constants []float32,
	records kv.Records, positions []int32, dim int, scratch []float32,
) {
	sums, codes := scratch[:len(out)], scratch[len(out):ScratchFloats(len(out), dim)]
	for n := range out {
		sums[n] = vek32.Sum(queries[n*dim:][:dim])
	}
	var scales, zeros [block]float32
	for at := 0; at < len(positions); at += block {
		some := positions[at:min(at+block, len(positions))]
		f.read(codes, &scales, &zeros, records, some, dim)
		for n := range out {
			dots := out[n][at:][:len(some)]
			vek32.MatMul_Into(dots, codes[:len(some)*dim], queries[n*dim:][:dim], dim)
			sum, constant := sums[n], constants[n]
			for i, dot := range dots {
				dots[i] = scales[i]*dot + (zeros[i]*sum + constant)
			}
		}
	}
}

// read unpacks the codes [len(positions)][dim], scales and zeros of up to a block of positions.
func (f Format) read(
	codes []float32, scales, zeros *[block]float32, records kv.Records, positions []int32, dim int,
) {
	var header [2 * kv.ChunkTokens]float32
	params := f.params()
	var record []byte
	current := -1
	for i, p := range positions {
		chunk, token := int(p)/kv.ChunkTokens, int(p)%kv.ChunkTokens
		if chunk != current {
			record, current = records.Chunk(chunk), chunk
			kv.F16.Decode(header[:kv.ChunkTokens*params], record)
		}
		scales[i] = header[params*token]
		if f.Symmetric {
			zeros[i] = f.zeroOf(scales[i])
		} else {
			zeros[i] = header[params*token+1]
		}
		_, packed := f.split(record, token, dim)
		// Spare codes spill over the next vector's place, which is written after.
		unpack(codes[i*dim:], packed, f.Bits)
	}
}

func isFinite(f float32) bool { return f-f == 0 }
