// Package drv holds the calls of the CUDA driver that gorgonia.org/cu v0.9.6 lacks: launches with
// attributes, function attributes, IPC, virtual memory management and pinned host memory. Their
// prototypes are declared here, so that no CUDA header is needed.
//
// All calls act on the calling thread's current context. Build with the tag cuda.
package drv
