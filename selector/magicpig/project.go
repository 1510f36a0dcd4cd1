package magicpig

import (
	"math/rand/v2"
	"sync"

	"github.com/viterin/vek/vek32"
)

// projector hashes vectors. It is safe for concurrent use.
type projector struct {
	k, l int
	seed uint64

	mu    sync.Mutex
	byDim map[int][]float32
}

func newProjector(k, l int, seed uint64) *projector {
	return &projector{k: k, l: l, seed: seed, byDim: make(map[int][]float32)}
}

// projections returns the w for vectors of dim elements, [l][k][dim].
func (p *projector) projections(dim int) []float32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, has := p.byDim[dim]
	if !has {
		random := rand.New(rand.NewPCG(p.seed, uint64(dim))) //nolint:gosec // hashes are to be the same each time
		w = make([]float32, p.l*p.k*dim)
		for i := range w {
			w[i] = float32(random.NormFloat64())
		}
		p.byDim[dim] = w
	}
	return w
}

// block is how many projections are worked on at a time: few enough for the first cache, and for vek32 to
// make no goroutines.
const block = 64

// hash writes the hashes of vectors [n][dim] to codes, [n][stride], of which it sets the first l. products
// is memory to work in.
func (p *projector) hash(codes []uint16, stride int, vectors []float32, dim int, products *[block]float32) {
	w := p.projections(dim)
	tables := block / p.k
	for l := 0; l < p.l; l += tables {
		signs := min(tables, p.l-l) * p.k
		for i := 0; i*dim < len(vectors); i++ {
			vek32.MatMul_Into(products[:signs], w[l*p.k*dim:][:signs*dim], vectors[i*dim:][:dim], dim)
			code := codes[i*stride+l:]
			for t := 0; t*p.k < signs; t++ {
				var hash uint16
				for b, product := range products[t*p.k:][:p.k] {
					if product > 0 {
						hash |= 1 << b
					}
				}
				code[t] = hash
			}
		}
	}
}
