package client

import (
	"context"

	"golang.org/x/sys/unix"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// GPUShare is memory of a GPU that the engine has. Whatever may lie in shared memory may lie in it.
type GPUShare struct {
	// Device is the GPU's UUID, "GPU-...", which must be the lease's.
	Device string
	Size   int // bytes
	Access Access
	// Probe, if not nil, must be found by the daemon through its own mapping, or sharing fails with
	// ErrDataLoss.
	Probe *Probe
	// Export says how the daemon finds the memory. It is called when the memory is lent and, from the
	// session's goroutine, whenever it is lent again after a lease was lost.
	Export func(context.Context) (GPUExport, error)
}

// GPUExport is a CUDAIPC, CUDAVMM or CUDAFabric.
type GPUExport interface {
	// lend brings what the message cannot carry to the daemon and names the memory in the message.
	lend(ctx context.Context, l *lease, req *twilightv1.RegisterRegion) error
}

// CUDAIPC is cudaMalloc memory. A Handle holds as long as the allocation is the same. The allocation's size
// should be a multiple of 2 MiB, as PyTorch's are: others the driver maps in small pages for the daemon, which
// reads scattered tokens of a large cache up to 30 times slower then (measured on an H100, driver 580).
type CUDAIPC struct {
	// Handle is what cuIpcGetMemHandle says of the whole allocation: 64 bytes.
	Handle []byte
	// Offset is from the allocation's base, which cuMemGetAddressRange tells, to the first byte lent.
	Offset int
}

// CUDAVMM is memory of the virtual memory management: PyTorch's expandable segments, vLLM's sleep mode.
type CUDAVMM struct {
	// Chunks are the physical chunks that cover the memory, in the order of addresses.
	Chunks []VMMChunk
	// Offset is from the first chunk's start to the first byte lent.
	Offset int
}

// VMMChunk is a whole physical chunk: what cuMemRetainAllocationHandle finds behind an address.
type VMMChunk struct {
	// FD is what cuMemExportToShareableHandle made of it. The session closes it.
	FD   int
	Size int
}

// CUDAFabric is memory as that of CUDAVMM, which has fabric handles.
type CUDAFabric struct {
	Chunks []FabricChunk
	Offset int
}

// FabricChunk is a whole physical chunk.
type FabricChunk struct {
	Handle []byte // 64 bytes
	Size   int
}

// ShareGPU lends memory of a GPU. The engine keeps it allocated until the buffer or the session is closed.
func (s *Session) ShareGPU(ctx context.Context, share GPUShare) (*Buffer, error) {
	switch {
	case share.Size < 1:
		return nil, errorf(ErrInvalid, "size", "is %d; share at least one byte", share.Size)
	case share.Export == nil:
		return nil, errorf(ErrInvalid, "export", "is nil; say how the daemon finds the memory")
	}
	b := &Buffer{
		session: s, fd: -1, size: share.Size, access: share.Access, probe: share.Probe,
		device: share.Device, export: share.Export,
	}
	return b.share(ctx)
}

func (e CUDAIPC) lend(_ context.Context, _ *lease, req *twilightv1.RegisterRegion) error {
	req.Kind = &twilightv1.RegisterRegion_CudaIpc{CudaIpc: &twilightv1.CudaIpc{
		Handle: e.Handle, Offset: uint64(e.Offset),
	}}
	return checkOffset(e.Offset)
}

func (e CUDAVMM) lend(ctx context.Context, l *lease, req *twilightv1.RegisterRegion) error {
	m := &twilightv1.CudaVmm{Offset: uint64(e.Offset)}
	fds := make([]int, len(e.Chunks))
	for i, chunk := range e.Chunks {
		fds[i] = chunk.FD
		defer unix.Close(chunk.FD)
	}
	if err := checkOffset(e.Offset); err != nil {
		return err
	}
	tokens, err := l.sendFDs(ctx, fds...)
	if err != nil {
		return err
	}
	for i, chunk := range e.Chunks {
		m.Chunks = append(m.Chunks, &twilightv1.CudaVmm_Chunk{FdToken: tokens[i][:], Size: uint64(chunk.Size)})
	}
	req.Kind = &twilightv1.RegisterRegion_CudaVmm{CudaVmm: m}
	return nil
}

func (e CUDAFabric) lend(_ context.Context, _ *lease, req *twilightv1.RegisterRegion) error {
	m := &twilightv1.CudaFabric{Offset: uint64(e.Offset)}
	for _, chunk := range e.Chunks {
		m.Chunks = append(m.Chunks, &twilightv1.CudaFabric_Chunk{Handle: chunk.Handle, Size: uint64(chunk.Size)})
	}
	req.Kind = &twilightv1.RegisterRegion_CudaFabric{CudaFabric: m}
	return checkOffset(e.Offset)
}

func checkOffset(offset int) error {
	if offset < 0 {
		return errorf(ErrInvalid, "offset", "is %d; the first byte lent lies at the allocation's base or behind it", offset)
	}
	return nil
}
