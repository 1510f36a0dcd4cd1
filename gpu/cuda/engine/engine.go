//go:build linux && cgo && cuda

package engine

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

// GPU is a device of which the engine has memory. It is safe for concurrent use.
type GPU struct {
	device  cu.Device
	uuid    string
	name    string
	primary cu.CUContext
	module  cu.Module
	sms     int
}

// Open takes the GPU of a UUID, or the only one if that is empty.
func Open(uuid string) (*GPU, error) {
	g := &GPU{}
	var err error
	if g.device, g.uuid, err = drv.Find(uuid); err != nil {
		return nil, err
	}
	if g.name, err = g.device.Name(); err != nil {
		return nil, drv.Wrap("cuDeviceGetName", err)
	}
	if g.sms, err = g.device.Attribute(cu.MultiprocessorCount); err != nil {
		return nil, drv.Wrap("cuDeviceGetAttribute", err)
	}
	if g.primary, err = g.device.RetainPrimaryCtx(); err != nil {
		return nil, drv.Wrap("cuDevicePrimaryCtxRetain", err)
	}
	err = g.do(func() (err error) {
		g.module, err = cu.LoadFatBinary(loadFatbin)
		return drv.Wrap("cuModuleLoadFatBinary", err)
	})
	if err != nil {
		return nil, errors.Join(err, g.Close())
	}
	return g, nil
}

// do runs f with the device's context current, which is a matter of threads, and waits for the device.
func (g *GPU) do(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cu.SetCurrentContext(g.primary); err != nil {
		return drv.Wrap("cuCtxSetCurrent", err)
	}
	if err := f(); err != nil {
		return err
	}
	return drv.Wrap("cuCtxSynchronize", cu.Synchronize())
}

// UUID names the GPU, "GPU-...".
func (g *GPU) UUID() string { return g.uuid }

// Name is the model's.
func (g *GPU) Name() string { return g.name }

// Free is how many bytes of the GPU no process has taken.
func (g *GPU) Free() (bytes int, err error) {
	err = g.do(func() error {
		free, _, err := cu.MemInfo()
		bytes = int(free)
		return drv.Wrap("cuMemGetInfo", err)
	})
	return bytes, err
}

// Close gives the GPU back. Its memory is freed before.
func (g *GPU) Close() error {
	return drv.Wrap("cuDevicePrimaryCtxRelease", g.device.ReleasePrimaryCtx())
}

// largePage is what sizes of allocations are multiples of: others are mapped in small pages where they are
// imported, and random reads of those are 30 times slower.
const largePage = 2 << 20

// Memory is an allocation. It is safe for concurrent use, but for Free.
type Memory struct {
	gpu      *GPU
	kind     gpu.RegionKind
	at       drv.Ptr // behind the headroom
	size     int
	headroom int
	chunks   []drv.Physical
	each     int // bytes of a chunk
}

// Alloc takes size bytes, zeroed: one allocation that can be lent by CUDA IPC, or chunks of the virtual
// memory management (gpu.CUDAVMM). They start headroom bytes inside of what is exported, as an allocator's
// blocks do.
func (g *GPU) Alloc(kind gpu.RegionKind, size, headroom int) (*Memory, error) {
	m := &Memory{gpu: g, kind: kind, size: size, headroom: headroom}
	err := g.do(func() (err error) {
		switch kind {
		case gpu.CUDAIPC:
			var at cu.DevicePtr
			at, err = cu.MemAlloc(int64(size+headroom+largePage-1) / largePage * largePage)
			m.at = drv.Ptr(at) + drv.Ptr(headroom)
			err = drv.Wrap("cuMemAlloc", err)
		case gpu.CUDAVMM:
			err = m.mapChunks()
		default:
			err = fmt.Errorf("%v memory cannot be taken: ask for CUDA IPC or CUDA VMM", kind)
		}
		if err != nil {
			return err
		}
		return drv.Wrap("cuMemsetD8", cu.MemsetD8(cu.DevicePtr(m.at), 0, int64(size)))
	})
	if err != nil {
		return nil, fmt.Errorf("%d bytes of GPU memory: %w", size, err)
	}
	return m, nil
}

