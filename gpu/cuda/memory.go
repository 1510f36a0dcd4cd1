//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

// memory is an imported region. The lease's lock guards it.
type memory struct {
	lease    *lease
	size     uint64
	writable bool
	base     drv.Ptr // of the region; 0 once released
	unmap    func() error
}

var _ gpu.Memory = (*memory)(nil)

// mapRegion maps a region and closes its descriptors. It runs on the owner's thread.
func mapRegion(device cu.Device, uuid string, region *gpu.Region) (*memory, error) {
	defer closeAll(region.Chunks)
	if region.Kind == gpu.SharedMemory {
		return nil, fault.Newf(fault.Unsupported, "kind",
			"this device is a GPU and cannot import shared memory: lend GPU memory, or open a lease on the host device")
	}
	if region.Device != uuid {
		return nil, fault.Newf(fault.Invalid, "device",
			"the memory is on %q but the lease on %s: lend memory of the lease's GPU, named by its UUID", region.Device, uuid)
	}
	if region.Size == 0 {
		return nil, fault.Newf(fault.OutOfRange, "size", "the region has no bytes: lend at least one")
	}
	m := &memory{size: region.Size, writable: region.Writable}
	var err error
	switch region.Kind {
	case gpu.CUDAIPC:
		err = m.openIPC(region)
	case gpu.CUDAVMM, gpu.CUDAFabric:
		err = m.mapChunks(device, region)
	default:
		err = fault.Newf(fault.Unsupported, "kind", "regions of %v are not served", region.Kind)
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (m *memory) openIPC(region *gpu.Region) error {
	if len(region.Chunks) != 1 || len(region.Chunks[0].Handle) != drv.HandleBytes {
		return fault.Newf(fault.Invalid, "cuda_ipc.handle",
			"CUDA IPC takes exactly one handle of %d bytes", drv.HandleBytes)
	}
	start, err := drv.IPCOpen((*[drv.HandleBytes]byte)(region.Chunks[0].Handle))
	if err != nil {
		return explainOpen(err)
	}
	m.unmap = func() error { return drv.IPCClose(start) }
	base, size, err := drv.AddressRange(start)
	if err == nil {
		err = m.place(base, size, region.Offset)
	}
	if err != nil {
		return errors.Join(err, m.unmap())
	}
	return nil
}

// place puts the region into a mapping of size bytes.
func (m *memory) place(start drv.Ptr, size, offset uint64) error {
	if offset > size || m.size > size-offset {
		return fault.Newf(fault.OutOfRange, "size",
			"%d bytes at offset %d must lie in the memory, which has %d bytes", m.size, offset, size)
	}
	m.base = start + offset
	return nil
}

func explainOpen(err error) error {
	var code drv.Code
	if !errors.As(err, &code) {
		return err
	}
	const field = "cuda_ipc.handle"
	switch code {
	case drv.InvalidContext:
		return fault.Newf(fault.Precondition, field,
			"the driver takes the memory for the daemon's own, as both processes have the same id in their "+
				"namespaces: set shareProcessNamespace, or hostPID")
	case drv.NotSupported, drv.NotPermitted:
		return fault.Newf(fault.Unsupported, field,
			"the driver shares no memory between processes here (%v), as under MIG and WSL: use a whole GPU on Linux", code)
	case drv.OutOfMemory:
		return fault.Newf(fault.Exhausted, field, "the GPU has no room to map the memory: lend less")
	}
	if code.Sticky() {
		return explain(err)
	}
	return fault.Newf(fault.DataLoss, field,
		"the handle names no live memory (%v): lend memory that is still allocated; what a pool or virtual memory "+
			"management holds (expandable segments, sleep mode) has no such handle, lend its chunks as cuda_vmm", code)
}

// mapChunks maps physical chunks side by side. What fails in between is undone.
func (m *memory) mapChunks(device cu.Device, region *gpu.Region) (err error) {
	name := "cuda_vmm"
	if region.Kind == gpu.CUDAFabric {
		name = "cuda_fabric"
	}
	granularity, err := drv.Granularity(device)
	if err != nil {
		return explain(err)
	}
	total := uint64(0)
	for i, c := range region.Chunks {
		if c.Size == 0 || c.Size%granularity != 0 || c.Size > 1<<48-total {
			return fault.Newf(fault.Invalid, fmt.Sprintf("%s.chunks[%d].size", name, i),
				"%d bytes must be a multiple of the device's granularity %d: give the chunk's whole size", c.Size, granularity)
		}
		total += c.Size
	}
	if err := m.place(0, total, region.Offset); err != nil {
		return err
	}

	start, err := drv.Reserve(total)
	if err != nil {
		return explain(err)
	}
	mapped := uint64(0)
	m.unmap = func() error {
		var unmapped error
		if mapped > 0 {
			unmapped = drv.Unmap(start, mapped)
		}
		return errors.Join(unmapped, drv.Unreserve(start, total))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.unmap())
		}
	}()
	for i, c := range region.Chunks {
		field := fmt.Sprintf("%s.chunks[%d]", name, i)
		chunk, err := importChunk(&c, region.Kind, field)
		if err != nil {
			return err
		}
		err = drv.Map(start+mapped, c.Size, chunk)
		// The mapping holds the memory from here on.
		if err := errors.Join(err, chunk.Release()); err != nil {
			return explainChunk(err, field+".size")
		}
		mapped += c.Size
	}
	if err := drv.Allow(start, total, device, m.writable); err != nil {
		return explainChunk(err, name)
	}
	m.base = start + region.Offset
	return nil
}

