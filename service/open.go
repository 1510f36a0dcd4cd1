package service

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// tokenKey is the metadata key of a lease's token.
const tokenKey = "twilight-lease-bin"

// OpenLease reserves a device. The lease waits for its stream, then goes with it.
func (s *Server) OpenLease(ctx context.Context, req *twilightv1.OpenLeaseRequest) (*twilightv1.OpenLeaseResponse, error) {
	if s.config.Assigned {
		return nil, fault.Newf(fault.Permission, "", "this is the socket of one lease: open others at the daemon's")
	}
	id, err := s.reserve()
	if err != nil {
		return nil, err
	}
	opened := false
	defer func() { // also behind a panic
		if !opened {
			s.release()
		}
	}()
	resp, err := s.open(ctx, id, req, nil)
	opened = err == nil
	return resp, err
}

// open opens a lease, whose slot is reserved. over, if not nil, is called once the lease is.
func (s *Server) open(
	ctx context.Context, id uint64, req *twilightv1.OpenLeaseRequest, over func(),
) (*twilightv1.OpenLeaseResponse, error) {
	if v := req.GetProtocolVersion(); v < protocolVersionMin || v > protocolVersionMax {
		return nil, fault.Newf(fault.Unsupported, "protocol_version",
			"is %d: this daemon speaks %d to %d", v, protocolVersionMin, protocolVersionMax)
	}
	device, remote, err := s.device(req.GetDevice())
	if err != nil {
		return nil, err
	}
	if remote != nil {
		return s.openRemote(ctx, remote, id, req)
	}
	l, err := s.newLease(ctx, id, req, device)
	if err != nil {
		return nil, err
	}
	l.over = over
	resp := &twilightv1.OpenLeaseResponse{
		ProtocolVersion: req.GetProtocolVersion(),
		Token:           l.token[:],
		Device:          deviceProto(&l.info),
		ConfigJson:      l.configJSON,
		Limits:          l.limits,
		OpenTimeoutMs:   uint32(s.config.OpenTimeout.Milliseconds()),
		InstanceId:      s.instanceID,
	}
	if p, ok := authInfo(ctx).(unixPeer); ok {
		resp.FdEndpoint = p.socket + fdSuffix
	}
	if err := s.admit(l); err != nil {
		l.close()
		return nil, err
	}
	l.logger.Info("lease opened", "peer", l.owner, "device", l.info.ID)
	return resp, nil
}

// newLease checks a request and takes what it asks for.
func (s *Server) newLease(ctx context.Context, id uint64, req *twilightv1.OpenLeaseRequest, device gpu.Device) (*lease, error) {
	geometry, config, err := s.parseModel(req.GetGeometry(), req.GetConfigJson())
	if err != nil {
		return nil, err
	}
	info := device.Info()
	if err := checkGeometry(&info, geometry); err != nil {
		return nil, err
	}
	configJSON, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	opened, err := device.Open(ctx, geometry, config)
	if err != nil {
		return nil, err
	}
	l := &lease{
		server:     s,
		logger:     s.logger.With("lease", id, "engine", req.GetEngineName()),
		owner:      identity(ctx),
		info:       info,
		geometry:   geometry,
		config:     config,
		configJSON: string(configJSON),
		warnings:   newWarnings(),
		device:     opened,
		limits:     s.config.Limits.proto(&info),
		ended:      make(chan error, 1),
		telemetry:  s.newTelemetry(ctx, id, req.GetEngineName(), &info, geometry, config),
		regions:    make(map[uint32]*region),
		caches:     make(map[uint32]*cache),
	}
	_, _ = rand.Read(l.token[:]) // never fails
	if p, ok := authInfo(ctx).(unixPeer); ok {
		l.inbox = s.fds.Open(l.token, p.uid, s.config.Limits.Descriptors)
	}
	return l, nil
}

// admit lets an opened lease wait for its stream.
func (s *Server) admit(l *lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.Load() == stopping {
		return errDraining()
	}
	s.leases[l.token] = l
	l.expiry = time.AfterFunc(s.config.OpenTimeout, func() { s.expire(l) })
	return nil
}

// expire drops a lease whose stream has not arrived.
func (s *Server) expire(l *lease) {
	s.mu.Lock()
	waits := s.leases[l.token] == l && l.stream == nil
	if waits {
		delete(s.leases, l.token)
		l.expiry.Stop()
	}
	s.mu.Unlock()
	if waits {
		l.logger.Warn("lease dropped: its stream did not arrive")
		s.finish(l)
	}
}

// finish releases a lease that is in no table.
func (s *Server) finish(l *lease) {
	l.close()
	s.release()
	if l.over != nil {
		l.over()
	}
}

// Lease serves the stream of an opened lease.
func (s *Server) Lease(stream grpc.BidiStreamingServer[twilightv1.LeaseRequest, twilightv1.LeaseResponse]) error {
	l, err := s.attach(stream)
	if err != nil {
		return err
	}
	defer s.detach(l)
	return l.serve(stream)
}

// attach gives a waiting lease its stream, by the token that the stream brings.
func (s *Server) attach(stream leaseStream) (*lease, error) {
	ctx := stream.Context()
	values := metadata.ValueFromIncomingContext(ctx, tokenKey)
	if len(values) != 1 || len(values[0]) != fdsock.LeaseTokenLen {
		return nil, fault.Newf(fault.Invalid, "",
			"the stream's metadata must have one %s, of the %d bytes that OpenLease answered", tokenKey, fdsock.LeaseTokenLen)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.leases[fdsock.LeaseToken([]byte(values[0]))]
	switch {
	case s.state.Load() == stopping:
		return nil, errDraining()
	case l == nil || l.stream != nil:
		return nil, fault.Newf(fault.NotFound, "",
			"no lease waits for this token: it was used, or came too late; open a new lease")
	case l.owner != identity(ctx):
		return nil, fault.Newf(fault.Permission, "", "the lease was opened by another peer: open one of your own")
	}
	l.expiry.Stop()
	l.stream = stream
	return l, nil
}

// detach releases a lease whose stream ends.
func (s *Server) detach(l *lease) {
	s.mu.Lock()
	delete(s.leases, l.token)
	s.mu.Unlock()
	s.finish(l)
	l.logger.Info("lease ended")
}
