//go:build linux && cgo && cuda

package cuda

import (
	"context"
	"os"
	"runtime"
	"sync"

	"gorgonia.org/cu"

	"github.com/twilight-sidecar/twilight/gpu/cuda/internal/drv"
)

// owner is the one thread that calls the driver for a device: contexts are current per thread, and Go
// moves goroutines between threads.
type owner struct {
	calls chan *call
	ended chan struct{}
	pool  sync.Pool
}

type call struct {
	run  func() error
	done chan error
}

// newOwner starts the thread with the device's primary context current.
func newOwner(device cu.Device) (*owner, error) {
	// Streams that wait for words keep the few channels that a process has, above all under MPS. It is read
	// when the context is made.
	const connections = "CUDA_DEVICE_MAX_CONNECTIONS"
	if os.Getenv(connections) == "" {
		if err := os.Setenv(connections, "32"); err != nil {
			return nil, err
		}
	}
	o := &owner{calls: make(chan *call), ended: make(chan struct{})}
	o.pool.New = func() any { return &call{done: make(chan error, 1)} }
	started := make(chan error)
	go o.serve(device, started)
	return o, <-started
}

func (o *owner) serve(device cu.Device, started chan<- error) {
	runtime.LockOSThread() // never unlocked: the thread ends with its goroutine
	defer close(o.ended)
	primary, err := device.RetainPrimaryCtx()
	if err == nil {
		err = cu.SetCurrentContext(primary)
	}
	started <- drv.Wrap("cuDevicePrimaryCtxRetain", err)
	if err != nil {
		return
	}
	for c := range o.calls {
		c.done <- c.run()
	}
	_ = device.ReleasePrimaryCtx() // nothing can be done about it, and the process ends next
}

// do runs f on the thread. Once started f is not interrupted.
func (o *owner) do(ctx context.Context, f func() error) error {
	c := o.pool.Get().(*call)
	c.run = f
	select {
	case o.calls <- c:
	case <-ctx.Done():
		o.pool.Put(c)
		return ctx.Err()
	}
	err := <-c.done
	c.run = nil
	o.pool.Put(c)
	return err
}

// close ends the thread. No call may come after it.
func (o *owner) close() {
	close(o.calls)
	<-o.ended
}
