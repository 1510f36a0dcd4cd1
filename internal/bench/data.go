package bench

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
)

// Shape says what a layer looks like. All fields are required.
type Shape struct {
	KVHeads   int         `json:"kv_heads"`
	Group     int         `json:"group"`
	Dim       int         `json:"dim"`
	Tokens    int         `json:"tokens"`
	Sequences int         `json:"sequences"`
	Layout    layout.Kind `json:"layout"`
	DType     kv.DType    `json:"-"` // named in Report
}

// Layer is the model's index of the one layer: behind those that most configs leave dense.
const Layer = 2

// Geometry is what to open a lease with.
func (s *Shape) Geometry() *kv.Geometry {
	return &kv.Geometry{
		Layers: 1, QueryHeads: s.KVHeads * s.Group, KVHeads: s.KVHeads, KDim: s.Dim, VDim: s.Dim,
		Scale: 1 / float32(math.Sqrt(float64(s.Dim))), Query: kv.F32, QueryScale: 1, Output: kv.F32,
	}
}

// Bytes is the size of a sequence's keys and values, which dense attention reads once.
func (s *Shape) Bytes() int { return 2 * s.Tokens * s.KVHeads * s.Dim * s.DType.Size() }

// operations are those of dense attention over a sequence: a multiplication and an addition for each
// element of a key or value and each query head.
func (s *Shape) operations() float64 {
	return 2 * 2 * float64(s.Tokens) * float64(s.KVHeads*s.Group) * float64(s.Dim)
}

// Data is a cache of one layer in shared memory, and a query for each of its sequences.
type Data struct {
	Shape
	Layout *layout.Layout
	FD     int       // of the memory
	Tables [][]int32 // by sequence

	memory  []byte
	queries [][]byte // by sequence, [QueryHeads][Dim] in fp32
}

// Query is the query of a sequence, as the device takes it.
func (d *Data) Query(sequence int) []byte { return d.queries[sequence] }

// NewData makes a cache. It is to be closed.
func NewData(s Shape) (*Data, error) {
	l, err := layout.New(layout.Config{
		Kind: s.Layout, DType: s.DType, Layers: 1, KVHeads: s.KVHeads, KDim: s.Dim, VDim: s.Dim,
		Sequences: s.Sequences, Tokens: s.Tokens, PageSize: kv.ChunkTokens,
	})
	if err != nil {
		return nil, err
	}
	d := &Data{Shape: s, Layout: l}
	random := rand.New(rand.NewPCG(1, 0)) //nolint:gosec // to be repeated, not to be guessed
	pages := make([]int32, l.NumPages)
	for i, page := range random.Perm(l.NumPages) {
		pages[i] = int32(page)
	}
	d.Tables = l.Tables(pages)
	for range s.Sequences {
		d.queries = append(d.queries, s.query(random))
	}

	if d.FD, err = unix.MemfdCreate("twilight-bench", unix.MFD_CLOEXEC); err != nil {
		return nil, err
	}
	if err := unix.Ftruncate(d.FD, int64(l.Size())); err != nil {
		return nil, errors.Join(fmt.Errorf("%d bytes of shared memory: %w", l.Size(), err), unix.Close(d.FD))
	}
	d.memory, err = unix.Mmap(d.FD, 0, int(l.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%d bytes of shared memory: %w", l.Size(), err), unix.Close(d.FD))
	}
	d.fill()
	return d, nil
}

// Close frees the memory.
func (d *Data) Close() error { return errors.Join(unix.Munmap(d.memory), unix.Close(d.FD)) }

// query makes a query for each head: what its group shares, and its own.
func (s *Shape) query(random *rand.Rand) []byte {
	var query []float32
	shared := make([]float64, s.Dim)
	for range s.KVHeads {
		sigma := 3.6 + .9*random.Float64()
		for i := range shared {
			shared[i] = random.NormFloat64()
		}
		for range s.Group {
			for _, x := range shared {
				query = append(query, float32(sigma*(.8*x+.6*random.NormFloat64())))
			}
		}
	}
	data := make([]byte, len(query)*kv.F32.Size())
	kv.F32.Encode(data, query)
	return data
}

// fill writes all sequences at once.
func (d *Data) fill() {
	// Drawing from a stock of numbers at random offsets is ten times as fast as making them.
	const stock = 1 << 20
	random := rand.New(rand.NewPCG(2, 0)) //nolint:gosec // to be repeated, not to be guessed
	normal := make([]float32, stock+d.Dim)
	for i := range normal {
		normal[i] = float32(random.NormFloat64())
	}
	values := make([]byte, len(normal)*d.DType.Size())
	d.DType.Encode(values, normal)

	var writers sync.WaitGroup
	for sequence, table := range d.Tables {
		writers.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(sequence))) //nolint:gosec // to be repeated, not to be guessed
			key := make([]float32, d.Dim)
			for head := range d.KVHeads {
				var shared []float32
				for n := range d.Tokens {
					if n%kv.ChunkTokens == 0 {
						shared = normal[random.IntN(stock):]
					}
					own := normal[random.IntN(stock):]
					for i := range key {
						key[i] = math.Sqrt2 / 2 * (shared[i] + own[i])
					}
					page, slot := uint64(table[n/d.Layout.PageSize]), uint64(n%d.Layout.PageSize)
					k := d.memory[d.Layout.KOffset(0)+page*d.Layout.K.Page+uint64(head)*d.Layout.K.Head+slot*d.Layout.K.Token:]
					v := d.memory[d.Layout.VOffset(0)+page*d.Layout.V.Page+uint64(head)*d.Layout.V.Head+slot*d.Layout.V.Token:]
					d.DType.Encode(k, key)
					copy(v[:d.Dim*d.DType.Size()], values[random.IntN(stock)*d.DType.Size():])
				}
			}
		})
	}
	writers.Wait()
}
