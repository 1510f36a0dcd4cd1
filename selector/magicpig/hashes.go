package magicpig

import (
	"encoding/binary"
	"math/bits"
	"slices"
	"sync"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// hashes is the shadow. A head record holds the mean key (fp32). A chunk record holds which of its tokens
// are not finite (a bit each), then each token's hashes, uint16, filled up to whole words.
type hashes struct{ *projector }

const (
	lostBytes = 2
	wordBytes = 8
	perWord   = 4 // hashes in a word
	// filler follows a key's hashes; a query's are followed by 0, which it never equals.
	filler = 1<<15 - 1
)

// words is how many words a token's hashes take.
func (h hashes) words() int { return (h.l + perWord - 1) / perWord }

func (h hashes) HeadBytes(dim int) int { return dim * kv.F32.Size() }
func (h hashes) ChunkBytes(int) int    { return lostBytes + kv.ChunkTokens*h.words()*wordBytes }
func (hashes) TrainLevels() []int      { return []int{16, 64, 256, 1024, 4096} }

// Train implements kv.Shadow. A channel whose keys are not all finite counts as having mean 0.
func (hashes) Train(head []byte, keys []float32, dim int) {
	for d := range dim {
		sum := 0.0
		for t := d; t < len(keys); t += dim {
			sum += float64(keys[t])
		}
		mean := float32(sum / float64(len(keys)/dim))
		if !isFinite(mean) {
			mean = 0
		}
		kv.F32.Encode(head[4*d:], []float32{mean})
	}
}

// scratch is what hashing works in; neither shadow nor selector keep state of their own.
type scratch struct {
	mean, vectors []float32
	codes         []uint16
	words         []uint64
	products      [block]float32
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func (h hashes) Index(head, chunk []byte, keys []float32, dim int, _, fresh uint16) (drifted bool) {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.mean = slices.Grow(s.mean[:0], dim)[:dim]
	kv.F32.Decode(s.mean, head)
	s.vectors = s.vectors[:0]
	lost := binary.LittleEndian.Uint16(chunk) &^ fresh
	for left := fresh; left != 0; left &= left - 1 {
		t := bits.TrailingZeros16(left)
		key := keys[t*dim:][:dim]
		if !isFinite(vek32.Sum(key)) {
			lost |= 1 << t
		}
		at := len(s.vectors)
		s.vectors = append(s.vectors, key...)
		vek32.Sub_Inplace(s.vectors[at:], s.mean)
	}
	binary.LittleEndian.PutUint16(chunk, lost)

	stride := h.words() * perWord
	s.codes = slices.Grow(s.codes[:0], bits.OnesCount16(fresh)*stride)[:bits.OnesCount16(fresh)*stride]
	for i := range s.codes {
		s.codes[i] = filler
	}
	h.hash(s.codes, stride, s.vectors, dim, &s.products)
	codes := s.codes
	for left := fresh; left != 0; left &= left - 1 {
		own := chunk[lostBytes+bits.TrailingZeros16(left)*stride*2:]
		for i, code := range codes[:stride] {
			binary.LittleEndian.PutUint16(own[2*i:], code)
		}
		codes = codes[stride:]
	}
	return false
}

func isFinite(f float32) bool { return f-f == 0 }
