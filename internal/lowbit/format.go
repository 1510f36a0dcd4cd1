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
	block = 256 // vectors worked on at a time
	few   = 4   // queries
)

// ScratchFloats is how much scratch Dots needs.
func ScratchFloats(queries int) int { return queries }

// Dots writes queries[n].vector(positions[i]) + constants[n] to out[n][i]. queries is [len(out)][dim],
// constants [len(out)], and positions ascend.
func (f Format) Dots(
	out [][]float32, queries, constants []float32,
	records kv.Records, positions []int32, dim int, scratch []float32,
) {
	sums := scratch[:len(out)]
	for n := range out {
		sums[n] = vek32.Sum(queries[n*dim:][:dim])
	}
	var b vectors
	for at := 0; at < len(positions); at += block {
		end := min(at+block, len(positions))
		f.locate(&b, records, positions[at:min(end+simd.Ahead, len(positions))], dim)
		fetchParams(records, positions[end:min(end+block, len(positions))])
		for n := 0; n < len(out); n += few {
			some := out[n:min(n+few, len(out))]
			var rows [few][]float32
			for i := range some {
				rows[i] = queries[(n+i)*dim:][:dim]
			}
			simd.Dots(f.codes(), some, at, rows[:len(some)], b.codes[:b.n], end-at)
		}
		for n := range out {
			b.scale(out[n][at:end], sums[n], constants[n])
		}
	}
}

// codes is the type of codes.
func (f Format) codes() simd.Type {
	switch f.Bits {
	case 2:
		return simd.U2
	case 4:
		return simd.U4
	}
	return simd.U8
}

// vectors are a block of vectors and the next ones: their parameters, and where their codes are.
type vectors struct {
	n             int
	params        [2 * (block + simd.Ahead)]float32
	scales, zeros [block + simd.Ahead]float32
	codes         [block + simd.Ahead][]byte
}

// locate finds the vectors of positions, run by run of adjacent ones within a chunk.
func (f Format) locate(b *vectors, records kv.Records, positions []int32, dim int) {
	params, size := f.params(), f.codeBytes(dim)
	b.n = len(positions)
	for i := 0; i < b.n; {
		p := uint32(positions[i])
		record, token := records.Chunk(int(p/kv.ChunkTokens)), int(p%kv.ChunkTokens)
		run := 1
		for run < min(kv.ChunkTokens-token, b.n-i) && uint32(positions[i+run]) == p+uint32(run) {
			run++
		}
		kv.F16.Decode(b.params[i*params:][:run*params], record[token*f.paramBytes():])
		codes := record[kv.ChunkTokens*f.paramBytes()+token*size:]
		for k := range b.codes[i : i+run] {
			b.codes[i+k] = codes[k*size:][:size:size]
		}
		i += run
	}
	for i := range b.scales[:b.n] {
		b.scales[i], b.zeros[i] = b.params[i*params], b.params[i*params+params-1]
	}
	if f.Symmetric {
		vek32.MulNumber_Inplace(b.zeros[:b.n], f.zeroOf(1))
	}
}

// fetchParams asks memory for the parameters of positions. That their codes are fetched does not help: they
// lie apart.
func fetchParams(records kv.Records, positions []int32) {
	chunk := int32(-1)
	for _, p := range positions {
		if c := p / kv.ChunkTokens; c != chunk {
			chunk = c
			simd.Fetch(records.Chunk(int(chunk)))
		}
	}
}

// scale turns products with codes into products with vectors.
func (b *vectors) scale(dots []float32, sum, constant float32) {
	rest := vek32.MulNumber_Into(b.params[:len(dots)], b.zeros[:len(dots)], sum)
	vek32.AddNumber_Inplace(rest, constant)
	vek32.Mul_Inplace(dots, b.scales[:len(dots)])
	vek32.Add_Inplace(dots, rest)
}

func isFinite(f float32) bool { return f-f == 0 }
