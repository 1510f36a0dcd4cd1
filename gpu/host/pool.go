package host

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// turn is how long a worker stays with one job while others wait.
const turn = time.Millisecond

// pool runs the tasks of all leases on a fixed number of goroutines.
type pool struct {
	workers sync.WaitGroup

	mu     sync.Mutex
	ready  sync.Cond
	jobs   []*job // those that may have untaken tasks; workers take turns through them
	closed bool
}

// task does task i of a job as a worker, of which there is only one at a time.
type task func(worker, i int) error

// job is n tasks that any worker may take, in ascending order. Its owner reuses it from run to run.
type job struct {
	run     task
	n       int64
	next    atomic.Int64 // first task that is not taken
	stop    atomic.Bool  // leave what is not taken
	skipped atomic.Bool  // some task was left
	done    chan struct{}

	holders int // workers at it; under pool.mu

	mu     sync.Mutex
	err    error // that of the lowest failed task
	failed int64
}

func newJob() *job { return &job{done: make(chan struct{}, 1)} }

func newPool(workers int) *pool {
	p := &pool{}
	p.ready.L = &p.mu
	for id := range workers {
		p.workers.Go(func() { p.work(id) })
	}
	return p
}

// close waits for running jobs and ends the workers.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.ready.Broadcast()
	p.workers.Wait()
}

// do runs tasks 0 to n-1 of j and returns the error of the lowest one that failed. After an error, and
// once ctx is done, tasks that no worker has taken are left, which is an error too; those taken are
// finished first.
func (p *pool) do(ctx context.Context, j *job, n int, run task) error {
	if n == 0 {
		return nil
	}
	j.run, j.n, j.err = run, int64(n), nil
	j.stop.Store(false)
	j.skipped.Store(false)

	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return errClosed
	}
	j.next.Store(0)
	p.jobs = append(p.jobs, j)
	p.mu.Unlock()
	p.ready.Broadcast()

	select {
	case <-j.done:
	case <-ctx.Done():
		j.stop.Store(true)
		<-j.done
	}
	if j.err != nil {
		return j.err
	}
	if j.skipped.Load() {
		return ctx.Err()
	}
	return nil
}

// work is a worker's life.
func (p *pool) work(id int) {
	// Lent memory can vanish: a fault must be a panic, not the end of the process.
	debug.SetPanicOnFault(true)
	for j := p.take(nil); j != nil; j = p.take(j) {
		j.work(id)
	}
}

// take gives prev back and waits for the next job, nil once the pool is closed and has none.
func (p *pool) take(prev *job) *job {
	p.mu.Lock()
	defer p.mu.Unlock()
	if prev != nil {
		prev.holders--
		p.remove(prev)
		if !prev.taken() {
			p.jobs = append(p.jobs, prev) // behind those that wait
		} else if prev.holders == 0 {
			prev.done <- struct{}{}
		}
	}
	for {
		if len(p.jobs) > 0 {
			j := p.jobs[0]
			p.remove(j)
			if j.taken() { // and its last holder will say so
				continue
			}
			p.jobs = append(p.jobs, j)
			j.holders++
			return j
		}
		if p.closed {
			return nil
		}
		p.ready.Wait()
	}
}

func (p *pool) remove(j *job) {
	if i := slices.Index(p.jobs, j); i >= 0 {
		p.jobs = slices.Delete(p.jobs, i, i+1)
	}
}

func (j *job) taken() bool { return j.next.Load() >= j.n }

// work runs tasks of j for a turn.
func (j *job) work(worker int) {
	for start := time.Now(); time.Since(start) < turn; {
		i := j.next.Add(1) - 1
		if i >= j.n {
			return
		}
		if j.stop.Load() {
			j.skipped.Store(true)
		} else if err := j.try(worker, int(i)); err != nil {
			j.fail(i, err)
		}
	}
}

func (j *job) try(worker, i int) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = newCrash(r)
		}
	}()
	return j.run(worker, i)
}

// fail keeps the error of the lowest task. It does not depend on timing: tasks are taken in order, and
// those taken are finished.
func (j *job) fail(i int64, err error) {
	j.stop.Store(true)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil || i < j.failed {
		j.err, j.failed = err, i
	}
}

// crash is a recovered panic.
type crash struct {
	value   any
	stack   []byte
	address uintptr // that could not be read or written, if that was it
}

func newCrash(value any) *crash {
	c := &crash{value: value, stack: debug.Stack()}
	if e, ok := value.(interface{ Addr() uintptr }); ok {
		c.address = e.Addr()
	}
	return c
}

func (c *crash) Error() string { return fmt.Sprintf("panic: %v", c.value) }

// guard runs f, which reads or writes lent memory, on the caller's goroutine.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = newCrash(r)
		}
	}()
	return f()
}

var errClosed = fault.Newf(fault.Unavailable, "", "the device, lease or cache is closed: open it again")
