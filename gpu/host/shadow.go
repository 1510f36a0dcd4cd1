package host

import (
	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
)

// shadow holds one method's records of a cache: for each (layer, KV head) a head record and, in another
// block, a chunk record for each chunk id. Layers that are skipped have none.
type shadow struct {
	method                kv.Shadow
	dim                   int
	headBytes, chunkBytes int
	heads, chunks         int
	layers                []layer
	headData, chunkData   []byte

	trainLevels []int
	trained     []int // by layer: the level its head records were trained at, 0 before the first
}

// recordBytes is what a method's records take: those of a (layer, KV head), and of a chunk in it.
func recordBytes(method kv.Shadow, dim int) (head, chunk int) {
	if method == nil {
		return 0, 0
	}
	return method.HeadBytes(dim), method.ChunkBytes(dim)
}

// indexed counts the layers that are not skipped.
func indexed(layers []layer) (n int) {
	for i := range layers {
		if layers[i].slot != noSlot {
			n++
		}
	}
	return n
}

// carve makes a method's shadow from the front of arena and returns the rest. It is nil for no method.
func carve(method kv.Shadow, g *kv.Geometry, layers []layer, chunks int, arena []byte) (*shadow, []byte) {
	if method == nil {
		return nil, arena
	}
	s := &shadow{
		method: method, dim: g.KDim, heads: g.KVHeads, chunks: chunks, layers: layers,
		trainLevels: method.TrainLevels(), trained: make([]int, g.Layers),
	}
	s.headBytes, s.chunkBytes = recordBytes(method, g.KDim)
	heads := indexed(layers) * g.KVHeads
	cut := heads * s.headBytes
	s.headData, arena = arena[:cut], arena[cut:]
	cut = heads * chunks * s.chunkBytes
	s.chunkData, arena = arena[:cut], arena[cut:]
	for i := range layers {
		if layers[i].slot != noSlot {
			s.seed(i)
		}
	}
	return s, arena
}

func (s *shadow) head(layer, head int) []byte {
	at := (s.layers[layer].slot*s.heads + head) * s.headBytes
	return s.headData[at:][:s.headBytes:s.headBytes]
}

func (s *shadow) chunk(layer, head int, id int32) []byte {
	at := ((s.layers[layer].slot*s.heads+head)*s.chunks + int(id)) * s.chunkBytes
	return s.chunkData[at:][:s.chunkBytes:s.chunkBytes]
}

// records points r at the records of a (layer, KV head) for a sequence whose chunk c has id ids[c]. It
// returns nil if s is or the layer is skipped.
func (s *shadow) records(r *records, layer, head int, ids []int32) kv.Records {
	if s == nil || s.layers[layer].slot == noSlot {
		return nil
	}
	at := (s.layers[layer].slot*s.heads + head) * s.chunks * s.chunkBytes
	*r = records{
		head:   s.head(layer, head),
		chunks: s.chunkData[at:][:s.chunks*s.chunkBytes],
		bytes:  s.chunkBytes,
		ids:    ids,
	}
	return r
}

// level is the training level that a sequence of n valid tokens reaches.
func (s *shadow) level(n int) int {
	reached := 0
	for _, level := range s.trainLevels {
		if level <= n {
			reached = level
		}
	}
	return reached
}

// seed sets up a layer's head records, which are zeros, where the method wants that.
func (s *shadow) seed(layer int) {
	seeder, ok := s.method.(kv.Seeder)
	if !ok {
		return
	}
	for head := range s.heads {
		seeder.Seed(s.head(layer, head), s.layers[layer].model, head, s.dim)
	}
}

// forget unlearns a layer's training.
func (s *shadow) forget(layer int) {
	s.trained[layer] = 0
	for head := range s.heads {
		clear(s.head(layer, head))
	}
	s.seed(layer)
}

// records implements kv.Records.
type records struct {
	head, chunks []byte // the head record, and chunk records by chunk id
	bytes        int    // of a chunk record
	ids          []int32
}

var _ kv.Records = (*records)(nil)

func (r *records) Head() []byte { return r.head }

func (r *records) Chunk(c int) []byte {
	at := int(r.ids[c]) * r.bytes
	return r.chunks[at:][:r.bytes:r.bytes]
}

// newArena takes zeroed memory that costs nothing until it is written, by pieces of up to 2 MiB.
func newArena(size uint64) ([]byte, error) {
	if size == 0 {
		return nil, nil
	}
	arena, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fault.Exhaustedf("num_pages", size, 0,
			"%d bytes of shadow find no place in the daemon's address space: register fewer pages", size)
	}
	// Records lie scattered: in pages of 4 KiB it takes as long to find them as to read them. Where the system
	// has no larger pages to give, it is only slower.
	_ = unix.Madvise(arena, unix.MADV_HUGEPAGE)
	return arena, nil
}

func freeArena(arena []byte) error {
	if arena == nil {
		return nil
	}
	return unix.Munmap(arena)
}
