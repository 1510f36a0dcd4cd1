package quest

import (
	"encoding/binary"
	"math"
	"math/bits"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// extremes is the shadow: for each chunk the channels' largest values, then their smallest, both fp16
// rounded outwards.
type extremes struct{}

func (extremes) HeadBytes(int) int                  { return 0 }
func (extremes) ChunkBytes(dim int) int             { return 4 * dim }
func (extremes) TrainLevels() []int                 { return nil }
func (extremes) Train(_ []byte, _ []float32, _ int) {}

// block is how many channels are worked on at once: few enough for the stack.
const block = 64

func (extremes) Index(_, chunk []byte, keys []float32, dim int, valid, _ uint16) (drifted bool) {
	var largest, smallest [block]float32
	for from := 0; from < dim; from += block {
		n := min(block, dim-from)
		high, low := largest[:n], smallest[:n]
		finite := true
		for i, left := 0, valid; left != 0; i, left = i+1, left&(left-1) {
			key := keys[bits.TrailingZeros16(left)*dim+from:][:n]
			finite = finite && isFinite(vek32.Sum(key))
			if i == 0 {
				copy(high, key)
				copy(low, key)
				continue
			}
			vek32.Maximum_Inplace(high, key)
			vek32.Minimum_Inplace(low, key)
		}
		if !finite {
			high[0] = float32(math.Inf(1)) // one channel spoils the bound for good
		}
		encodeOutwards(chunk[2*from:], high, 1)
		encodeOutwards(chunk[2*(dim+from):], low, -1)
	}
	return false
}

// encodeOutwards stores up to a block of values as fp16: the nearest or, where that lies against the
// direction, the next one in it.
func encodeOutwards(dst []byte, values []float32, direction float32) {
	var stored [block]float32
	kv.F16.Encode(dst, values)
	kv.F16.Decode(stored[:len(values)], dst)
	for i, want := range values {
		if (want-stored[i])*direction > 0 {
			half := dst[2*i:]
			binary.LittleEndian.PutUint16(half, next(binary.LittleEndian.Uint16(half), direction))
		}
	}
}

// next returns the fp16 number that follows a finite or infinite one in the direction, up if positive.
func next(half uint16, direction float32) uint16 {
	const sign = 1 << 15
	if (half&sign == 0) == (direction > 0) {
		return half + 1 // away from zero
	}
	if half&^sign == 0 {
		return half ^ sign | 1 // through zero
	}
	return half - 1
}
