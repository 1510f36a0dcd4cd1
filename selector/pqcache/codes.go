package pqcache

import (
	"encoding/binary"
	"math/bits"
	"sync"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// codes is the shadow: m codes of b bits a token.
//
// A head record holds 1 once it is trained (uint32), then for each part its centroids, [channels of the
// part][2^b], and half the square of each one's norm, [2^b], fp32. A chunk record holds which of its tokens
// are not finite (a bit each), then the tokens' codes, a byte each.
type codes struct{ m, b int }

const (
	trainedBytes = 4
	lostBytes    = 2
)

// bookFloats is how many floats the centroids and their norms are.
func (c codes) bookFloats(dim int) int { return (dim + c.m) << c.b }

func (c codes) HeadBytes(dim int) int { return trainedBytes + c.bookFloats(dim)*kv.F32.Size() }
func (c codes) ChunkBytes(int) int    { return lostBytes + kv.ChunkTokens*c.m }
func (c codes) TrainLevels() []int    { return []int{1 << c.b, 4 << c.b, 16 << c.b, 64 << c.b} }

// parts is how many parts keys have, each of some channels: m, unless there are fewer channels.
func (c codes) parts(dim int) int { return min(c.m, dim) }

// part returns the channels of part i, [from, to).
func (c codes) part(i, dim int) (from, to int) {
	m := c.parts(dim)
	return i * dim / m, (i + 1) * dim / m
}

func trained(head []byte) bool { return binary.LittleEndian.Uint32(head) == 1 }

// book decodes the centroids and norms of a trained head record into floats.
func (c codes) book(floats []float32, head []byte, dim int) []float32 {
	book := floats[:c.bookFloats(dim)]
	kv.F32.Decode(book, head[trainedBytes:])
	return book
}

// split cuts part i's centroids and norms from a book.
func (c codes) split(book []float32, i, dim int) (centroids, norms []float32) {
	from, to := c.part(i, dim)
	part := book[(from+i)<<c.b : (to+i+1)<<c.b]
	return part[:(to-from)<<c.b], part[(to-from)<<c.b:]
}

// tables writes the products of the query's parts with all centroids, [m][2^b].
func (c codes) tables(tables, query, book []float32) {
	clear(tables)
	for i := range c.parts(len(query)) {
		from, to := c.part(i, len(query))
		centroids, _ := c.split(book, i, len(query))
		multiply(tables[i<<c.b:][:1<<c.b], centroids, query[from:to])
	}
}

// scratch is what training and indexing work in; shadows keep no state of their own.
type scratch struct{ book, products []float32 }

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func (c codes) Index(head, chunk []byte, keys []float32, dim int, _, fresh uint16) (drifted bool) {
	lost := binary.LittleEndian.Uint16(chunk) &^ fresh
	isTrained := trained(head)
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if isTrained {
		if n := c.bookFloats(dim); cap(s.book) < n {
			s.book = make([]float32, n)
		}
		s.book = c.book(s.book[:cap(s.book)], head, dim)
		if cap(s.products) < 1<<c.b {
			s.products = make([]float32, 1<<c.b)
		}
	}
	for left := fresh; left != 0; left &= left - 1 {
		t := bits.TrailingZeros16(left)
		key := keys[t*dim:][:dim]
		own := chunk[lostBytes+t*c.m:][:c.m]
		clear(own)
		switch {
		case !isFinite(vek32.Sum(key)):
			lost |= 1 << t
		case isTrained:
			for i := range c.parts(dim) {
				from, to := c.part(i, dim)
				centroids, norms := c.split(s.book, i, dim)
				own[i] = byte(nearest(s.products[:1<<c.b], centroids, norms, key[from:to]))
			}
		}
	}
	binary.LittleEndian.PutUint16(chunk, lost)
	return false
}

func isFinite(f float32) bool { return f-f == 0 }
