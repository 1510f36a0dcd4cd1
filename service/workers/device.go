package workers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

const (
	// Starts that fail in a row are minPause apart, twice as long each time, up to startPause; those after
	// deaths of workers that could serve, but lived for less than sound, up to deathPause.
	minPause   = 250 * time.Millisecond
	startPause = 30 * time.Second
	deathPause = time.Second
	sound      = 10 * time.Second
)

// device is a GPU and its workers.
type device struct {
	supervisor *Supervisor
	gpu        GPU
	settings   Settings
	logger     *slog.Logger

	mu       sync.Mutex
	told     *twilightv1.Device // by the last worker that started
	unusable string             // why the last start failed
	failures int                // in a row
	retryAt  time.Time
	retry    *time.Timer
	draining bool

	starting int
	workers  map[*process]struct{} // until they are reaped
	spares   []*process
	waiting  []waiter
	borrowed int // spares that are asked something
	leases   int
	// wake has an item when more workers may be needed.
	wake chan struct{}
	// empty is closed when, draining, the last worker is reaped.
	empty chan struct{}
}

// waiter waits for a worker: to have it, or to borrow it.
type waiter struct {
	answer  chan started // one item
	borrows bool
}

// started is what became of a start: a worker, or why there is none.
type started struct {
	worker *process
	err    error
}

var _ service.Remote = (*device)(nil)

func newDevice(s *Supervisor, g GPU) *device {
	o := &s.options
	total := cmp.Or(o.ShadowBytes, g.MemoryBytes/2)
	return &device{
		supervisor: s, gpu: g, logger: o.Logger.With("device", g.UUID),
		settings: Settings{
			Device: g.UUID, ShadowBytes: total / uint64(o.Leases), AllowedUIDs: o.AllowedUIDs, DrainGrace: o.DrainGrace,
			LogLevel: o.LogLevel,
		},
		workers: make(map[*process]struct{}), wake: make(chan struct{}, 1), empty: make(chan struct{}),
	}
}

// keep starts workers when they are needed, until the device is drained.
func (d *device) keep(ctx context.Context) {
	for {
		select {
		case <-d.wake:
			d.refill(ctx)
		case <-d.empty:
			return
		}
	}
}

func (d *device) wakeUp() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// ID implements service.Remote.
func (d *device) ID() string { return d.gpu.UUID }

// Start implements service.Remote.
func (d *device) Start(ctx context.Context) {
	if !d.gpu.MPS {
		d.logger.Warn("the GPU has no MPS server: daemon and engine take turns on it, which costs about 0.3 ms at each layer; " +
			"start nvidia-cuda-mps-control and run both under it")
	}
	w, _, err := d.acquire(ctx, true)
	if err != nil {
		d.logger.Error("the GPU cannot be used", "error", err)
		return
	}
	d.giveBack(w, true)
	d.logger.Info("serving a GPU", "name", d.gpu.Name, "capability", d.gpu.Capability, "mps", d.gpu.MPS)
}

// Describe implements service.Remote. Only a query needs a worker.
func (d *device) Describe(ctx context.Context, query *twilightv1.ShadowQuery) *twilightv1.Device {
	answer := d.describe()
	if query == nil || answer.GetUnusable() != "" {
		return answer
	}
	w, _, err := d.acquire(ctx, true)
	if err == nil {
		var told *twilightv1.Device
		if told, err = w.describe(ctx, query); err == nil {
			answer.ShadowBytesPerToken, answer.ShadowRefusal = told.ShadowBytesPerToken, told.GetShadowRefusal()
		}
		d.giveBack(w, true)
	}
	if err != nil {
		answer.ShadowRefusal = status.Convert(err).Message()
	}
	return answer
}

