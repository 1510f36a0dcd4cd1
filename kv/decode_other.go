//go:build !amd64

package kv

// decodeLots converts nothing: there is no faster way than the loops.
func decodeLots(DType, []float32, []byte) int { return 0 }
