//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/gpu/cuda/kernels"
	"github.com/twilight-sidecar/twilight/internal/layout"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/pruner/minmaxquant"
	"github.com/twilight-sidecar/twilight/selector/quest"
)

// TestRecords holds the shadow's records, bit by bit, against those that the methods' own code makes.
func TestRecords(t *testing.T) {
	all, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	device := newDevice(t)
	for n := range uint64(24) {
		t.Run(fmt.Sprintf("seed=%d", n), func(t *testing.T) {
			r := rand.New(rand.NewPCG(n, 1))
			dim, heads, tokens := 16*(1+r.IntN(16)), 1+r.IntN(3), 17+r.IntN(400)
			s := scenario{
				geometry: kv.Geometry{
					Layers: 1, QueryHeads: heads, KVHeads: heads, KDim: dim, VDim: 16, Scale: 1,
					Query: kv.F32, QueryScale: 1, Output: kv.F32,
				},
				layout: layout.Config{
					Kind: layout.NHD, DType: pick(r, kv.F32, kv.F16, kv.BF16, kv.F8E4M3), Layers: 1, KVHeads: heads,
					KDim: dim, VDim: 16, Sequences: 1, Tokens: tokens, PageSize: 16,
				},
				config: `{"skip_first_two_layers": false, "selector": {"type": "quest"}, "weight_estimator": {"type": "min_max_quant"},
					"weight_pruner": {"type": "top_p"}}`,
			}
			l, err := layout.New(s.layout)
			if err != nil {
				t.Fatal(err)
			}
			p := newPlayer(t, device, lender{kind: gpu.CUDAIPC}, &s, l, all)
			keys := make([]float32, heads*tokens*dim)
			for i := range keys {
				keys[i] = float32(r.NormFloat64())
				if i%dim%7 == 2 {
					keys[i] = 5 + 3*keys[i]
				}
			}
			data := make([]byte, l.Size())
			table := l.Tables(nil)[0]
			l.Write(data, 0, table, keys, make([]float32, heads*tokens*16), 0, tokens)
			p.buffer.Write(0, data)
			plane := kv.Plane{
				Data: data[l.KOffset(0):], PageStride: int(l.K.Page), HeadStride: int(l.K.Head), TokenStride: int(l.K.Token),
				PageSize: 16, DType: l.DType, Dim: dim,
			}
			chunks := ceilDiv(tokens, kv.ChunkTokens)
			c := p.cache.(*cache)
			var have int
			for _, length := range []int{1 + r.IntN(tokens), tokens} {
				if length < have {
					continue
				}
				old := ceilDiv(have, 16)
				st := &kv.Step{
					Sequences: []uint64{1}, Lengths: []int32{int32(length)}, TableStarts: []uint32{uint32(old)},
					TableCounts: []uint32{uint32(ceilDiv(length, 16) - old)}, TableEntries: table[old:ceilDiv(length, 16)],
				}
				if err := c.Step(context.Background(), st); err != nil {
					t.Fatal(err)
				}
				if _, err := c.Index(context.Background()); err != nil {
					t.Fatal(err)
				}
				have = length
			}

			got := make([]byte, c.charged)
			err = device.owner.do(context.Background(), func() error {
				return drv.Wrap("cuMemcpyDtoH", cu.MemcpyDtoH(unsafe.Pointer(unsafe.SliceData(got)), cu.DevicePtr(c.shadow.ptr), int64(c.charged)))
			})
			if err != nil {
				t.Fatal(err)
			}
			var d kernels.Layer
			c.shadowAddresses(0, &d)
			bytesAt := func(at uint64, n int) []byte { return got[at-c.shadow.ptr:][:n] }

			int4, extremes := minmaxquant.Default().New().Shadow(), quest.Default().New().Shadow()
			for head := range heads {
				reader := plane.Reader(table, head)
				record := make([]byte, int4.HeadBytes(dim))
				if level := c.lease.method.level(tokens); level > 0 {
					sample := make([]float32, level*dim)
					reader.Read(sample, 0, level)
					int4.Train(record, sample, dim)
				}
				if mean := bytesAt(d.Mean+uint64(4*head*dim), 4*dim); string(mean) != string(record[:4*dim]) {
					t.Fatalf("head %d: means differ", head)
				}
				if spread := bytesAt(d.Spread+uint64(4*head*dim), 4*dim); string(spread) != string(record[4*dim:8*dim]) {
					t.Fatalf("head %d: scales differ", head)
				}
				if reach := bytesAt(d.Reach+uint64(4*head*dim), 4*dim); string(reach) != string(record[8*dim:]) {
					t.Fatalf("head %d: reaches differ", head)
				}
				for chunk := range chunks {
					n := min(kv.ChunkTokens, tokens-chunk*kv.ChunkTokens)
					valid := uint16(1<<n - 1)
					sample := make([]float32, kv.ChunkTokens*dim)
					reader.Read(sample[:n*dim], chunk*kv.ChunkTokens, chunk*kv.ChunkTokens+n)
					want, bounds := make([]byte, int4.ChunkBytes(dim)), make([]byte, extremes.ChunkBytes(dim))
					int4.Index(record, want, sample, dim, valid, valid)
					extremes.Index(nil, bounds, sample, dim, valid, valid)
					at := uint64((int(table[chunk])*heads + head))
					if b := bytesAt(d.Bounds+at*uint64(kernels.BoundsBytes(dim)), 4*dim); string(b) != string(bounds) {
						t.Fatalf("head %d chunk %d: bounds differ", head, chunk)
					}
					packed := bytesAt(d.Int4+at*uint64(kernels.Int4Bytes(dim)), kernels.Int4Bytes(dim))
					differ := 0
					for token := range n {
						if string(packed[dim*8+4*token:][:4]) != string(want[4*token:][:4]) {
							t.Fatalf("head %d chunk %d token %d: scale and zero are %x, want %x",
								head, chunk, token, packed[dim*8+4*token:][:4], want[4*token:][:4])
						}
						for i := range dim {
							code := want[64+token*dim/2+i/2] >> (4 * (i % 2)) & 15
							if fragment(packed, dim, token, i) != code {
								differ++
							}
						}
					}
					if differ > 0 {
						t.Fatalf("head %d chunk %d: %d codes differ", head, chunk, differ)
					}
				}
			}
		})
	}
}

// fragment reads a code where the tensor cores want it: lane g*4+t holds, in a word for each 16 channels,
// tokens g and g+8 and channels 2t, 2t+1, 2t+8, 2t+9; four such words of a lane are adjacent.
func fragment(record []byte, dim, token, d int) byte {
	steps, s, in := dim/16, d/16, d%16
	g, t := token%8, in%8/2
	lane := g*4 + t
	word := s*32 + lane
	if s < steps/4*4 {
		word = s/4*128 + lane*4 + s%4
	}
	at := word*4 + in%2*2 + token/8
	return record[at] >> (in / 8 * 4) & 15
}