func importChunk(c *gpu.Chunk, kind gpu.RegionKind, field string) (drv.Physical, error) {
	if kind == gpu.CUDAVMM {
		if c.FD < 0 {
			return 0, fault.Newf(fault.Invalid, field+".fd_token", "the chunk has no file descriptor: send one")
		}
		chunk, err := drv.ImportFD(c.FD)
		return chunk, explainChunk(err, field+".fd_token")
	}
	if len(c.Handle) != drv.HandleBytes {
		return 0, fault.Newf(fault.Invalid, field+".handle", "a fabric handle has %d bytes", drv.HandleBytes)
	}
	chunk, err := drv.ImportFabric((*[drv.HandleBytes]byte)(c.Handle))
	return chunk, explainChunk(err, field+".handle")
}

func explainChunk(err error, field string) error {
	var code drv.Code
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &code) || code.Sticky():
		return explain(err)
	case code == drv.OutOfMemory:
		return fault.Newf(fault.Exhausted, field, "the GPU has no room to map the memory: lend less")
	}
	return fault.Newf(fault.DataLoss, field,
		"the driver cannot map this as GPU memory (%v): send what cuMemExportToShareableHandle gave for a live chunk of "+
			"the lease's GPU, and its whole size", code)
}

func closeAll(chunks []gpu.Chunk) {
	for _, c := range chunks {
		if c.FD >= 0 {
			unix.Close(c.FD)
		}
	}
}

func (m *memory) Size() uint64 { return m.size }

func (m *memory) Writable() bool { return m.writable }

func (m *memory) Digest(ctx context.Context, offset uint64, length uint32) (sum [32]byte, err error) {
	l := m.lease
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.usable(ctx); err != nil {
		return sum, err
	}
	at, err := m.at(offset, uint64(length), "probe")
	if err != nil {
		return sum, err
	}
	err = l.device.owner.do(ctx, func() error {
		if err := l.back.reserve(int(length)); err != nil {
			return err
		}
		data := l.back.data[:length]
		if err := download(data, at, l.stream); err != nil {
			return err
		}
		if err := l.wait(); err != nil {
			return err
		}
		sum = sha256.Sum256(data)
		return nil
	})
	return sum, explain(err)
}

func (m *memory) Release() error {
	l := m.lease
	l.mu.Lock()
	defer l.mu.Unlock()
	if m.base == 0 {
		return nil
	}
	for c := range l.caches {
		if c.liesIn(m) {
			return fault.Newf(fault.Precondition, "region_id", "a cache lies in the region: release the cache first")
		}
	}
	return l.release(m)
}

// at returns the address of a checked range. field is the place that asks for it.
func (m *memory) at(offset, length uint64, field string) (drv.Ptr, error) {
	if m.base == 0 {
		return 0, fault.Newf(fault.NotFound, field, "the region was released: register it again")
	}
	if offset > m.size || length > m.size-offset {
		return 0, fault.Newf(fault.OutOfRange, field+".offset",
			"%d bytes at offset %d must lie in the region, which has %d bytes", length, offset, m.size)
	}
	return m.base + offset, nil
}

// extent is a range of a memory's bytes, and the field of the request that names it.
type extent struct {
	memory   *memory
	from, to uint64
	field    string
}

func (e extent) overlaps(o extent) bool {
	return e.memory == o.memory && e.from < o.to && o.from < e.to
}
