package ds

import (
	"encoding/binary"
	"math/bits"
	"sync"

	"github.com/twilight-sidecar/twilight/internal/lowbit"
)

// labels is the shadow. A chunk record holds the tokens' labels. A head record says which channels they
// are made of, r uint16: the channel plus 1, so that zeros stand for a head that nobody set up.
type labels struct {
	r      int
	format lowbit.Format
	lists  map[int][][]uint16 // by layer, KV head
}

// list returns the channels of a head, nil if there are none.
func (l labels) list(layer, kvHead int) []uint16 {
	if heads := l.lists[layer]; kvHead < len(heads) {
		return heads[kvHead]
	}
	return nil
}

func (l labels) HeadBytes(int) int                { return 2 * l.r }
func (l labels) ChunkBytes(int) int               { return l.format.ChunkBytes(l.r) }
func (labels) TrainLevels() []int                 { return nil }
func (labels) Train(_ []byte, _ []float32, _ int) {}

// Seed writes the head record that a (layer, KV head) of keys of dim elements starts with.
func (l labels) Seed(head []byte, layer, kvHead, dim int) {
	list := l.list(layer, kvHead)
	for _, channel := range list {
		if int(channel) >= dim {
			return
		}
	}
	for i, channel := range list {
		binary.LittleEndian.PutUint16(head[2*i:], channel+1)
	}
}

// seeded says whether a head record is set up.
func seeded(head []byte) bool { return binary.LittleEndian.Uint16(head) != 0 }

// buffers hold a label each; shadows keep no state of their own.
var buffers = sync.Pool{New: func() any { return new([]float32) }}

func (l labels) Index(head, chunk []byte, keys []float32, dim int, _, fresh uint16) (drifted bool) {
	if !seeded(head) {
		return false
	}
	pooled := buffers.Get().(*[]float32)
	defer buffers.Put(pooled)
	if cap(*pooled) < l.r {
		*pooled = make([]float32, l.r)
	}
	label := (*pooled)[:l.r]
	for left := fresh; left != 0; left &= left - 1 {
		t := bits.TrailingZeros16(left)
		key := keys[t*dim:][:dim]
		for i := range label {
			label[i] = key[binary.LittleEndian.Uint16(head[2*i:])-1]
		}
		l.format.Put(chunk, t, label)
	}
	return false
}
