package service

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	"github.com/twilight-sidecar/twilight/kv"
	"github.com/twilight-sidecar/twilight/pipeline"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

type leaseStream = grpc.BidiStreamingServer[twilightv1.LeaseRequest, twilightv1.LeaseResponse]

// lease is what one engine has here, from OpenLease to the end of its stream.
type lease struct {
	server     *Server
	logger     *slog.Logger
	token      fdsock.LeaseToken
	owner      string // identity of the peer that opened it
	info       gpu.Info
	geometry   *kv.Geometry
	config     *pipeline.Config
	configJSON string
	device     gpu.Lease
	inbox      *fdsock.Inbox // nil if the engine is not local
	limits     *twilightv1.Limits
	expiry     *time.Timer
	telemetry  *telemetry.Lease

	// stream is nil until it arrives. Server.mu guards it till then; after, sending keeps senders apart.
	stream  leaseStream
	sending sync.Mutex
	ended   chan error // see stop
	over    func()     // nil, or told once all is released

	// What follows belongs to the goroutine of serve.
	regions map[uint32]*region
	caches  map[uint32]*cache
	result  gpu.LayerResult
	arming  *cache // on which a step was armed that is not answered yet
	// warnings are those of audits.
	warnings *rate.Sometimes
	told     telemetry.Step // the step that is served
}

// arrival is a request and when it was received.
type arrival struct {
	*twilightv1.LeaseRequest
	at time.Time
}

// serve answers requests in order until the stream ends.
func (l *lease) serve(stream leaseStream) error {
	ctx := stream.Context()
	requests := make(chan arrival)
	broken := make(chan error, 1)
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				broken <- err
				return
			}
			select {
			case requests <- arrival{req, l.telemetry.Received()}:
			case <-ctx.Done():
				l.telemetry.Dropped()
				broken <- ctx.Err()
				return
			}
		}
	}()
	for {
		select {
		case req := <-requests:
			err := l.send(l.answer(ctx, req.LeaseRequest, req.at))
			l.answeredArmed()
			if err != nil {
				return err
			}
		case err := <-broken:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case err := <-l.ended:
			return err
		}
	}
}

// stop ends the stream, by an error, behind the request that runs.
func (l *lease) stop(cause error) {
	select {
	case l.ended <- cause:
	default: // is stopped
	}
}

// close releases everything, behind what runs.
func (l *lease) close() {
	if l.inbox != nil {
		l.inbox.Close()
	}
	if err := l.device.Close(); err != nil {
		l.logger.Error("lease: close", "error", err)
	}
	l.telemetry.Close()
}

func (l *lease) send(resp *twilightv1.LeaseResponse) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	return l.stream.Send(resp)
}

// announce tells the engine that the daemon drains.
func (l *lease) announce(reason string, grace time.Duration) {
	_ = l.send(&twilightv1.LeaseResponse{Response: &twilightv1.LeaseResponse_Draining{
		Draining: &twilightv1.Draining{Reason: reason, GraceMs: uint32(grace.Milliseconds())},
	}})
}

// answer serves a request; whatever is wrong with it, the lease goes on.
func (l *lease) answer(ctx context.Context, req *twilightv1.LeaseRequest, received time.Time) *twilightv1.LeaseResponse {
	ctx = l.begin(ctx, req, received)
	resp := &twilightv1.LeaseResponse{RequestId: req.GetRequestId()}
	if err := l.handle(ctx, req, resp); err != nil {
		resp.Response = &twilightv1.LeaseResponse_Error{Error: l.refuse(ctx, req, err)}
	}
	l.end(req, resp)
	return resp
}

// refuse says an error in the words of the wire, and in the log.
func (l *lease) refuse(ctx context.Context, req *twilightv1.LeaseRequest, err error) *twilightv1.Error {
	e, _ := toError(err)
	if e.GetCode() == twilightv1.ErrorCode_ERROR_CODE_INTERNAL {
		l.logger.ErrorContext(ctx, "request failed", "request_id", req.GetRequestId(), "error", err)
	} else {
		l.logger.DebugContext(ctx, "request refused", "request_id", req.GetRequestId(), "code", e.GetCode(), "field", e.GetField())
	}
	return e
}

func (l *lease) handle(ctx context.Context, req *twilightv1.LeaseRequest, resp *twilightv1.LeaseResponse) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = l.server.panicked(ctx, l.logger, p)
		}
	}()
	if size, limit := uint64(proto.Size(req)), uint64(l.limits.GetMaxMessageBytes()); size > limit {
		return fault.Exhaustedf("", size, limit,
			"the message has %d bytes of at most %d: lend tensors in a region, or split the message", size, limit)
	}
	if err := l.server.validator.Validate(req); err != nil {
		return err
	}
	switch r := req.GetRequest().(type) {
	case *twilightv1.LeaseRequest_RegisterRegion:
		done, err := l.registerRegion(ctx, r.RegisterRegion)
		resp.Response = &twilightv1.LeaseResponse_RegionRegistered{RegionRegistered: done}
		return fault.In("register_region", err)
	case *twilightv1.LeaseRequest_ReleaseRegion:
		resp.Response = &twilightv1.LeaseResponse_RegionReleased{RegionReleased: &twilightv1.RegionReleased{}}
		return fault.In("release_region", l.releaseRegion(r.ReleaseRegion))
	case *twilightv1.LeaseRequest_RegisterCache:
		done, err := l.registerCache(ctx, r.RegisterCache)
		resp.Response = &twilightv1.LeaseResponse_CacheRegistered{CacheRegistered: done}
		return fault.In("register_cache", err)
	case *twilightv1.LeaseRequest_ReleaseCache:
		resp.Response = &twilightv1.LeaseResponse_CacheReleased{CacheReleased: &twilightv1.CacheReleased{}}
		return fault.In("release_cache", l.releaseCache(r.ReleaseCache))
	case *twilightv1.LeaseRequest_Step:
		done, err := l.step(ctx, r.Step)
		resp.Response = &twilightv1.LeaseResponse_StepResult{StepResult: done}
		return fault.In("step", err)
	case *twilightv1.LeaseRequest_Layer:
		done, err := l.layer(ctx, r.Layer)
		resp.Response = &twilightv1.LeaseResponse_LayerResult{LayerResult: done}
		return fault.In("layer", err)
	case *twilightv1.LeaseRequest_CancelStep:
		resp.Response = &twilightv1.LeaseResponse_StepCancelled{StepCancelled: &twilightv1.StepCancelled{}}
		return fault.In("cancel_step", l.cancelStep(r.CancelStep))
	}
	return fault.Newf(fault.Invalid, "request", "is of a kind that this daemon does not know")
}

// begins refuses new work while the daemon drains.
func (l *lease) begins() error {
	if l.server.state.Load() == stopping {
		return errDraining()
	}
	return nil
}
