//go:build linux && cgo && cuda

// Command twilight-engine is twilight with a GPU's memory: it replays and benchmarks as an engine whose cache
// lies there. twilight runs it where --device names a GPU; it needs the driver and the build tag cuda.
package main

import (
	"context"
	"errors"
	"os"
	"sync"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/internal/bench"
	"github.com/twilight-sidecar/twilight/internal/cli"
	"github.com/twilight-sidecar/twilight/internal/replay"
)

func main() {
	os.Exit(cli.Main(func(uuid string, kind gpu.RegionKind) (cli.GPU, error) {
		device, err := engine.Open(uuid)
		return &lender{GPU: device, kind: kind}, err
	}))
}

// lender lends memory of a GPU, of one kind.
type lender struct {
	*engine.GPU
	kind     gpu.RegionKind
	headroom int // bytes that lie before it in what is exported
	all      []*engine.Memory
	lent     sync.Map // lentMemory by *client.Buffer
	streams  []*engine.Stream
}

var (
	_ cli.GPU          = (*lender)(nil)
	_ replay.GPUMemory = (*lender)(nil)
)

// Lend implements replay.Memory.
func (l *lender) Lend(ctx context.Context, s *client.Session, size int, access client.Access) (replay.Buffer, error) {
	m, err := l.Alloc(l.kind, size, l.headroom)
	if err != nil {
		return nil, err
	}
	l.all = append(l.all, m)
	lent, err := lend(ctx, s, m, 0, size, access)
	l.lent.Store(lent, lentMemory{m, 0})
	return &buffer{Memory: m, lent: lent, copied: make([]byte, size)}, err
}

// ReadRate implements bench.Engine.
func (l *lender) ReadRate() (float64, error) { return l.GPU.ReadRate(8 << 30) }

// Load implements bench.Engine.
func (l *lender) Load(s *bench.StepLayout) (bench.Load, error) {
	m, err := l.Alloc(l.kind, s.Bytes, 0)
	if err != nil {
		return nil, err
	}
	data := &load{Memory: m, lender: l, layout: s, tensors: engine.Tensors{
		PageSize: s.PageSize, KVHeads: s.KVHeads, Dim: s.Dim, QueryHeads: s.QueryHeads, Tables: s.Tables,
	}}
	err = m.FillQueries(&data.tensors, s.Queries, 7)
	for i := range s.Layers {
		k, v := int(s.Cache.KOffset(i)), int(s.Cache.VOffset(i))
		err = errors.Join(err, m.FillPlanes(&data.tensors, k, v, uint64(i+1)))
	}
	if err != nil {
		return nil, errors.Join(err, m.Release())
	}
	return data, nil
}

// load is the data of a benchmark.
type load struct {
	*engine.Memory
	lender  *lender
	layout  *bench.StepLayout
	tensors engine.Tensors
}

func (l *load) Lend(ctx context.Context, s *client.Session, offset, size int, access client.Access) (*client.Buffer, error) {
	b, err := lend(ctx, s, l.Memory, offset, size, access)
	l.lender.lent.Store(b, lentMemory{l.Memory, offset})
	return b, err
}

func (l *load) Logits(layer, sequence, head int) ([]float32, error) {
	return l.Memory.Logits(&l.tensors, int(l.layout.Cache.KOffset(layer)), l.layout.Queries, sequence, head)
}

func (l *load) Close() error { return l.Release() }

// Close frees all memory and gives the GPU back.
func (l *lender) Close() error { return errors.Join(l.free(), l.GPU.Close()) }

func (l *lender) free() error {
	var errs []error
	for _, s := range l.streams {
		errs = append(errs, s.Close())
	}
	for _, m := range l.all {
		errs = append(errs, m.Release())
	}
	l.all, l.streams = nil, nil
	l.lent.Clear()
	return errors.Join(errs...)
}

// lend lends size bytes of a memory at offset.
func lend(ctx context.Context, s *client.Session, m *engine.Memory, offset, size int, access client.Access) (*client.Buffer, error) {
	share, err := share(m, offset, size, access)
	if err != nil {
		return nil, err
	}
	return s.ShareGPU(ctx, share)
}

// share is what lends it: with a probe, that the daemon finds the same.
func share(m *engine.Memory, offset, size int, access client.Access) (client.GPUShare, error) {
	probe := &client.Probe{Bytes: make([]byte, min(size, 4096))}
	return client.GPUShare{
		Device: m.GPU().UUID(), Size: size, Access: access, Probe: probe,
		Export: func(context.Context) (client.GPUExport, error) {
			r, err := m.Export(offset, size, access == client.ReadWrite)
			if err != nil {
				return nil, err
			}
			if r.Kind == gpu.CUDAIPC {
				return client.CUDAIPC{Handle: r.Chunks[0].Handle, Offset: int(r.Offset)}, nil
			}
			vmm := client.CUDAVMM{Offset: int(r.Offset)}
			for _, c := range r.Chunks {
				vmm.Chunks = append(vmm.Chunks, client.VMMChunk{FD: c.FD, Size: int(c.Size)})
			}
			return vmm, nil
		},
	}, m.Read(offset, probe.Bytes)
}

// buffer is lent memory and a copy of it on the host.
type buffer struct {
	*engine.Memory
	lent   *client.Buffer
	copied []byte
}

func (b *buffer) Lent() *client.Buffer { return b.lent }
func (b *buffer) Bytes() []byte        { return b.copied }
func (b *buffer) Push() error          { return b.Write(0, b.copied) }
func (b *buffer) Pull() error          { return b.Read(0, b.copied) }
