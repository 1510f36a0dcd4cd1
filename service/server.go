package service

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const (
	maxMessageBytes = 1 << 29
	// A message between the lease's limit and this many times as much is refused and the lease goes on.
	// gRPC itself ends a stream whose message is larger still.
	hardLimitFactor = 2

	maxStreamsPerConnection = 256
	streamWindow            = 8 << 20
	connectionWindow        = 16 << 20

	// Clients that ping more often than this are cut off.
	minClientPing = 5 * time.Second

	// stopTimeout is how long Drain, after the grace, leaves the requests that still run.
	stopTimeout = 2 * time.Second
)

// Server serves leases. It is safe for concurrent use.
type Server struct {
	twilightv1.UnimplementedTwilightServiceServer

	config     Config
	logger     *slog.Logger
	validator  protovalidate.Validator
	instanceID []byte
	grpc       *grpc.Server
	health     *health.Server
	fds        *fdsock.Server
	background sync.WaitGroup

	state atomic.Int32 // a state, changed under mu

	mu     sync.Mutex
	leases map[fdsock.LeaseToken]*lease
	// slots counts leases that are in the table, or about to be.
	slots     int
	lastLease uint64
	// idle is closed when, stopping, the last lease is gone.
	idle chan struct{}
}

// The states of a Server.
const (
	starting int32 = iota
	serving
	stopping
)

// newValidator compiles the contract's rules, once: it takes a while, and protovalidate may not do it
// twice at a time.
var newValidator = sync.OnceValues(func() (protovalidate.Validator, error) {
	return protovalidate.New(
		protovalidate.WithFailFast(),
		protovalidate.WithMessages(
			&twilightv1.LeaseRequest{}, &twilightv1.OpenLeaseRequest{}, &twilightv1.GetCapabilitiesRequest{},
		),
	)
})

// New makes a server. It reports NOT_SERVING, and opens no lease, until SelfTest has passed.
func New(config Config) (*Server, error) {
	config = config.withDefaults()
	if err := config.validate(); err != nil {
		return nil, err
	}
	validator, err := newValidator()
	if err != nil {
		return nil, fmt.Errorf("validation rules: %w", err)
	}
	s := &Server{
		config:     config,
		logger:     config.Logger,
		validator:  validator,
		instanceID: make([]byte, 16),
		health:     health.NewServer(),
		leases:     make(map[fdsock.LeaseToken]*lease),
		idle:       make(chan struct{}),
	}
	_, _ = rand.Read(s.instanceID) // never fails
	s.fds = fdsock.NewServer(s.authorizeUID, s.logger)
	s.setHealth(healthpb.HealthCheckResponse_NOT_SERVING)

	unary, stream := s.interceptors()
	s.grpc = grpc.NewServer(
		grpc.Creds(newPeerCredentials(&config)),
		unary, stream,
		grpc.MaxRecvMsgSize(hardLimitFactor*int(config.Limits.MessageBytes)),
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(connectionWindow),
		grpc.KeepaliveParams(config.keepalive),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minClientPing, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true), // memory is released behind running handlers, not under them
	)
	twilightv1.RegisterTwilightServiceServer(s.grpc, s)
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	return s, nil
}

func (s *Server) setHealth(status healthpb.HealthCheckResponse_ServingStatus) {
	s.health.SetServingStatus("", status)
	s.health.SetServingStatus(twilightv1.TwilightService_ServiceDesc.ServiceName, status)
}

// Serve accepts connections from l, which it owns, until Drain. Beside a Unix socket of Listen it opens
// the socket that takes descriptors, with the same permissions. It may be called for several listeners.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	serve, err := s.Attach(ctx, l)
	if err != nil {
		return err
	}
	return serve()
}

// Attach is the first part of Serve: once it returns peers may connect. The rest is the function that it
// returns, which must be called.
func (s *Server) Attach(ctx context.Context, l net.Listener) (serve func() error, err error) {
	var side *net.UnixListener
	if socket, ok := l.(*net.UnixListener); ok {
		if side, err = listenBeside(ctx, socket); err != nil {
			l.Close()
			return nil, err
		}
	}
	return func() error {
		if side != nil {
			var serving sync.WaitGroup
			serving.Go(func() { s.fds.Serve(side) })
			defer serving.Wait()
			defer side.Close()
		}
		if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			return err
		}
		return nil
	}, nil
}

// Healthy is nil while the server reports SERVING.
func (s *Server) Healthy() error {
	switch s.state.Load() {
	case serving:
		return nil
	case stopping:
		return errors.New("draining")
	}
	return errors.New("starting: the devices are being tested")
}

