package service

import (
	"context"

	"google.golang.org/grpc/peer"

	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Remote is a device whose leases are served by other processes, each at a socket of its own. It is safe
// for concurrent use.
type Remote interface {
	// ID is the device's, as in gpu.Info.
	ID() string

	// Start readies the device. If that fails the device is unusable, for now, and Describe says why.
	Start(ctx context.Context)

	// Describe tells what the device can do and, unless query is nil, what a shadow would take.
	Describe(ctx context.Context, query *twilightv1.ShadowQuery) *twilightv1.Device

	// Open opens a lease and answers with the endpoint that serves its stream.
	Open(ctx context.Context, o *Opening) (*twilightv1.OpenLeaseResponse, error)

	// Drain ends every lease as Server.Drain does, and the processes with them. What is left when ctx is
	// done is killed. No lease is opened after it.
	Drain(ctx context.Context)
}

// Opening is a lease to be opened for a peer of another server.
type Opening struct {
	Request *twilightv1.OpenLeaseRequest
	// ID is the lease's number, which logs and the budget page name it by.
	ID uint64
	// UID is the peer's user: the lease's stream must come from the same.
	UID uint32
	// Socket is the path of a Unix socket: the one that the peer used for Remote.Open, the one that serves
	// the lease for Server.OpenFor.
	Socket string
	// TraceParent is the W3C trace context of the call, or "".
	TraceParent string
	// Ended is called once, when a lease that was opened is over and all of it released.
	Ended func()
}

// openRemote opens a lease on a device that other processes serve.
func (s *Server) openRemote(
	ctx context.Context, device Remote, id uint64, req *twilightv1.OpenLeaseRequest,
) (*twilightv1.OpenLeaseResponse, error) {
	p, ok := authInfo(ctx).(unixPeer)
	if !ok {
		return nil, fault.Newf(fault.Unsupported, "device",
			"%s is a GPU, whose memory is lent on one host: connect to a Unix socket of the daemon", device.ID())
	}
	return device.Open(ctx, &Opening{
		Request: req, ID: id, UID: p.uid, Socket: p.socket, TraceParent: traceParent(ctx), Ended: s.release,
	})
}

// OpenFor opens a lease for a peer of another server, which has authorized the peer and checked the
// request. Its stream is to come to o.Socket, where the caller serves. Errors are statuses.
func (s *Server) OpenFor(ctx context.Context, o *Opening) (*twilightv1.OpenLeaseResponse, error) {
	ctx = peer.NewContext(ctx, &peer.Peer{AuthInfo: unixPeer{uid: o.UID, socket: o.Socket}})
	ctx = withTraceParent(ctx, o.TraceParent)
	_, err := s.reserve()
	if err != nil {
		return nil, s.toStatus(ctx, err)
	}
	resp, err := s.open(ctx, o.ID, o.Request, o.Ended)
	if err != nil {
		s.release()
	}
	return resp, s.toStatus(ctx, err)
}

// Fail ends every lease by an error, which tells engines why, and opens no more: the device cannot go on.
func (s *Server) Fail(cause error) {
	s.health.Shutdown()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Store(stopping)
	for _, l := range s.leases {
		if l.stream == nil {
			s.background.Go(func() { s.expire(l) })
		} else {
			l.stop(cause)
		}
	}
	s.checkIdleLocked()
}
