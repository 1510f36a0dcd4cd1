package simd

import "golang.org/x/sys/cpu"

var accelerated = cpu.X86.HasAVX2 && cpu.X86.HasFMA && cpu.X86.HasF16C

// wide tells whether there are kernels for two lots at once, which take twice as many.
var wide = accelerated && cpu.X86.HasBMI2 && cpu.X86.HasAVX512F && cpu.X86.HasAVX512VBMI

// places holds, for each mask of 8 bits, the places of those set.
var places = func() (t [1 << lot][lot]uint8) { //nolint:unused // by the assembly
	for mask := range t {
		n := 0
		for i := range uint8(lot) {
			if mask>>i&1 == 1 {
				t[mask][n] = i
				n++
			}
		}
	}
	return t
}()

// args are what a kernel works on; add kernels use n up.
type args struct {
	heads         [Most]*float32 // queries, or weights
	out           [Most]*float32
	vectors, last *[]byte // of a slice
	n             int     // vectors
	lots          int     // of a vector
	bytes         int     // of these
}

// dotLots is Dots for up to Most heads and the first lots of elements.
func dotLots(t Type, out [][]float32, at int, queries [][]float32, vectors [][]byte, n, lots int) {
	a := args{vectors: &vectors[0], last: &vectors[len(vectors)-1], n: n, lots: lots, bytes: t.Bytes(lots * lot)}
	for i := range Most {
		h := min(i, len(out)-1) // the last head fills up, and writes the same again
		a.heads[i], a.out[i] = &queries[h][:lots*lot][0], &out[h][at:][:n][0]
	}
	if len(out) == 1 {
		dot1(t, &a)
	} else {
		dot4(t, &a)
	}
}

// addLots is Add for up to Most heads, the first lots of elements and a multiple of some vectors.
func addLots(t Type, out, weights [][]float32, at int, vectors [][]byte, n, lots int) {
	a := args{vectors: &vectors[0], last: &vectors[len(vectors)-1], n: n, lots: lots, bytes: t.Bytes(lots * lot)}
	for i := range Most {
		h := min(i, len(out)-1)
		a.heads[i], a.out[i] = &weights[h][at:][:n][0], &out[h][:lots*lot][0]
	}
	if len(out) == 1 {
		add1(t, &a)
	} else {
		add4(t, &a)
	}
}

// codeArgs are what a kernel for codes works on.
type codeArgs struct {
	heads, out      [Most]*float32
	sums, constants [Most]float32
	codes           *byte
	params          *float32
	next            *byte // to be asked of memory
	n               int   // vectors
	lots, bytes     int   // of a vector
}

// dots is Dots for whole lots.
func (q *CodeQueries) dots(out [][]float32, at int, codes []byte, params []float32, next []byte) {
	a := codeArgs{
		sums: q.sums, constants: q.constants, codes: &codes[0], params: &params[0], next: &next[0],
		n: len(params) / 2, lots: q.dim / lot, bytes: CodeBytes(q.bits, q.dim),
	}
	for i := range Most {
		h := i
		if h >= q.heads {
			h = 0 // which is written last
		}
		a.heads[i], a.out[i] = &q.query(h)[0], &out[h][at:][:a.n][0]
	}
	one := q.heads == 1
	switch {
	case q.bits == 2 && one:
		codes1U2(&a)
	case q.bits == 2:
		codes4U2(&a)
	case q.bits == 4 && wide && a.lots%2 == 0 && one:
		codes1U4Wide(&a)
	case q.bits == 4 && wide && a.lots%2 == 0:
		codes4U4Wide(&a)
	case q.bits == 4 && one:
		codes1U4(&a)
	case q.bits == 4:
		codes4U4(&a)
	case one:
		codes1U8(&a)
	default:
		codes4U8(&a)
	}
}

func dot4(t Type, a *args) {
	isWide := wide && a.lots%2 == 0
	switch t {
	case F32:
		if isWide {
			dot4F32Wide(a)
		} else {
			dot4F32(a)
		}
	case F16:
		if isWide {
			dot4F16Wide(a)
		} else {
			dot4F16(a)
		}
	case BF16:
		if isWide {
			dot4BF16Wide(a)
		} else {
			dot4BF16(a)
		}
	case F8:
		dot4F8(a)
	}
}

