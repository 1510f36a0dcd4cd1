package simd

import "golang.org/x/sys/cpu"

var accelerated = cpu.X86.HasAVX2 && cpu.X86.HasFMA && cpu.X86.HasF16C

// args are what a kernel works on; add kernels use n up.
type args struct {
	heads         [most]*float32 // queries, or weights
	out           [most]*float32
	vectors, last *[]byte // of a slice
	n             int     // vectors
	lots          int     // of a vector
	bytes         int     // of these
}

// dotLots is Dots for up to most heads and the first lots of elements.
func dotLots(t Type, out [][]float32, at int, queries [][]float32, vectors [][]byte, n, lots int) {
	a := args{vectors: &vectors[0], last: &vectors[len(vectors)-1], n: n, lots: lots, bytes: t.Bytes(lots * lot)}
	for i := range most {
		h := min(i, len(out)-1) // the last head fills up, and writes the same again
		a.heads[i], a.out[i] = &queries[h][:lots*lot][0], &out[h][at:][:n][0]
	}
	if len(out) == 1 {
		dot1(t, &a)
	} else {
		dot4(t, &a)
	}
}

// addLots is Add for up to most heads, the first lots of elements and a multiple of some vectors.
func addLots(t Type, out, weights [][]float32, at int, vectors [][]byte, n, lots int) {
	a := args{vectors: &vectors[0], last: &vectors[len(vectors)-1], n: n, lots: lots, bytes: t.Bytes(lots * lot)}
	for i := range most {
		h := min(i, len(out)-1)
		a.heads[i], a.out[i] = &weights[h][at:][:n][0], &out[h][:lots*lot][0]
	}
	if len(out) == 1 {
		add1(t, &a)
	} else {
		add4(t, &a)
	}
}

func dot4(t Type, a *args) {
	switch t {
	case F32:
		dot4F32(a)
	case F16:
		dot4F16(a)
	case BF16:
		dot4BF16(a)
	case F8:
		dot4F8(a)
	case U8:
		dot4U8(a)
	case U4:
		dot4U4(a)
	case U2:
		dot4U2(a)
	}
}

func dot1(t Type, a *args) {
	switch t {
	case F32:
		dot1F32(a)
	case F16:
		dot1F16(a)
	case BF16:
		dot1BF16(a)
	case F8:
		dot1F8(a)
	case U8:
		dot1U8(a)
	case U4:
		dot1U4(a)
	case U2:
		dot1U2(a)
	}
}

func add4(t Type, a *args) {
	switch t {
	case F32:
		add4F32(a)
	case F16:
		add4F16(a)
	case BF16:
		add4BF16(a)
	case F8:
		add4F8(a)
	default: // codes are asked, never added
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
	default:
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
func dot4F8(a *args)

//go:noescape
func dot4U8(a *args)

//go:noescape
func dot4U4(a *args)

//go:noescape
func dot4U2(a *args)

//go:noescape
func dot1F32(a *args)

//go:noescape
func dot1F16(a *args)

//go:noescape
func dot1BF16(a *args)

//go:noescape
func dot1F8(a *args)

//go:noescape
func dot1U8(a *args)

//go:noescape
func dot1U4(a *args)

//go:noescape
func dot1U2(a *args)

//go:noescape
func add4F32(a *args)

//go:noescape
func add4F16(a *args)

//go:noescape
func add4BF16(a *args)

//go:noescape
func add4F8(a *args)

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
func fetch(p *byte)
