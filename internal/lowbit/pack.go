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