func dot1(t Type, a *args) {
	isWide := wide && a.lots%2 == 0
	switch t {
	case F32:
		if isWide {
			dot1F32Wide(a)
		} else {
			dot1F32(a)
		}
	case F16:
		if isWide {
			dot1F16Wide(a)
		} else {
			dot1F16(a)
		}
	case BF16:
		if isWide {
			dot1BF16Wide(a)
		} else {
			dot1BF16(a)
		}
	case F8:
		dot1F8(a)
	}
}

func add4(t Type, a *args) {
	isWide := wide && a.lots%2 == 0
	switch t {
	case F32:
		if isWide {
			add4F32Wide(a)
		} else {
			add4F32(a)
		}
	case F16:
		if isWide {
			add4F16Wide(a)
		} else {
			add4F16(a)
		}
	case BF16:
		if isWide {
			add4BF16Wide(a)
		} else {
			add4BF16(a)
		}
	case F8:
		add4F8(a)
	}
}

func add1(t Type, a *args) {
	switch t {
	case F32:
		add1F32(a)
	case F16:
		add1F16(a)
	case BF16:
		add1BF16(a)
	case F8:
		add1F8(a)
	}
}

// decodeLots decodes lots of elements, and returns how many elements: none if there is no kernel.
func decodeLots(t Type, dst []float32, src []byte, lots int) int {
	switch t {
	case F16:
		decodeF16Lots(&dst[0], &src[0], lots)
	case BF16:
		decodeBF16Lots(&dst[0], &src[0], lots)
	case F8:
		decodeF8Lots(&dst[0], &src[0], lots)
	default:
		return 0
	}
	return lots * lot
}

//go:noescape
func dot4F32(a *args)

//go:noescape
func dot4F16(a *args)

//go:noescape
func dot4BF16(a *args)

//go:noescape
func dot4F32Wide(a *args)

//go:noescape
func dot4F16Wide(a *args)

//go:noescape
func dot4BF16Wide(a *args)

//go:noescape
func dot4F8(a *args)

//go:noescape
func dot1F32(a *args)

//go:noescape
func dot1F16(a *args)

//go:noescape
func dot1BF16(a *args)

//go:noescape
func dot1F32Wide(a *args)

//go:noescape
func dot1F16Wide(a *args)

//go:noescape
func dot1BF16Wide(a *args)

//go:noescape
func dot1F8(a *args)

//go:noescape
func add4F32(a *args)

//go:noescape
func add4F16(a *args)

//go:noescape
func add4BF16(a *args)

//go:noescape
func add4F8(a *args)

//go:noescape
func add4F32Wide(a *args)

//go:noescape
func add4F16Wide(a *args)

//go:noescape
func add4BF16Wide(a *args)

//go:noescape
func add1F32(a *args)

//go:noescape
func add1F16(a *args)

//go:noescape
func add1BF16(a *args)

//go:noescape
func add1F8(a *args)

//go:noescape
func decodeF16Lots(dst *float32, src *byte, lots int)

//go:noescape
func decodeBF16Lots(dst *float32, src *byte, lots int)

//go:noescape
func decodeF8Lots(dst *float32, src *byte, lots int)

//go:noescape
func fetch(p *byte, n int)

// atLeastLots writes indices from 0 on, 8 at a time, of which all but those it counts are to be overwritten.
//
//go:noescape
func atLeastLots(dst *int32, x *float32, least float32, lots int) int

//go:noescape
func codes1U2(a *codeArgs)

//go:noescape
func codes1U4(a *codeArgs)

//go:noescape
func codes1U8(a *codeArgs)

//go:noescape
func codes4U2(a *codeArgs)

//go:noescape
func codes4U4(a *codeArgs)

//go:noescape
func codes4U8(a *codeArgs)

//go:noescape
func codes1U4Wide(a *codeArgs)

//go:noescape
func codes4U4Wide(a *codeArgs)
