package workers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	workerv1 "github.com/twilight-sidecar/twilight/proto/twilight/worker/v1"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

const (
	// heartbeat is how often a worker is asked for its report.
	heartbeat = time.Second
	// killAfter is how long a worker has to end, once the daemon hung up.
	killAfter = 2 * endTimeout
)

// The ways in which workers end.
const (
	endEnded        = "ended"         // its lease did, or none was wanted
	endFailed       = "failed"        // it could not use the device
	endLost         = "device_lost"   // the device failed under its lease
	endCrashed      = "crashed"       // it died by itself
	endKilled       = "killed"        // somebody else's signal
	endUnresponsive = "unresponsive"  // killed since it did not answer
	endStartTimeout = "start_timeout" // killed since it was not ready in time
	endOverdue      = "overdue"       // killed since it did not end in time
)

// process is a worker, as the daemon knows it.
type process struct {
	device  *device
	cmd     *exec.Cmd
	conn    *grpc.ClientConn
	control workerv1.WorkerServiceClient
	born    time.Time
	ready   time.Time // zero before it can serve; the device's lock guards it
	source  *telemetry.Source
	lease   atomic.Uint64

	exited  chan struct{} // closed when the process is reaped
	hanging sync.Once

	mu     sync.Mutex
	state  telemetry.WorkerState
	reason string // why it was killed, or how it ended
	socket string // of its lease
	over   func() // to be told, once, when the lease is over or the process gone
	report []byte // the last
	said   string // the last line that is no log record
}

// startProcess starts a worker of a device.
func startProcess(ctx context.Context, d *device) (*process, error) {
	conn, control, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	output, log, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	defer log.Close()
	w := &process{device: d, exited: make(chan struct{}), born: time.Now()}
	dialled := false
	w.conn, err = grpc.NewClient("passthrough:///worker",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0), grpc.WithNoProxy(),
		// The driver takes its time before the worker answers; it is StartTimeout that bounds it.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 2 * d.supervisor.options.StartTimeout}),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if dialled { // gRPC dials one at a time
				return nil, errGone
			}
			dialled = true
			return conn, nil
		}),
	)
	if err != nil {
		return nil, errors.Join(err, conn.Close(), output.Close())
	}
	w.control = workerv1.NewWorkerServiceClient(w.conn)
	w.conn.Connect()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.draining {
		err = errGone
	} else {
		w.cmd, err = d.supervisor.start(&d.settings, control, log)
	}
	if err != nil {
		return nil, errors.Join(err, w.conn.Close(), conn.Close(), output.Close())
	}
	d.workers[w] = struct{}{}
	w.source = d.supervisor.options.Telemetry.Gather(w.ask)
	w.move(telemetry.WorkerStarting)
	go w.reap(ctx, output)
	return w, nil
}

// move brings the worker to another state, unless it is gone.
func (w *process) move(to telemetry.WorkerState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.gone() {
		w.moveLocked(to)
	}
}

func (w *process) moveLocked(to telemetry.WorkerState) {
	w.device.supervisor.options.Telemetry.MoveWorker(w.state, to)
	w.state = to
}

func (w *process) is(state telemetry.WorkerState) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state == state
}

// ask asks for a report.
func (w *process) ask(ctx context.Context, sequence uint64) ([]byte, error) {
	if w.is(telemetry.WorkerStarting) {
		return nil, errGone
	}
	told, err := w.control.Report(ctx, &workerv1.ReportRequest{Sequence: sequence})
	return told.GetReport(), err
}

func (w *process) pid() int { return w.cmd.Process.Pid }

// gone tells whether the process is reaped.
func (w *process) gone() bool {
	select {
	case <-w.exited:
		return true
	default:
		return false
	}
}

func (w *process) describe(ctx context.Context, query *twilightv1.ShadowQuery) (*twilightv1.Device, error) {
	told, err := w.control.Describe(ctx, &workerv1.DescribeRequest{Shadow: query})
	return told.GetDevice(), err
}

// open opens the worker's lease. over is called, once, if the lease was opened, when it is over.
func (w *process) open(ctx context.Context, o *service.Opening, over func()) (*twilightv1.OpenLeaseResponse, error) {
	socket := filepath.Join(filepath.Dir(o.Socket), fmt.Sprintf("%s.%d", filepath.Base(o.Socket), w.pid()))
	w.mu.Lock()
	w.socket = socket
	w.mu.Unlock()
	w.lease.Store(o.ID)
	request := proto.CloneOf(o.Request)
	request.Device = "" // a worker has one
	// The stream outlives the call.
	streaming, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	stream, err := w.control.Open(streaming, &workerv1.OpenRequest{
		Request: request, LeaseId: o.ID, Uid: o.UID, Socket: socket, Traceparent: o.TraceParent,
	})
	var first *workerv1.OpenResponse
	if err == nil {
		first, err = stream.Recv()
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		cancel()
		w.lease.Store(0)
		return nil, err
	}
	over = sync.OnceFunc(over)
	w.mu.Lock()
	w.over = over
	gone := w.gone()
	w.mu.Unlock()
	if gone { // and nobody was told
		cancel()
		return nil, errGone
	}
	w.move(telemetry.WorkerLeased)
	go func() {
		defer cancel()
		last, err := stream.Recv() // returns when the lease is over, or the process
		w.mu.Lock()
		w.report = last.GetEnded().GetReport()
		w.mu.Unlock()
		if err == nil {
			over()
		}
		w.hangUp()
	}()
	return first.GetOpened(), nil
}

