// Package kvtest makes small caches and shadows for tests of methods.
package kvtest

import (
	"testing"

	"github.com/viterin/vek"

	"github.com/twilight-sidecar/twilight/kv"
)

// NoAllocation fails the test if f, once warm, allocates. It must not run in parallel with others.
func NoAllocation(t *testing.T, f func()) {
	t.Helper()
	if !vek.Info().Acceleration {
		t.Skip("without AVX2 vek32 itself allocates")
	}
	if n := testing.AllocsPerRun(10, f); n != 0 {
		t.Errorf("%v allocations a run, want none", n)
	}
}

// Reader stores values [n][dim] as dtype in pages of its own, one after another, and reads them.
func Reader(dtype kv.DType, values []float32, dim int) kv.Reader {
	const pageSize = 16
	token := dim * dtype.Size()
	pages := (len(values)/dim + pageSize - 1) / pageSize
	plane := &kv.Plane{
		Data:        make([]byte, pages*pageSize*token),
		PageStride:  pageSize * token,
		TokenStride: token,
		PageSize:    pageSize,
		DType:       dtype,
		Dim:         dim,
	}
	dtype.Encode(plane.Data, values)
	table := make([]int32, pages)
	for i := range table {
		table[i] = int32(i)
	}
	return plane.Reader(table, 0)
}

// Records is a shadow of one KV head of one sequence. The zero value holds nothing.
type Records struct {
	head   []byte
	chunks [][]byte
	// Drifted counts the calls of Index that reported drift.
	Drifted int
}

// Head implements kv.Records.
func (r *Records) Head() []byte { return r.head }

// Chunk implements kv.Records.
func (r *Records) Chunk(c int) []byte { return r.chunks[c] }

// Index makes the shadow of keys [length][dim], valid from first on: trained at the highest level
// reached, then indexed chunk by chunk. It returns nil if shadow is nil.
func Index(shadow kv.Shadow, keys []float32, dim, first int) *Records {
	if shadow == nil {
		return nil
	}
	r := &Records{head: make([]byte, shadow.HeadBytes(dim))}
	length := len(keys) / dim
	for _, level := range shadow.TrainLevels() {
		if level <= length-first {
			shadow.Train(r.head, keys[first*dim:(first+level)*dim], dim)
		}
	}
	for c := 0; c*kv.ChunkTokens < length; c++ {
		r.chunks = append(r.chunks, make([]byte, shadow.ChunkBytes(dim)))
		if valid := Valid(c, first, length); valid != 0 {
			r.Update(shadow, keys, dim, c, valid, valid)
		}
	}
	return r
}

// Update indexes chunk c anew from keys [length][dim]. What lies past the keys is poisoned.
func (r *Records) Update(shadow kv.Shadow, keys []float32, dim, c int, valid, fresh uint16) {
	chunk := make([]float32, kv.ChunkTokens*dim)
	for i := range chunk {
		chunk[i] = 1e30
	}
	copy(chunk, keys[c*kv.ChunkTokens*dim:])
	if shadow.Index(r.head, r.chunks[c], chunk, dim, valid, fresh) {
		r.Drifted++
	}
}

// Valid masks the tokens of chunk c that lie in [first, length).
func Valid(c, first, length int) uint16 {
	var mask uint16
	for i := range kv.ChunkTokens {
		if p := c*kv.ChunkTokens + i; first <= p && p < length {
			mask |= 1 << i
		}
	}
	return mask
}
