//go:build linux && cgo && cuda

// Command twilight-engine is twilight with a GPU's memory: it replays and benchmarks as an engine whose cache
// lies there. twilight runs it where --device names a GPU; it needs the driver and the build tag cuda.
package main

import (
	"context"
	"errors"
	"os"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/engine"
	"github.com/twilight-sidecar/twilight/internal/cli"
	"github.com/twilight-sidecar/twilight/internal/replay"
)

func main() {
	os.Exit(cli.Main(func(uuid string) (cli.GPU, error) {
		device, err := engine.Open(uuid)
		return &lender{GPU: device, kind: gpu.CUDAIPC}, err
	}))
}

// lender lends memory of a GPU.
type lender struct {
	*engine.GPU
	kind gpu.RegionKind
	all  []*engine.Memory
}

var _ cli.GPU = (*lender)(nil)

// Lend implements replay.Memory.
func (l *lender) Lend(ctx context.Context, s *client.Session, size int, access client.Access) (replay.Buffer, error) {
	m, err := l.Alloc(l.kind, size, 0)
	if err != nil {
		return nil, err
	}
	l.all = append(l.all, m)
	lent, err := lend(ctx, s, m, 0, size, access)
	return &buffer{Memory: m, lent: lent, copied: make([]byte, size)}, err
}

// Close frees all memory and gives the GPU back.
func (l *lender) Close() error {
	var errs []error
	for _, m := range l.all {
		errs = append(errs, m.Release())
	}
	return errors.Join(append(errs, l.GPU.Close())...)
}

// lend lends size bytes of a memory at offset.
func lend(ctx context.Context, s *client.Session, m *engine.Memory, offset, size int, access client.Access) (*client.Buffer, error) {
	return s.ShareGPU(ctx, client.GPUShare{
		Device: m.GPU().UUID(), Size: size, Access: access,
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
	})
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
