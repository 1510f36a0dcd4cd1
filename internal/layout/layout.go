// Package layout lays KV caches out in memory as engines do and writes tokens into them: what plays an
// engine (tests, replay, the demo) builds its cache with it.
package layout

import (
	"fmt"
	"slices"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/kv"
)

// Kind names the order of a cache's elements, outermost first.
type Kind string

// The layouts that engines use.
const (
	NHD        Kind = "nhd"        // [page][token][head][dim], K and V apart: FlashInfer's NHD
	HND        Kind = "hnd"        // [page][head][token][dim], K and V apart: FlashInfer's HND
	Packed     Kind = "packed"     // [page][token][head][K|V]: vLLM since 0.26
	Slots      Kind = "slots"      // [slot][head][dim], a page a token: SGLang
	Contiguous Kind = "contiguous" // [sequence][head][token][dim], a page a sequence: Hugging Face
)

// Kinds returns all layouts.
func Kinds() []Kind { return []Kind{NHD, HND, Packed, Slots, Contiguous} }

// Parse finds a layout by name.
func Parse(name string) (Kind, error) {
	if k := Kind(name); slices.Contains(Kinds(), k) {
		return k, nil
	}
	return "", fmt.Errorf("layout %q is unknown: use one of %v", name, Kinds())
}

// Config is a cache's shape.
type Config struct {
	Kind                        Kind
	DType                       kv.DType
	Layers, KVHeads, KDim, VDim int

	// The cache has room for Sequences of Tokens tokens each, that is, for each one ceil(Tokens/PageSize)
	// pages of its own.
	Sequences, Tokens int
	// PageSize is in tokens. Slots and Contiguous have their own, 1 and Tokens.
	PageSize int
	// PagePadding bytes, a multiple of the element size, follow each page.
	PagePadding int

	// KScales and VScales are nil, one, or one per KV head: stored value = real value / scale.
	KScales, VScales []float32
}

// Layout is a cache's layout: layers one behind another in one buffer.
type Layout struct {
	Config
	NumPages int
	K, V     gpu.Strides

	v, layer uint64 // from a layer's K to its V, and to the next layer's K
}

// New computes the layout of a cache.
func New(c Config) (*Layout, error) {
	if _, err := Parse(string(c.Kind)); err != nil {
		return nil, err
	}
	if c.Kind == Slots {
		c.PageSize = 1
	}
	if c.Kind == Contiguous {
		c.PageSize = c.Tokens
	}
	if !c.DType.Valid() || min(c.Layers, c.KVHeads, c.KDim, c.VDim, c.Sequences, c.Tokens, c.PageSize) < 1 {
		return nil, fmt.Errorf("cache shape %+v: give a dtype and sizes from 1 on", c)
	}
	if c.PagePadding < 0 || c.PagePadding%c.DType.Size() != 0 {
		return nil, fmt.Errorf("page padding of %d bytes: give a multiple of the element size %d",
			c.PagePadding, c.DType.Size())
	}

	pagesPerSequence := (c.Tokens + c.PageSize - 1) / c.PageSize
	l := &Layout{Config: c, NumPages: c.Sequences * pagesPerSequence}
	k, v := uint64(c.KDim*c.DType.Size()), uint64(c.VDim*c.DType.Size())
	if c.Kind == Packed {
		l.K = l.strides(k + v)
		l.V = l.K
		l.v = k
		l.layer = align(uint64(l.NumPages) * l.K.Page)
		return l, nil
	}
	l.K, l.V = l.strides(k), l.strides(v)
	l.v = align(uint64(l.NumPages) * l.K.Page)
	l.layer = l.v + align(uint64(l.NumPages)*l.V.Page)
	return l, nil
}

// strides are those of a page's elements of vector bytes each.
func (l *Layout) strides(vector uint64) gpu.Strides {
	heads, tokens := uint64(l.KVHeads), uint64(l.PageSize)
	s := gpu.Strides{Page: heads*tokens*vector + uint64(l.PagePadding)}
	switch l.Kind {
	case HND, Contiguous:
		s.Token, s.Head = vector, tokens*vector
	default:
		s.Head, s.Token = vector, heads*vector
	}
	return s
}

// align rounds up to a cache line, so that every dtype finds its alignment.
func align(n uint64) uint64 { return (n + 63) &^ 63 }

// Size is the buffer's size in bytes.
func (l *Layout) Size() uint64 { return uint64(l.Layers) * l.layer }

// KOffset is where the keys of a layer, counted from 0, start in the buffer.
func (l *Layout) KOffset(layer int) uint64 { return uint64(layer) * l.layer }

// VOffset is where the values of a layer start in the buffer.
func (l *Layout) VOffset(layer int) uint64 { return l.KOffset(layer) + l.v }

// Tables deals pages, an order of all page ids (nil: ascending), to the sequences: a table each.
func (l *Layout) Tables(pages []int32) [][]int32 {
	if pages == nil {
		pages = make([]int32, l.NumPages)
		for i := range pages {
			pages[i] = int32(i)
		}
	}
	return slices.Collect(slices.Chunk(pages, l.NumPages/l.Sequences))
}

// Spec describes the cache to a device. The buffer starts at mem's offset; layers carry the numbers 0,
// 1, and so on.
func (l *Layout) Spec(mem gpu.Memory, offset uint64) *gpu.CacheSpec {
	spec := &gpu.CacheSpec{
		DType: l.DType, PageSize: l.PageSize, NumPages: l.NumPages,
		K: l.K, V: l.V, NullPage: -1,
	}
	for i := range l.Layers {
		spec.Layers = append(spec.Layers, gpu.CacheLayer{
			Layer: i,
			K:     gpu.Span{Memory: mem, Offset: offset + l.KOffset(i)}, KScales: l.KScales,
			V: gpu.Span{Memory: mem, Offset: offset + l.VOffset(i)}, VScales: l.VScales,
		})
	}
	return spec
}

// Write stores the tokens [from, to) of a sequence into a layer. k is [KVHeads][N][KDim] and v
// [KVHeads][N][VDim], of the whole sequence; table covers to.
func (l *Layout) Write(buf []byte, layer int, table []int32, k, v []float32, from, to int) {
	l.WriteK(buf, layer, table, k, from, to)
	l.WriteV(buf, layer, table, v, from, to)
}

// WriteK is Write for the keys alone.
func (l *Layout) WriteK(buf []byte, layer int, table []int32, k []float32, from, to int) {
	l.write(buf[l.KOffset(layer):], l.K, table, k, l.KDim, l.KScales, from, to)
}

// WriteV is Write for the values alone, whose table may be another.
func (l *Layout) WriteV(buf []byte, layer int, table []int32, v []float32, from, to int) {
	l.write(buf[l.VOffset(layer):], l.V, table, v, l.VDim, l.VScales, from, to)
}

func (l *Layout) write(
	dst []byte, s gpu.Strides, table []int32, src []float32, dim int, scales []float32, from, to int,
) {
	stored := make([]float32, dim)
	tokens := len(src) / (l.KVHeads * dim)
	for h := range l.KVHeads {
		scale := float32(1)
		switch len(scales) {
		case 0:
		case 1:
			scale = scales[0]
		default:
			scale = scales[h]
		}
		for n := from; n < to; n++ {
			for d, x := range src[(h*tokens+n)*dim:][:dim] {
				stored[d] = x / scale
			}
			at := uint64(table[n/l.PageSize])*s.Page + uint64(h)*s.Head + uint64(n%l.PageSize)*s.Token
			l.DType.Encode(dst[at:], stored)
		}
	}
}
