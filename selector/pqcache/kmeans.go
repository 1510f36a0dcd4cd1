package pqcache

import (
	"encoding/binary"
	"slices"

	"github.com/viterin/vek/vek32"

	"github.com/twilight-sidecar/twilight/kv"
)

// rounds is the most that Lloyd's algorithm takes: more do not find more of the weight.
const rounds = 10

// Train implements kv.Shadow. Keys that are not finite are left out; with none left, a head stays untrained.
func (c codes) Train(head []byte, keys []float32, dim int) {
	clear(head)
	points := make([]float32, 0, len(keys))
	for t := 0; t < len(keys); t += dim {
		if key := keys[t : t+dim]; isFinite(vek32.Sum(key)) {
			points = append(points, key...)
		}
	}
	if len(points) == 0 {
		return
	}
	book := make([]float32, c.bookFloats(dim))
	for i := range c.parts(dim) {
		from, to := c.part(i, dim)
		part := make([]float32, 0, len(points)/dim*(to-from))
		for t := 0; t < len(points); t += dim {
			part = append(part, points[t+from:t+to]...)
		}
		centroids, norms := c.split(book, i, dim)
		kmeans(centroids, norms, part)
	}
	binary.LittleEndian.PutUint32(head, 1)
	kv.F32.Encode(head[trainedBytes:], book)
}

// kmeans clusters points [n][d] by Lloyd's algorithm, from evenly spaced ones on until none changes its
// cluster. It writes the centroids, [d][k], and half the squares of their norms, [k]. A centroid that loses
// all of its points stays where it was.
func kmeans(centroids, norms, points []float32) {
	k := len(norms)
	d := len(centroids) / k
	n := len(points) / d
	for c := range k {
		for i, x := range points[c*n/k*d:][:d] {
			centroids[i*k+c] = x
		}
	}
	assigned, counts := slices.Repeat([]int{-1}, n), make([]int, k)
	sums, products := make([]float32, k*d), make([]float32, k)
	for range rounds {
		setNorms(norms, centroids)
		clear(sums)
		clear(counts)
		moved := false
		for p := range n {
			point := points[p*d:][:d]
			c := nearest(products, centroids, norms, point)
			moved = moved || assigned[p] != c
			assigned[p] = c
			vek32.Add_Inplace(sums[c*d:][:d], point)
			counts[c]++
		}
		if !moved {
			return
		}
		for c, count := range counts {
			if count == 0 {
				continue
			}
			for i, sum := range sums[c*d:][:d] {
				centroids[i*k+c] = sum / float32(count)
			}
		}
	}
	setNorms(norms, centroids)
}

func setNorms(norms, centroids []float32) {
	clear(norms)
	for channel := range slices.Chunk(centroids, len(norms)) {
		for c, x := range channel {
			norms[c] += x * x / 2
		}
	}
}

// nearest returns the centroid closest to a point, the first of those equally close. products is memory
// for a number each.
func nearest(products, centroids, norms, point []float32) int {
	multiply(products, centroids, point)
	vek32.Sub_Inplace(products, norms)
	return max(0, vek32.ArgMax(products)) // -1 if all are infinitely far
}

// multiply writes the products of a point with all centroids.
func multiply(products, centroids, point []float32) {
	vek32.MatMul_Into(products, point, centroids, len(point))
}
