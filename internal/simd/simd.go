package simd

// Type is how the elements of a vector are stored: little-endian, without alignment.
type Type uint8

// The types. F8 is OCP's e4m3, without infinities.
const (
	F32 Type = iota
	F16
	BF16
	F8
)

var sizes = [...]int{F32: 4, F16: 2, BF16: 2, F8: 1}

// Bytes is the size of a vector of n elements.
func (t Type) Bytes(n int) int { return n * sizes[t] }

// Instructions names the extensions that the assembly uses on this machine, "" if it is not run.
func Instructions() string {
	switch {
	case wide:
		return "AVX2, FMA, F16C, AVX-512"
	case accelerated:
		return "AVX2, FMA, F16C"
	}
	return ""
}

// Most is how many heads a vector is decoded for at once.
const Most = 4

const (
	lot  = 8 // elements
	some = 4 // vectors that are added at once
)

// Ahead is how many vectors from the one it works on Dots and Add ask memory for.
const Ahead = 48

// Dots writes the product of queries[h] and the i-th of the first n vectors to out[h][at+i]. Vectors
// behind the n-th are only asked of memory: those of the next call, up to Ahead.
func Dots(t Type, out [][]float32, at int, queries [][]float32, vectors [][]byte, n int) {
	dim := len(queries[0])
	check(vectors[:n], t.Bytes(dim))
	done := 0
	if lots := dim / lot; accelerated && lots > 0 && n > 0 {
		done = lots * lot
		for h := 0; h < len(queries); h += Most {
			end := min(h+Most, len(queries))
			dotLots(t, out[h:end], at, queries[h:end], vectors, n, lots)
		}
	}
	if done < dim {
		plainDots(t, out, at, queries, vectors[:n], done)
	}
}

// Add adds weights[h][at+i] times the i-th of the first n vectors to out[h], in their order.
// Vectors behind the n-th are only asked of memory, as Dots does.
func Add(t Type, out, weights [][]float32, at int, vectors [][]byte, n int) {
	dim := len(out[0])
	check(vectors[:n], t.Bytes(dim))
	done, whole := 0, n/some*some
	if lots := dim / lot; accelerated && lots > 0 && whole > 0 {
		done = lots * lot
		for h := 0; h < len(out); h += Most {
			end := min(h+Most, len(out))
			addLots(t, out[h:end], weights[h:end], at, vectors, whole, lots)
		}
		plainAdd(t, out, weights, at+whole, vectors[whole:n], 0, done)
	}
	plainAdd(t, out, weights, at, vectors[:n], done, dim)
}

// Fetch asks memory for b, which is to be read soon.
func Fetch(b []byte) {
	if len(b) > 0 {
		fetch(&b[0], len(b))
	}
}

// check panics unless all vectors have the size.
func check(vectors [][]byte, size int) {
	for _, v := range vectors {
		_ = v[:size]
	}
}

// Decode converts the first len(dst) elements of src, exactly. It panics if src is shorter.
func Decode(t Type, dst []float32, src []byte) {
	src = src[:t.Bytes(len(dst))]
	done := 0
	if lots := len(dst) / lot; accelerated && lots > 0 {
		done = decodeLots(t, dst, src, lots)
	}
	decode(t, dst[done:], src[t.Bytes(done):])
}
