//go:build !amd64

package simd

const accelerated, wide = false, false

func dotLots(Type, [][]float32, int, [][]float32, [][]byte, int, int) {}

func addLots(Type, [][]float32, [][]float32, int, [][]byte, int, int) {}

func decodeLots(Type, []float32, []byte, int) int { return 0 }

func (*CodeQueries) dots([][]float32, int, []byte, []float32, []byte) {}

func fetch(*byte, int) {}

func atLeastLots(*int32, *float32, float32, int) int { return 0 }