// hangUp tells a worker to end, and kills it if it does not. It does not wait.
func (w *process) hangUp() {
	w.hanging.Do(func() {
		w.move(telemetry.WorkerEnding)
		go func() {
			w.conn.Close()
			select {
			case <-w.exited:
			case <-time.After(killAfter):
				w.kill(endOverdue)
			}
		}()
	})
}

// discard ends a worker and returns once it is gone.
func (w *process) discard() {
	w.hangUp()
	<-w.exited
}

// kill kills a worker, for a reason, and returns once it is gone.
func (w *process) kill(reason string) {
	w.mu.Lock()
	if w.reason == "" {
		w.reason = reason
	}
	w.mu.Unlock()
	_ = w.cmd.Process.Kill() // it may be gone
	<-w.exited
}

// watch asks for reports, and kills a worker that gives none.
func (w *process) watch(life context.Context) {
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		ctx, cancel := context.WithTimeout(life, w.device.supervisor.options.HealthTimeout)
		err := w.source.Refresh(ctx)
		cancel()
		if w.is(telemetry.WorkerEnding) {
			return
		}
		if err != nil {
			await(w.exited, time.Second) // it may be dying
			w.kill(endUnresponsive)
			return
		}
		select {
		case <-tick.C:
		case <-w.exited:
			return
		}
	}
}

// reap waits for the process to end, passing on what it logs.
func (w *process) reap(ctx context.Context, output *os.File) {
	logged := make(chan struct{})
	go func() {
		defer close(logged)
		w.passOn(ctx, output)
	}()
	_ = w.cmd.Wait() // its state tells more
	_ = output.SetReadDeadline(time.Now().Add(time.Second))
	<-logged
	output.Close()
	w.conn.Close()
	w.mu.Lock()
	if w.reason == "" {
		w.reason = endingOf(w.cmd.ProcessState)
	}
	if w.socket != "" {
		for _, path := range service.Sockets(w.socket) {
			_ = os.Remove(path) // the worker has, unless it was killed
		}
	}
	w.moveLocked(telemetry.NoWorker)
	close(w.exited)
	over := w.over
	w.source.End(w.report)
	w.mu.Unlock()
	w.device.supervisor.options.Telemetry.EndedWorker(w.reason)
	w.device.reaped(ctx, w)
	if over != nil {
		over()
	}
}

// endingOf names the way in which a process ended.
func endingOf(state *os.ProcessState) string {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return endKilled
	}
	switch state.ExitCode() {
	case 0:
		return endEnded
	case exitFailed:
		return endFailed
	case exitLost:
		return endLost
	}
	return endCrashed
}

// ending says how a worker that is gone ended, and what it said last.
func (w *process) ending() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := w.cmd.ProcessState.String()
	if w.said != "" {
		text += ": " + w.said
	}
	return text
}

// reaped takes note of a worker that is gone.
func (d *device) reaped(ctx context.Context, w *process) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.workers, w)
	for i, s := range d.spares {
		if s == w {
			d.spares = append(d.spares[:i], d.spares[i+1:]...)
			break
		}
	}
	level := slog.LevelInfo
	switch {
	case w.reason == endEnded:
		d.failures = 0
	case !w.ready.IsZero(): // those that never were are bring's
		level = slog.LevelWarn
		if time.Since(w.ready) < sound {
			d.failedLocked(deathPause)
		}
	}
	d.logger.Log(ctx, level, "worker ended", "worker", w.pid(), "lease", w.lease.Load(), "reason", w.reason,
		"status", w.cmd.ProcessState.String(), "lived", time.Since(w.born).String())
	d.wakeUp()
	d.reapedLocked()
}

func (d *device) reapedLocked() {
	if d.draining && d.starting == 0 && len(d.workers) == 0 {
		select {
		case <-d.empty:
		default:
			close(d.empty)
		}
	}
}

// Drain implements service.Remote.
func (d *device) Drain(ctx context.Context) {
	d.stop()
	d.mu.Lock()
	for w := range d.workers {
		switch {
		case w.is(telemetry.WorkerLeased):
			go func() { _, _ = w.control.Drain(ctx, &workerv1.DrainRequest{}) }()
		case w.is(telemetry.WorkerStarting): // does not listen yet
			go w.kill(endEnded)
		default:
			w.hangUp()
		}
	}
	d.mu.Unlock()
	select {
	case <-d.empty:
	case <-ctx.Done():
		d.kill()
	}
}

// stop lets no more workers be started. It may be called twice.
func (d *device) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.draining = true
	if d.retry != nil {
		d.retry.Stop()
	}
	for _, w := range d.waiting {
		w.answer <- started{err: d.refusalLocked()}
	}
	d.waiting = nil
	d.reapedLocked()
}

// kill kills every worker, and returns once they are gone.
func (d *device) kill() {
	d.mu.Lock()
	for w := range d.workers {
		go w.kill(endOverdue)
	}
	d.mu.Unlock()
	<-d.empty
}
