package workers

import (
	"context"
	"errors"
	"io/fs"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	workerv1 "github.com/twilight-sidecar/twilight/proto/twilight/worker/v1"
	"github.com/twilight-sidecar/twilight/service"
)

// endTimeout bounds what a worker does once its lease is over, or the daemon gone.
const endTimeout = 2 * time.Second

// errHungUp is why a worker ends of which nobody wants anything more.
var errHungUp = fault.Newf(fault.Unavailable, "", "the daemon ended: open a lease with its successor")

// worker serves one lease for the daemon at the other end of a connection.
type worker struct {
	workerv1.UnimplementedWorkerServiceServer
	config service.Config

	// Once ready is closed, server can be used, or failed tells why not.
	ready  chan struct{}
	server *service.Server
	failed error

	over    chan struct{} // closed when there is nothing more to serve: the lease ended, or Drain did
	end     func()        // closes over
	serving sync.WaitGroup
}

// serveLease serves the daemon at the other end of control, by the device that open makes, until the lease is
// over, the daemon hangs up or ctx is done. An error tells that the device failed.
func serveLease(ctx context.Context, control *single, hungUp <-chan struct{}, config service.Config, open func(lost func(error)) (gpu.Device, error)) error {
	w := &worker{config: config, ready: make(chan struct{}), over: make(chan struct{})}
	w.end = sync.OnceFunc(func() { close(w.over) })
	server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.UnaryInterceptor(unaryStatus), grpc.StreamInterceptor(streamStatus))
	workerv1.RegisterWorkerServiceServer(server, w)
	w.serving.Go(func() { _ = server.Serve(control) }) // ends by Stop
	defer w.serving.Wait()
	defer stop(server)

	lost := make(chan error, 1)
	started := make(chan error, 1)
	go func() {
		started <- w.start(ctx, open, func(err error) {
			select {
			case lost <- err:
			default: // is known
			}
		})
	}()
	var err error
	select {
	case err = <-started:
	case <-hungUp:
		return nil // whatever the driver is at ends with the process
	case <-ctx.Done():
		return nil
	}
	if err != nil {
		await(hungUp, endTimeout) // the daemon asks why, then hangs up
		return err
	}
	select {
	case <-w.over:
	case <-hungUp:
		w.server.Fail(errHungUp)
	case <-ctx.Done():
		w.server.Fail(errHungUp)
	case err = <-lost:
		w.server.Fail(err)
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	if drainErr := w.server.Drain(ending); drainErr != nil && err == nil {
		w.config.Logger.Warn("the lease was not released in time", "error", drainErr)
	}
	return err
}

// stop stops a server behind its answers: that a lease is over is one.
func stop(server *grpc.Server) {
	cutOff := time.AfterFunc(endTimeout, server.Stop)
	defer cutOff.Stop()
	server.GracefulStop()
}

func await(done <-chan struct{}, most time.Duration) {
	select {
	case <-done:
	case <-time.After(most):
	}
}

// start makes the server, of a device that passes its test.
func (w *worker) start(ctx context.Context, open func(lost func(error)) (gpu.Device, error), lost func(error)) (err error) {
	defer func() {
		if err != nil {
			w.failed = fault.Newf(fault.Unavailable, "", "%v", err)
		}
		close(w.ready)
	}()
	device, err := open(lost)
	if err != nil {
		return err
	}
	w.config.Devices = []gpu.Device{device}
	w.config.Assigned = true
	w.config.Limits.Leases = 1
	if w.server, err = service.New(w.config); err != nil {
		return errors.Join(err, device.Close())
	}
	return w.server.SelfTest(ctx)
}

// wait returns once the server can be used.
func (w *worker) wait(ctx context.Context) error {
	select {
	case <-w.ready:
		return w.failed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Describe implements the worker's service.
func (w *worker) Describe(ctx context.Context, req *workerv1.DescribeRequest) (*workerv1.DescribeResponse, error) {
	if err := w.wait(ctx); err != nil {
		return nil, err
	}
	told, err := w.server.GetCapabilities(ctx, &twilightv1.GetCapabilitiesRequest{Shadow: req.GetShadow()})
	if err != nil {
		return nil, err
	}
	return &workerv1.DescribeResponse{Device: told.GetDevices()[0]}, nil
}

// Open implements the worker's service.
func (w *worker) Open(req *workerv1.OpenRequest, stream grpc.ServerStreamingServer[workerv1.OpenResponse]) error {
	ctx := stream.Context()
	if err := w.wait(ctx); err != nil {
		return err
	}
	ended := make(chan struct{})
	opened, err := w.server.OpenFor(ctx, &service.Opening{
		Request: req.GetRequest(), ID: req.GetLeaseId(), UID: req.GetUid(), Socket: req.GetSocket(),
		TraceParent: req.GetTraceparent(), Ended: func() { close(ended) },
	})
	if err != nil {
		return err
	}
	defer w.end()
	if err := w.listen(ctx, req.GetSocket()); err != nil {
		return err
	}
	opened.Endpoint = "unix://" + req.GetSocket()
	if err := stream.Send(&workerv1.OpenResponse{Event: &workerv1.OpenResponse_Opened{Opened: opened}}); err != nil {
		return err
	}
	select {
	case <-ended:
	case <-ctx.Done():
		return ctx.Err()
	}
	report, err := w.config.Telemetry.Report(ctx, 0)
	if err != nil {
		return err
	}
	return stream.Send(&workerv1.OpenResponse{Event: &workerv1.OpenResponse_Ended{Ended: &workerv1.Ended{Report: report}}})
}

// listen serves a socket, to which engines can connect once it returns.
func (w *worker) listen(ctx context.Context, path string) error {
	perm := fs.FileMode(0o600)
	if len(w.config.AllowedUIDs) > 0 {
		perm = 0o666
	}
	l, err := service.Listen(ctx, path, perm)
	if err != nil {
		return err
	}
	serve, err := w.server.Attach(context.WithoutCancel(ctx), l)
	if err != nil {
		return err
	}
	w.serving.Go(func() { _ = serve() }) // ends by Drain
	return nil
}

// Report implements the worker's service.
func (w *worker) Report(ctx context.Context, req *workerv1.ReportRequest) (*workerv1.ReportResponse, error) {
	report, err := w.config.Telemetry.Report(ctx, req.GetSequence())
	return &workerv1.ReportResponse{Report: report}, err
}

// Drain implements the worker's service.
func (w *worker) Drain(ctx context.Context, _ *workerv1.DrainRequest) (*workerv1.DrainResponse, error) {
	if err := w.wait(ctx); err != nil {
		return nil, err
	}
	defer w.end()
	return &workerv1.DrainResponse{}, w.server.Drain(ctx)
}

func unaryStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	return resp, service.Status(err)
}

func streamStatus(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return service.Status(next(srv, stream))
}