// describe tells what is known.
func (d *device) describe() *twilightv1.Device {
	d.mu.Lock()
	defer d.mu.Unlock()
	told := new(twilightv1.Device)
	if d.told != nil {
		told = proto.CloneOf(d.told)
	}
	o := &d.supervisor.options
	told.Id, told.Backend, told.Name, told.Mps = d.gpu.UUID, "cuda", d.gpu.Name, &d.gpu.MPS
	told.Unusable = d.unusable
	told.ShadowBytesTotal = uint64(o.Leases) * d.settings.ShadowBytes
	told.ShadowBytesFree = uint64(o.Leases-d.leases) * d.settings.ShadowBytes
	return told
}

// Open implements service.Remote.
func (d *device) Open(ctx context.Context, o *service.Opening) (*twilightv1.OpenLeaseResponse, error) {
	if err := d.reserve(); err != nil {
		return nil, err
	}
	opened, err := d.open(ctx, o)
	if err != nil {
		d.release()
	}
	return opened, err
}

func (d *device) open(ctx context.Context, o *service.Opening) (*twilightv1.OpenLeaseResponse, error) {
	begun := time.Now()
	w, warm, err := d.acquire(ctx, false)
	if err != nil {
		return nil, err
	}
	opened, err := w.open(ctx, o, func() {
		d.release()
		o.Ended()
	})
	if err == nil {
		took := time.Since(begun)
		d.supervisor.options.Telemetry.LeasedWorker(warm, took)
		d.logger.Info("worker leased", "worker", w.pid(), "lease", o.ID, "warm", warm, "took", took.String())
		opened.GetDevice().Mps = &d.gpu.MPS
		return opened, nil
	}
	refusal := status.Convert(err)
	switch refusal.Code() {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.Internal, codes.Unknown:
		w.discard() // there may be a lease
		if ctx.Err() == nil && len(refusal.Details()) == 0 {
			err = fault.Newf(fault.Unavailable, "", "the worker ended as it opened the lease (%v): open it anew", w.cmd.ProcessState)
		}
	default: // the request was refused
		d.giveBack(w, false)
	}
	return nil, err
}

// reserve counts a lease, if there is room for it.
func (d *device) reserve() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if most := d.supervisor.options.Leases; d.leases >= most {
		return fault.Exhaustedf("device", 1, 0, "all %d leases of %s are taken: end one first, or allow more (--gpu-leases)", most, d.gpu.UUID)
	}
	d.leases++
	return nil
}

func (d *device) release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.leases--
	d.wakeUp()
}

// acquire takes a spare, or waits for one to start. What is borrowed is not replaced: it will be given back.
func (d *device) acquire(ctx context.Context, borrow bool) (w *process, warm bool, err error) {
	d.mu.Lock()
	if n := len(d.spares); n > 0 {
		w, d.spares = d.spares[n-1], d.spares[:n-1]
		if borrow {
			d.borrowed++
		}
		d.wakeUp()
		d.mu.Unlock()
		return w, true, nil
	}
	if err := d.refusalLocked(); err != nil {
		d.mu.Unlock()
		return nil, false, err
	}
	answer := make(chan started, 1)
	d.waiting = append(d.waiting, waiter{answer, borrow})
	d.wakeUp()
	d.mu.Unlock()
	select {
	case s := <-answer:
		return s.worker, false, s.err
	case <-ctx.Done():
	}
	d.mu.Lock()
	d.waiting = slices.DeleteFunc(d.waiting, func(w waiter) bool { return w.answer == answer })
	d.mu.Unlock()
	select {
	case s := <-answer: // came meanwhile
		if s.worker != nil {
			d.giveBack(s.worker, borrow)
		}
	default:
	}
	return nil, false, ctx.Err()
}

// refusalLocked is why there is no use in waiting for a worker.
func (d *device) refusalLocked() error {
	switch pause := time.Until(d.retryAt); {
	case d.draining:
		return fault.Newf(fault.Unavailable, "", "the daemon is shutting down: open a lease with its successor")
	case pause > 0 && d.unusable != "":
		return fault.Newf(fault.Unavailable, "device", "%s cannot be used (%s): the daemon tries again in %v",
			d.gpu.UUID, d.unusable, pause.Round(100*time.Millisecond))
	}
	return nil
}

