//go:build linux && cgo && cuda

package drv

// #cgo noescape drv_memops
// #cgo nocallback drv_memops
// #include <stdlib.h>
// #include "driver.h"
import "C"

import (
	"unsafe"

	"golang.org/x/sys/unix"
	"gorgonia.org/cu"
)

// MemOps are reads and writes of 32-bit words that a stream does in order, as one operation. Words lie
// in device memory, or in memory of the host that the device sees.
type MemOps struct{ ops []C.drv_memop }

// Reset forgets the operations, and keeps their memory.
func (m *MemOps) Reset() { m.ops = m.ops[:0] }

// Write adds a write, behind all that the stream did before.
func (m *MemOps) Write(at Ptr, v uint32) {
	m.ops = append(m.ops, C.drv_memop{operation: C.MEM_OP_WRITE, address: C.CUdeviceptr(at), value: C.uint64_t(v)})
}

// Wait adds a wait until the word is v.
func (m *MemOps) Wait(at Ptr, v uint32) {
	m.ops = append(m.ops, C.drv_memop{operation: C.MEM_OP_WAIT, address: C.CUdeviceptr(at), value: C.uint64_t(v), flags: C.MEM_OP_WAIT_EQ})
}

// WaitAtLeast adds a wait until the word is v or up to 2^31-1 more.
func (m *MemOps) WaitAtLeast(at Ptr, v uint32) {
	m.ops = append(m.ops, C.drv_memop{operation: C.MEM_OP_WAIT, address: C.CUdeviceptr(at), value: C.uint64_t(v)})
}

// maxMemOps is how many operations are handed to the driver at once.
const maxMemOps = 128

// Run lets a stream do them. It does not wait.
func (m *MemOps) Run(s cu.Stream) error {
	for ops := m.ops; len(ops) > 0; {
		n := min(len(ops), maxMemOps)
		if err := check("cuStreamBatchMemOp", C.drv_memops(stream(s), C.uint(n), unsafe.SliceData(ops))); err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}

// Graph is work that a stream can be given at once, again and again.
type Graph struct{ exec C.CUgraphExec }

// Capture makes a graph of what f gives a stream, which does none of it.
func Capture(s cu.Stream, f func() error) (g Graph, err error) {
	if err := check("cuStreamBeginCapture", C.cuStreamBeginCapture_v2(stream(s), C.STREAM_CAPTURE_THREAD_LOCAL)); err != nil {
		return g, err
	}
	failed := f()
	var graph C.CUgraph
	err = check("cuStreamEndCapture", C.cuStreamEndCapture(stream(s), &graph))
	if failed != nil {
		err = failed
	}
	if graph == nil {
		return g, err
	}
	if err == nil {
		err = check("cuGraphInstantiate", C.cuGraphInstantiateWithFlags(&g.exec, graph, 0))
	}
	C.cuGraphDestroy(graph)
	return g, err
}

// Launch gives the graph to a stream.
func (g Graph) Launch(s cu.Stream) error {
	return check("cuGraphLaunch", C.cuGraphLaunch(g.exec, stream(s)))
}

// Destroy frees the graph, which must not be running.
func (g Graph) Destroy() error { return check("cuGraphExecDestroy", C.cuGraphExecDestroy(g.exec)) }

// Done tells whether a stream has done everything.
func Done(s cu.Stream) (bool, error) {
	result := C.cuStreamQuery(stream(s))
	if result == C.NOT_READY {
		return false, nil
	}
	return true, check("cuStreamQuery", result)
}

// Signal counts how often streams came by, and wakes who polls FD each time.
type Signal struct {
	FD int
	c  *C.drv_signal
}

// NewSignal makes a signal. Close it once no stream is to come by.
func NewSignal() (Signal, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return Signal{}, err
	}
	return Signal{fd, C.drv_signal_new(C.int(fd))}, nil
}

// Behind makes a stream come by, behind all it has to do.
func (s Signal) Behind(of cu.Stream) error {
	return check("cuLaunchHostFunc", C.drv_signal_behind(stream(of), s.c))
}

// Count is how often a stream came by, modulo 2^32.
func (s Signal) Count() uint32 { return uint32(C.drv_signal_count(s.c)) }

// Wake wakes who polls FD.
func (s Signal) Wake() {
	one := [8]byte{1}
	_, _ = unix.Write(s.FD, one[:]) // full is as good
}

// Wait waits until it is woken or milliseconds passed; without end if they are negative.
func (s Signal) Wait(milliseconds int) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.FD), Events: unix.POLLIN}}, milliseconds)
	var count [8]byte
	_, _ = unix.Read(s.FD, count[:])
}

// Close frees the signal.
func (s Signal) Close() {
	_ = unix.Close(s.FD)
	C.free(unsafe.Pointer(s.c))
}

// LoadFunction brings a function's code to the device: later, while a stream waits, its first launch
// might block.
func LoadFunction(f cu.Function) error { return check("cuFuncLoad", C.cuFuncLoad(function(f))) }

// HostRegister lets devices see memory of the host, and returns its address there.
func HostRegister(b []byte, writable bool) (at Ptr, err error) {
	flags := C.uint(C.HOST_REGISTER_PORTABLE | C.HOST_REGISTER_MAPPED)
	if !writable {
		flags |= C.HOST_REGISTER_READ_ONLY
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if err := check("cuMemHostRegister", C.cuMemHostRegister_v2(p, C.size_t(len(b)), flags)); err != nil {
		return 0, err
	}
	var d C.CUdeviceptr
	err = check("cuMemHostGetDevicePointer", C.cuMemHostGetDevicePointer_v2(&d, p, 0))
	return Ptr(d), err
}

// HostUnregister undoes HostRegister.
func HostUnregister(b []byte) error {
	return check("cuMemHostUnregister", C.cuMemHostUnregister(unsafe.Pointer(unsafe.SliceData(b))))
}
