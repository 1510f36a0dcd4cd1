//go:build linux && cgo && cuda

package drv

// #cgo LDFLAGS: -lcuda
// #cgo noescape drv_launch_run
// #cgo nocallback drv_launch_run
// #include <stdlib.h>
// #include "driver.h"
import "C"

import (
	"unsafe"

	"gorgonia.org/cu"
)

// cu.Function has no accessor; the driver's handle is its only field.
const _ = uint(unsafe.Sizeof(uintptr(0)) - unsafe.Sizeof(cu.Function{}))

func function(f cu.Function) C.CUfunction { return *(*C.CUfunction)(unsafe.Pointer(&f)) }

func stream(s cu.Stream) C.CUstream { return C.CUstream(unsafe.Pointer(s.C())) }

// MaxArgs is how many arguments a Launch holds.
const MaxArgs = C.DRV_MAX_ARGS

// Block is memory of C that holds a kernel's first parameter, a struct passed by value. Each launch
// copies it.
type Block struct{ p unsafe.Pointer }

// NewBlock takes zeroed memory of a size. Free it after the launches that use it.
func NewBlock(size int) Block { return Block{C.calloc(1, C.size_t(size))} }

// Pointer returns the block's memory.
func (b Block) Pointer() unsafe.Pointer { return b.p }

// Free releases the block.
func (b Block) Free() { C.free(b.p) }

// Launch is a kernel launch to be run many times. Besides a Block in the first place, arguments are 8
// bytes wide each; the kernel declares pointers and 64-bit integers only. A Launch serves one caller at
// a time.
type Launch struct{ c *C.drv_launch }

// NewLaunch prepares launches of f on s in blocks of the given number of threads. first may be the zero
// Block. Free it.
func NewLaunch(f cu.Function, s cu.Stream, threads int, first Block) Launch {
	return Launch{C.drv_launch_new(function(f), stream(s), C.uint(threads), first.p)}
}

// Free releases the launch's memory. Launches that run are not affected.
func (l Launch) Free() { C.free(unsafe.Pointer(l.c)) }

// Set sets argument i.
func (l Launch) Set(i int, value uint64) { l.c.args[i] = C.uint64_t(value) }

// On sets the stream.
func (l Launch) On(s cu.Stream) { l.c.config.stream = stream(s) }

// Cluster sets how many adjacent blocks form a cluster; 0 launches without clusters.
func (l Launch) Cluster(blocks int) {
	l.c.config.num_attributes = 0
	if blocks > 0 {
		l.c.config.num_attributes = 1
		l.c.cluster.value = [64]byte{byte(blocks), 4: 1, 8: 1}
	}
}

// Threads sets the block's size.
func (l Launch) Threads(n int) { l.c.config.block_x = C.uint(n) }

// Shared sets the block's dynamic shared memory in bytes; above 48 KiB it takes a SetSharedLimit.
func (l Launch) Shared(bytes int) { l.c.config.shared_bytes = C.uint(bytes) }

// Run launches the kernel on a grid of x*y blocks. It neither allocates nor waits.
func (l Launch) Run(x, y int) error {
	l.c.config.grid_x, l.c.config.grid_y = C.uint(x), C.uint(y)
	return check("cuLaunchKernelEx", C.drv_launch_run(l.c))
}

// MaxClusters returns how many clusters of the launch's configuration the device runs at once.
func (l Launch) MaxClusters() (int, error) {
	var n C.int
	saved := l.c.config.grid_x
	l.c.config.grid_x = C.uint(l.c.cluster.value[0])
	err := check("cuOccupancyMaxActiveClusters", C.cuOccupancyMaxActiveClusters(&n, l.c.function, &l.c.config))
	l.c.config.grid_x = saved
	return int(n), err
}

// SetSharedLimit lets launches of f use that much dynamic shared memory.
func SetSharedLimit(f cu.Function, bytes int) error {
	return check("cuFuncSetAttribute",
		C.cuFuncSetAttribute(function(f), C.FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED, C.int(bytes)))
}

// StaticShared is the shared memory that a block of f takes besides the dynamic.
func StaticShared(f cu.Function) (int, error) {
	var n C.int
	err := check("cuFuncGetAttribute", C.cuFuncGetAttribute(&n, C.FUNC_ATTRIBUTE_SHARED, function(f)))
	return int(n), err
}

// MaxShared is the most shared memory that a block can have on a device.
func MaxShared(d cu.Device) (int, error) {
	var n C.int
	err := check("cuDeviceGetAttribute", C.cuDeviceGetAttribute(&n, C.DEVICE_ATTRIBUTE_MAX_SHARED_OPTIN, C.int(d)))
	return int(n), err
}
