//go:build linux && cgo && cuda

package cuda

import (
	"unsafe"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

// buffer is device memory that grows. Its methods run on the owner's thread.
type buffer struct {
	ptr  drv.Ptr
	size int
}

// reserve makes room for size bytes and loses the content if it has to move. What runs on the buffer
// must have finished.
func (b *buffer) reserve(size int) error {
	if size <= b.size {
		return nil
	}
	size = max(size, 2*b.size, 1<<16)
	if err := b.free(); err != nil {
		return err
	}
	ptr, err := cu.MemAlloc(int64(size))
	if err != nil {
		return drv.Wrap("cuMemAlloc", err)
	}
	b.ptr, b.size = drv.Ptr(ptr), size
	return nil
}

func (b *buffer) free() error {
	ptr := b.ptr
	*b = buffer{}
	if ptr == 0 {
		return nil
	}
	return limbo.free(func() error { return drv.Wrap("cuMemFree", cu.MemFree(cu.DevicePtr(ptr))) })
}

// staging is page-locked memory of the host, through which all copies go.
type staging struct{ data []byte }

// reserve makes room for size bytes and loses the content.
func (s *staging) reserve(size int) error {
	if size <= len(s.data) {
		return nil
	}
	size = max(size, 2*len(s.data), 1<<16)
	if err := s.free(); err != nil {
		return err
	}
	data, err := drv.HostAlloc(size)
	s.data = data
	return err
}

func (s *staging) free() error {
	data := s.data
	s.data = nil
	if data == nil {
		return nil
	}
	return limbo.free(func() error { return drv.HostFree(data) })
}

func upload(to drv.Ptr, from []byte, stream cu.Stream) error {
	if len(from) == 0 {
		return nil
	}
	return drv.Wrap("cuMemcpyHtoDAsync",
		cu.MemcpyHtoDAsync(cu.DevicePtr(to), unsafe.Pointer(unsafe.SliceData(from)), int64(len(from)), stream))
}

func download(to []byte, from drv.Ptr, stream cu.Stream) error {
	if len(to) == 0 {
		return nil
	}
	return drv.Wrap("cuMemcpyDtoHAsync",
		cu.MemcpyDtoHAsync(unsafe.Pointer(unsafe.SliceData(to)), cu.DevicePtr(from), int64(len(to)), stream))
}

func zero(at drv.Ptr, size int, stream cu.Stream) error {
	if size == 0 {
		return nil
	}
	return drv.Wrap("cuMemsetD8Async", cu.MemsetD8Async(cu.DevicePtr(at), 0, int64(size), stream))
}

// uint32s views words of a page-locked memory.
func uint32s(b []byte) []uint32 {
	return unsafe.Slice((*uint32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}

// bytesOf is the memory of a slice of plain values.
func bytesOf[T any](s []T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(s))), len(s)*int(unsafe.Sizeof(*new(T))))
}

// carver hands out aligned parts of a block, to lay it out once and again for its size.
type carver struct{ used int }

const alignment = 256

func (c *carver) take(size int) int {
	at := c.used
	c.used += (size + alignment - 1) / alignment * alignment
	return at
}
