//go:build linux && cgo && cuda

package cuda

import (
	"context"
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
	lost  func(error) // once
}

type call struct {
	run  func() error
	done chan error
}

// newOwner starts the thread with the device's primary context current. lost may be nil.
func newOwner(device cu.Device, lost func(error)) (*owner, error) {
	o := &owner{calls: make(chan *call), ended: make(chan struct{}), lost: func(error) {}}
	if lost != nil {
		var once sync.Once
		o.lost = func(err error) { once.Do(func() { lost(err) }) }
	}
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
		err := c.run()
		if sticky(err) {
			o.lost(explain(err))
		}
		c.done <- err
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
