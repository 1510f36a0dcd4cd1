//go:build linux && cgo && cuda

package cuda

import (
	"errors"
	"sync"
)

// limbo holds what is to be given back to the driver while a stream of the process waits for a word: the
// driver would block until the wait ends, and meanwhile all else that calls it.
var limbo waits

type waits struct {
	mu    sync.Mutex
	n     int
	frees []func() error
}

// free gives something back as soon as nothing waits.
func (w *waits) free(f func() error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n > 0 {
		w.frees = append(w.frees, f)
		return nil
	}
	return f()
}

// enter is called before a stream is made to wait. It waits for what is being given back.
func (w *waits) enter() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
}

// waiting tells whether a stream waits.
func (w *waits) waiting() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n > 0
}

// leave says that it does not any more.
func (w *waits) leave() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n--; w.n > 0 {
		return nil
	}
	var errs []error
	for _, f := range w.frees {
		errs = append(errs, f())
	}
	w.frees = nil
	return errors.Join(errs...)
}
