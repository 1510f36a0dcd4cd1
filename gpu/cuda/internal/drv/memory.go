//go:build linux && cgo && cuda

package drv

// #include "driver.h"
import "C"

import (
	"fmt"
	"unsafe"

	"gorgonia.org/cu"
)

// Ptr is a device address.
type Ptr = uint64

// HandleBytes is the size of an IPC or fabric handle.
const HandleBytes = 64

// UUID returns a device's name, as in "GPU-12345678-...".
func UUID(d cu.Device) (string, error) {
	var u [16]byte
	if err := check("cuDeviceGetUuid", C.cuDeviceGetUuid_v2(unsafe.Pointer(&u), C.int(d))); err != nil {
		return "", err
	}
	return fmt.Sprintf("GPU-%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]), nil
}

// HostAlloc returns page-locked host memory, which copies to and from the device need to run
// asynchronously. Free it with HostFree.
func HostAlloc(size int) ([]byte, error) {
	var p unsafe.Pointer
	if err := check("cuMemHostAlloc", C.cuMemHostAlloc(&p, C.size_t(size), 0)); err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(p), size), nil
}

// HostFree frees memory of HostAlloc.
func HostFree(b []byte) error {
	return check("cuMemFreeHost", C.cuMemFreeHost(unsafe.Pointer(unsafe.SliceData(b))))
}

// AddressRange returns the allocation that p lies in.
func AddressRange(p Ptr) (base Ptr, size uint64, err error) {
	var b C.CUdeviceptr
	var n C.size_t
	err = check("cuMemGetAddressRange", C.cuMemGetAddressRange_v2(&b, &n, C.CUdeviceptr(p)))
	return Ptr(b), uint64(n), err
}

// IPCHandle returns the handle of the allocation that p lies in.
func IPCHandle(p Ptr) (handle [HandleBytes]byte, err error) {
	err = check("cuIpcGetMemHandle",
		C.cuIpcGetMemHandle((*C.CUipcMemHandle)(unsafe.Pointer(&handle)), C.CUdeviceptr(p)))
	return handle, err
}

// IPCOpen maps another process's allocation. Opening it again returns the same address and must be
// closed again.
func IPCOpen(handle *[HandleBytes]byte) (Ptr, error) {
	var p C.CUdeviceptr
	err := check("cuIpcOpenMemHandle", C.cuIpcOpenMemHandle_v2(&p,
		*(*C.CUipcMemHandle)(unsafe.Pointer(handle)), C.IPC_LAZY_PEER_ACCESS))
	return Ptr(p), err
}

// IPCClose ends a mapping of IPCOpen.
func IPCClose(p Ptr) error {
	return check("cuIpcCloseMemHandle", C.cuIpcCloseMemHandle(C.CUdeviceptr(p)))
}

// Physical is a chunk of device memory without an address.
type Physical uint64

// ImportFD takes a chunk that another process exported as a descriptor, which stays the caller's.
func ImportFD(fd int) (Physical, error) {
	var h C.ulonglong
	err := check("cuMemImportFromShareableHandle", C.drv_import(&h, 0, C.int(fd), nil))
	return Physical(h), err
}

// ImportFabric takes a chunk that another process exported as a fabric handle.
func ImportFabric(handle *[HandleBytes]byte) (Physical, error) {
	var h C.ulonglong
	err := check("cuMemImportFromShareableHandle", C.drv_import(&h, 1, -1, unsafe.Pointer(handle)))
	return Physical(h), err
}

// Create takes a new chunk, a multiple of Granularity, that can be exported as a descriptor.
func Create(d cu.Device, size uint64) (Physical, error) {
	var h C.ulonglong
	err := check("cuMemCreate", C.drv_create(&h, C.int(d), C.size_t(size)))
	return Physical(h), err
}

// ExportFD returns a descriptor of the chunk, the caller's to close.
func (p Physical) ExportFD() (int, error) {
	var fd C.int
	err := check("cuMemExportToShareableHandle",
		C.cuMemExportToShareableHandle(unsafe.Pointer(&fd), C.ulonglong(p), C.MEM_HANDLE_POSIX_FD, 0))
	return int(fd), err
}

// Release gives up the handle. The memory goes when it is mapped nowhere either.
func (p Physical) Release() error { return check("cuMemRelease", C.cuMemRelease(C.ulonglong(p))) }

// Granularity is what sizes of chunks and mappings are multiples of.
func Granularity(d cu.Device) (uint64, error) {
	var n C.size_t
	err := check("cuMemGetAllocationGranularity", C.drv_granularity(&n, C.int(d)))
	return uint64(n), err
}

// Reserve takes a range of addresses.
func Reserve(size uint64) (Ptr, error) {
	var p C.CUdeviceptr
	err := check("cuMemAddressReserve", C.cuMemAddressReserve(&p, C.size_t(size), 0, 0, 0))
	return Ptr(p), err
}

// Unreserve gives back a range of Reserve in which nothing is mapped.
func Unreserve(p Ptr, size uint64) error {
	return check("cuMemAddressFree", C.cuMemAddressFree(C.CUdeviceptr(p), C.size_t(size)))
}

// Map puts a whole chunk at p, unreadable until Allow.
func Map(p Ptr, size uint64, chunk Physical) error {
	return check("cuMemMap", C.cuMemMap(C.CUdeviceptr(p), C.size_t(size), 0, C.ulonglong(chunk), 0))
}

// Unmap takes whole chunks out of a range.
func Unmap(p Ptr, size uint64) error {
	return check("cuMemUnmap", C.cuMemUnmap(C.CUdeviceptr(p), C.size_t(size)))
}

// Allow lets a device read, or read and write, mapped addresses.
func Allow(p Ptr, size uint64, d cu.Device, writable bool) error {
	var w C.int
	if writable {
		w = 1
	}
	return check("cuMemSetAccess", C.drv_access(C.CUdeviceptr(p), C.size_t(size), C.int(d), w))
}