// SelfTest tests every device, then opens the server for leases and reports SERVING. A remote device that
// cannot be used is no hindrance.
func (s *Server) SelfTest(ctx context.Context) error {
	var remotes sync.WaitGroup
	for _, r := range s.config.Remotes {
		remotes.Go(func() { r.Start(ctx) })
	}
	defer remotes.Wait()
	for _, d := range s.config.Devices {
		if err := d.SelfTest(ctx); err != nil {
			return fmt.Errorf("device %s failed its self-test: %w", d.Info().ID, err)
		}
	}
	remotes.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.CompareAndSwap(starting, serving) {
		s.setHealth(healthpb.HealthCheckResponse_SERVING)
	}
	return nil
}

// Drain ends the service: health turns NOT_SERVING, every lease hears Draining, no lease is opened and
// no step begun. After Config.DrainGrace, or once no lease is left, streams are closed behind what
// runs, which is cut off after two more seconds; then devices are closed. If ctx is done before all
// that, what is left is abandoned and an error returned.
func (s *Server) Drain(ctx context.Context) error {
	s.stopOpening(ctx)
	grace := time.NewTimer(s.config.DrainGrace)
	defer grace.Stop()
	select {
	case <-s.idle:
	case <-grace.C:
	case <-ctx.Done():
	}
	s.mu.Lock()
	for _, l := range s.leases {
		l.stop(errDraining())
	}
	s.mu.Unlock()

	stopped := make(chan error, 1)
	go func() {
		cutOff := time.AfterFunc(stopTimeout, s.grpc.Stop)
		s.grpc.GracefulStop()
		cutOff.Stop()
		s.fds.Close()
		s.background.Wait()
		var errs []error
		for _, d := range s.config.Devices {
			errs = append(errs, d.Close())
		}
		stopped <- errors.Join(errs...)
	}()
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
		return fmt.Errorf("draining was cut short: %w", ctx.Err())
	}
}

// stopOpening tells everybody that the service ends.
func (s *Server) stopOpening(ctx context.Context) {
	s.health.Shutdown()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.Swap(stopping) == stopping {
		return
	}
	s.config.Telemetry.Draining()
	for _, r := range s.config.Remotes {
		s.background.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, s.config.DrainGrace+stopTimeout)
			defer cancel()
			r.Drain(ctx)
		})
	}
	for _, l := range s.leases {
		// Not waited for: an engine that does not read must not hold up the others.
		if l.stream == nil {
			s.background.Go(func() { s.expire(l) })
		} else {
			s.background.Go(func() { l.announce("the daemon is shutting down", s.config.DrainGrace) })
		}
	}
	s.checkIdleLocked()
}

// reserve counts a lease that is about to be opened, if there is room for it.
func (s *Server) reserve() (id uint64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state := s.state.Load(); {
	case state == starting:
		return 0, fault.Newf(fault.Unavailable, "", "the daemon is still testing its devices: wait until its health is SERVING")
	case state == stopping:
		return 0, errDraining()
	case s.slots >= s.config.Limits.Leases:
		return 0, fault.Exhaustedf("", 1, 0, "all %d leases of the daemon are taken: end one first", s.config.Limits.Leases)
	}
	s.slots++
	s.lastLease++
	return s.lastLease, nil
}

func errDraining() error {
	return fault.Newf(fault.Unavailable, "", "the daemon is shutting down: open a lease with its successor")
}

func (s *Server) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots--
	s.checkIdleLocked()
}

func (s *Server) checkIdleLocked() {
	if s.state.Load() == stopping && s.slots == 0 {
		select {
		case <-s.idle:
		default:
			close(s.idle)
		}
	}
}

// device finds a device, or one that other processes serve, by the id of a request; "" is the only one.
func (s *Server) device(id string) (gpu.Device, Remote, error) {
	n := len(s.config.Devices) + len(s.config.Remotes)
	if id == "" && n > 1 {
		return nil, nil, fault.Newf(fault.Invalid, "device", "is empty, but there are %d devices: name one of GetCapabilities", n)
	}
	for _, d := range s.config.Devices {
		if id == "" || d.Info().ID == id {
			return d, nil, nil
		}
	}
	for _, r := range s.config.Remotes {
		if id == "" || r.ID() == id {
			return nil, r, nil
		}
	}
	return nil, nil, fault.Newf(fault.NotFound, "device", "there is no device %q: name one of GetCapabilities", id)
}
