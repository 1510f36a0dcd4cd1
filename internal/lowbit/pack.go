package lowbit

// pack truncates values to codes of 2, 4 or 8 bits. The lowest bits of a byte hold the first.
func pack(dst []byte, values []float32, bits int) {
	if bits == 4 && len(values)%2 == 0 {
		for i := range dst {
			dst[i] = byte(values[2*i]) | byte(values[2*i+1])<<4
		}
		return
	}
	clear(dst)
	for i, v := range values {
		dst[i*bits/8] |= byte(v) << (i * bits % 8)
	}
}

// The codes in a byte, as floats.
var (
	quarters = tabulate(func(b int) [4]float32 {
		return [4]float32{float32(b & 3), float32(b >> 2 & 3), float32(b >> 4 & 3), float32(b >> 6)}
	})
	nibbles = tabulate(func(b int) [2]float32 { return [2]float32{float32(b & 15), float32(b >> 4)} })
)

func tabulate[T any](codes func(b int) T) *[256]T {
	var t [256]T
	for b := range t {
		t[b] = codes(b)
	}
	return &t
}

// unpack turns all the codes in src, len(src)*8/bits of them, into floats.
func unpack(dst []float32, src []byte, bits int) {
	switch bits {
	case 2:
		for i, b := range src {
			*(*[4]float32)(dst[4*i:]) = quarters[b]
		}
	case 4:
		// Four bytes a round take a third of the time of one.
		for ; len(src) >= 4 && len(dst) >= 8; dst, src = dst[8:], src[4:] {
			d, s := (*[8]float32)(dst), (*[4]byte)(src)
			a, b, c, e := &nibbles[s[0]], &nibbles[s[1]], &nibbles[s[2]], &nibbles[s[3]]
			d[0], d[1], d[2], d[3] = a[0], a[1], b[0], b[1]
			d[4], d[5], d[6], d[7] = c[0], c[1], e[0], e[1]
		}
		for i, b := range src {
			*(*[2]float32)(dst[2*i:]) = nibbles[b]
		}
	case 8:
		for i, b := range src {
			dst[i] = float32(b)
		}
	}
}