func (m *Memory) mapChunks() error {
	granularity, err := drv.Granularity(m.gpu.device)
	if err != nil {
		return err
	}
	// As large as PyTorch's, and larger where there would be very many.
	const common, most = 20 << 20, 1024
	total := uint64(m.size + m.headroom)
	each := (max(common, total/most) + granularity - 1) / granularity * granularity
	if total < each {
		each = granularity
	}
	m.each = int(each)
	n := (total + each - 1) / each
	start, err := drv.Reserve(n * each)
	if err != nil {
		return err
	}
	m.at = start + drv.Ptr(m.headroom)
	for i := range n {
		chunk, err := drv.Create(m.gpu.device, each)
		if err != nil {
			return errors.Join(err, m.unmapChunks())
		}
		m.chunks = append(m.chunks, chunk)
		if err := drv.Map(start+i*each, each, chunk); err != nil {
			return err
		}
	}
	return drv.Allow(start, n*each, m.gpu.device, true)
}

func (m *Memory) unmapChunks() error {
	start, total := m.at-drv.Ptr(m.headroom), uint64(len(m.chunks)*m.each)
	var err error
	if total > 0 {
		err = drv.Unmap(start, total)
	}
	for _, chunk := range m.chunks {
		err = errors.Join(err, chunk.Release())
	}
	return err
}

// Release frees the memory. Who imported it has let go of it before.
func (m *Memory) Release() error {
	return m.gpu.do(func() error {
		if m.kind == gpu.CUDAVMM {
			total := uint64(len(m.chunks) * m.each)
			return errors.Join(m.unmapChunks(), drv.Unreserve(m.at-drv.Ptr(m.headroom), total))
		}
		return drv.Wrap("cuMemFree", cu.MemFree(cu.DevicePtr(m.at-drv.Ptr(m.headroom))))
	})
}

// GPU is what it lies on.
func (m *Memory) GPU() *GPU { return m.gpu }

// Size is in bytes.
func (m *Memory) Size() int { return m.size }

// Address is where it starts for this process's kernels.
func (m *Memory) Address() uint64 { return m.at }

// Write copies data to the memory.
func (m *Memory) Write(offset int, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	return m.gpu.do(func() error {
		return drv.Wrap("cuMemcpyHtoD", cu.MemcpyHtoD(cu.DevicePtr(m.at+drv.Ptr(offset)),
			unsafe.Pointer(unsafe.SliceData(data)), int64(len(data))))
	})
}

// Read fills data from the memory.
func (m *Memory) Read(offset int, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	return m.gpu.do(func() error {
		return drv.Wrap("cuMemcpyDtoH", cu.MemcpyDtoH(unsafe.Pointer(unsafe.SliceData(data)),
			cu.DevicePtr(m.at+drv.Ptr(offset)), int64(len(data))))
	})
}

// Export says how another process finds size bytes at offset. Its descriptors are the caller's to close.
func (m *Memory) Export(offset, size int, writable bool) (*gpu.Region, error) {
	r := &gpu.Region{Kind: m.kind, Size: uint64(size), Writable: writable, Device: m.gpu.uuid}
	err := m.gpu.do(func() error {
		if m.kind == gpu.CUDAIPC {
			handle, err := drv.IPCHandle(m.at)
			if err != nil {
				return err
			}
			base, _, err := drv.AddressRange(m.at)
			r.Offset = m.at - base + uint64(offset)
			r.Chunks = []gpu.Chunk{{FD: -1, Handle: handle[:]}}
			return err
		}
		// Only the chunks that hold the range.
		first, last := (m.headroom+offset)/m.each, (m.headroom+offset+size-1)/m.each
		r.Offset = uint64(m.headroom + offset - first*m.each)
		for _, chunk := range m.chunks[first : last+1] {
			fd, err := chunk.ExportFD()
			if err != nil {
				return err
			}
			r.Chunks = append(r.Chunks, gpu.Chunk{FD: fd, Size: uint64(m.each)})
		}
		return nil
	})
	if err != nil {
		for _, c := range r.Chunks {
			if c.FD >= 0 {
				unix.Close(c.FD)
			}
		}
		return nil, err
	}
	return r, nil
}