// giveBack makes a spare of a worker that has no lease, or ends it.
func (d *device) giveBack(w *process, borrowed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if borrowed {
		d.borrowed--
	}
	d.placeLocked(w)
}

// placeLocked gives a worker to who waits for one longest, or else keeps it as a spare, if one is wanted.
func (d *device) placeLocked(w *process) {
	switch {
	case d.draining || w.gone():
		w.hangUp()
	case len(d.waiting) > 0:
		next := d.waiting[0]
		d.waiting = d.waiting[1:]
		if next.borrows {
			d.borrowed++
		}
		next.answer <- started{worker: w}
	case len(d.spares) < d.wantedLocked():
		d.spares = append(d.spares, w)
	default:
		w.hangUp()
	}
}

// wantedLocked is how many spares can be of use.
func (d *device) wantedLocked() int {
	return min(d.supervisor.options.Spares, d.supervisor.options.Leases-d.leases)
}

// refill starts as many workers as are waited for and wanted as spares.
func (d *device) refill(ctx context.Context) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.draining || time.Now().Before(d.retryAt) {
		return
	}
	takers, borrowers := 0, 0
	for _, w := range d.waiting {
		if w.borrows {
			borrowers = 1
		} else {
			takers++
		}
	}
	for len(d.spares)+d.borrowed+d.starting < takers+max(borrowers, d.wantedLocked()) {
		d.starting++
		go d.bring(ctx)
	}
}

// bring starts a worker.
func (d *device) bring(ctx context.Context) {
	w, told, err := d.launch(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.starting--
	if err == nil {
		d.told, d.unusable = told, ""
		w.ready = time.Now()
		d.supervisor.options.Telemetry.StartedWorker(w.ready.Sub(w.born))
		d.placeLocked(w)
	} else if !d.draining {
		d.unusable = err.Error()
		d.logger.Error("worker did not start", "error", err)
		d.failedLocked(startPause)
		for _, w := range d.waiting {
			w.answer <- started{err: fault.Newf(fault.Unavailable, "device", "%s cannot be used: %s", d.gpu.UUID, d.unusable)}
		}
		d.waiting = nil
	}
	d.supervisor.options.Telemetry.GPU(d.gpu.UUID, d.unusable == "", d.gpu.MPS)
	d.reapedLocked()
}

// launch starts a worker, and returns it once it can serve.
func (d *device) launch(ctx context.Context) (*process, *twilightv1.Device, error) {
	w, err := startProcess(ctx, d)
	if err != nil {
		return nil, nil, err
	}
	starting, cancel := context.WithTimeout(ctx, d.supervisor.options.StartTimeout)
	defer cancel()
	told, err := w.describe(starting, nil)
	if err == nil {
		w.move(telemetry.WorkerSpare)
		go w.watch(ctx)
		return w, told, nil
	}
	switch {
	case status.Code(err) == codes.DeadlineExceeded:
		w.kill(endStartTimeout)
		err = fmt.Errorf("it was not ready within %v", d.supervisor.options.StartTimeout)
	case len(status.Convert(err).Details()) > 0: // the worker's own word
		w.discard()
		err = errors.New(status.Convert(err).Message())
	default:
		w.discard()
		err = errors.New("it ended at its start: " + w.ending())
	}
	return nil, nil, err
}

// failedLocked puts off the next start.
func (d *device) failedLocked(longest time.Duration) {
	pause := min(minPause<<min(d.failures, 10), longest)
	d.failures++
	d.retryAt = time.Now().Add(pause)
	if d.retry != nil {
		d.retry.Stop()
	}
	d.retry = time.AfterFunc(pause, d.wakeUp)
}
