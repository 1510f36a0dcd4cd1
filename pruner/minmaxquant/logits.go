package minmaxquant

import (
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pruner"
)

const (
	block  = 64 // tokens unpacked at a time: they stay in the first cache for all queries
	spare  = 3  // codes that the last byte of a token may hold beyond its channels
	params = paramBytes / 2
)

// Logits implements pruner.Estimator.
func (e estimator) Logits(logits [][]float32, row *pruner.Row, positions []int32) {
	dim, heads := row.Dim, len(row.Queries)
	f32 := slices.Grow(row.Scratch[:0], (3+heads)*dim+2*heads+block*dim+spare)
	row.Scratch = f32
	take := func(n int) []float32 {
		f32 = f32[:n]
		taken := f32[:n:n]
		f32 = f32[n:]
		return taken
	}

	// Equalisation moves into the query: q' = q*s, and q.mean is a constant.
	mean, s, reach := take(dim), take(dim), take(dim)
	folded, sums, constants := take(heads*dim), take(heads), take(heads)
	clear(constants)
	if e.shadow.equalize {
		readHead(mean, s, reach, row.Records.Head())
	}
	for h, query := range row.Queries {
		q := folded[h*dim:][:dim]
		copy(q, query)
		if e.shadow.equalize {
			constants[h] = vek32.Dot(query, mean)
			vek32.Mul_Inplace(q, s)
		}
		sums[h] = vek32.Sum(q)
	}

	codes := take(block*dim + spare)
	var scales, zeros [block]float32
	at := 0
	for some := range slices.Chunk(positions, block) {
		e.shadow.read(codes, &scales, &zeros, row.Records, some, dim)
		for h := range heads {
			out := logits[h][at:][:len(some)]
			vek32.MatMul_Into(out, codes[:len(some)*dim], folded[h*dim:][:dim], dim)
			for i, dot := range out {
				out[i] = scales[i]*dot + (zeros[i]*sums[h] + constants[h])
			}
		}
		at += len(some)
	}
}

// read unpacks the codes [len(positions)][dim], scales and zeros of up to a block of positions.
func (s shadow) read(codes []float32, scales, zeros *[block]float32, records kv.Records, positions []int32, dim int) {
	size := s.codeBytes(dim)
	var header [kv.ChunkTokens * params]float32
	var record []byte
	current := -1
	for i, p := range positions {
		chunk, token := int(p)/kv.ChunkTokens, int(p)%kv.ChunkTokens
		if chunk != current {
			record, current = records.Chunk(chunk), chunk
			kv.F16.Decode(header[:], record)
		}
		scales[i], zeros[i] = header[params*token], header[params*token+1]
		// Spare codes spill over the next token's place, which is written after.
		unpack(codes[i*dim:], record[headerSize+token*size:][:size], s.bits)
	}
}
