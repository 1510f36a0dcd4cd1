package kv

import "math/bits"

// Plane is K or V of one cache layer: a strided view of the engine's memory, never written. The element
// at (page p, KV head h, token-in-page t, dimension d) starts at
// Data[p*PageStride + h*HeadStride + t*TokenStride + d*DType.Size()].
type Plane struct {
	Data []byte // from the layer's first byte on

	PageStride, HeadStride, TokenStride int // bytes

	PageSize int // tokens
	DType    DType
	Dim      int // elements

	// Scales multiply stored values: nil for 1, one for all KV heads, or one for each.
	Scales []float32
}

// Bytes returns how many bytes from Data[0] on the plane spans, for at least one page and KV head;
// false if the number does not fit an int or a stride is negative.
func (p *Plane) Bytes(numPages, kvHeads int) (uint64, bool) {
	total, ok := uint64(p.Dim)*uint64(p.DType.Size()), true
	for _, axis := range [...]struct{ stride, n int }{
		{p.PageStride, numPages}, {p.HeadStride, kvHeads}, {p.TokenStride, p.PageSize},
	} {
		high, low := bits.Mul64(uint64(axis.stride), uint64(axis.n-1))
		sum, carry := bits.Add64(total, low, 0)
		total = sum
		ok = ok && axis.stride >= 0 && axis.n >= 1 && high|carry == 0
	}
	return total, ok && total <= 1<<63-1
}

// Reader returns a reader of a KV head of the sequence whose page table is given. The reader uses table
// and p for as long as it lives.
func (p *Plane) Reader(table []int32, head int) Reader {
	r := Reader{plane: p, table: table, base: head * p.HeadStride, scale: 1}
	switch len(p.Scales) {
	case 0:
	case 1:
		r.scale = p.Scales[0]
	default:
		r.scale = p.Scales[head]
	}
	return r
}

// Reader reads the vectors of one KV head of one sequence as float32, scales applied. Positions are
// indices into the sequence; those its table or the plane's data do not hold panic. It is safe for
// concurrent use.
type Reader struct {
	plane *Plane
	table []int32
	base  int // byte offset of the head
	scale float32
}

// Dim returns the elements of a vector.
func (r Reader) Dim() int { return r.plane.Dim }

// Read writes the vectors of positions [from, to) to dst, [to-from][Dim].
func (r Reader) Read(dst []float32, from, to int) {
	p := r.plane
	dst = dst[:(to-from)*p.Dim]
	r.decode(dst, from, to)
	r.rescale(dst)
}

// Gather writes the vectors of the positions to dst, [len(positions)][Dim].
func (r Reader) Gather(dst []float32, positions []int32) {
	p := r.plane
	dst = dst[:len(positions)*p.Dim]
	size, row := uint32(p.PageSize), p.Dim*p.DType.Size()
	rest := dst
	for _, pos := range positions {
		page := int(r.table[uint32(pos)/size])
		at := r.base + page*p.PageStride + int(uint32(pos)%size)*p.TokenStride
		p.DType.Decode(rest[:p.Dim], p.Data[at:at+row])
		rest = rest[p.Dim:]
	}
	r.rescale(dst)
}

// decode fills dst page by page, at once where a page's tokens are adjacent.
func (r Reader) decode(dst []float32, from, to int) {
	p := r.plane
	row := p.Dim * p.DType.Size()
	page, token := from/p.PageSize, from%p.PageSize
	for from < to {
		n := min(p.PageSize-token, to-from)
		data := p.Data[r.base+int(r.table[page])*p.PageStride+token*p.TokenStride:]
		if p.TokenStride == row {
			p.DType.Decode(dst[:n*p.Dim], data)
		} else {
			for i := range n {
				p.DType.Decode(dst[i*p.Dim:(i+1)*p.Dim], data[i*p.TokenStride:])
			}
		}
		dst, from = dst[n*p.Dim:], from+n
		page, token = page+1, 0
	}
}

func (r Reader) rescale(dst []float32) {
	if r.scale == 1 {
		return
	}
	for i := range dst {
		dst[i] *= r.scale
	}
}
