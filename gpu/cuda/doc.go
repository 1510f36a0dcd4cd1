// Package cuda is the GPU backend: it maps an engine's device memory read-only, holds the shadow on the
// GPU and runs the layers of decode steps in kernels of its own.
//
// All of it is behind the build tag cuda, since a binary that links the driver does not start without
// one: gorgonia.org/cu's init calls cuInit and ends the process if that fails. Only the worker and the
// engine's tools are built with it.
package cuda
