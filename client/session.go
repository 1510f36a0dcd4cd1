package client

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// restoreTimeout bounds one attempt to renew a lease.
const restoreTimeout = 15 * time.Second

var errClosed = errorf(ErrClosed, "", "the session is closed")

// OpenOptions is what a session is opened with. Geometry is required.
type OpenOptions struct {
	// EngineName is for people: shown in logs, traces and the budget page.
	EngineName string
	Geometry   Geometry
	// Config is a Twilight JSON config; "" takes the daemon's default.
	Config string
	// Device is a device id of Capabilities; "" takes the only one.
	Device string
	// OnState, if not nil, is called when the state changes, in order, with the reason where there is
	// one. It must not block, nor call the session but for State.
	OnState func(State, error)
}

// State is how a session stands with the daemon.
type State int

// The states.
const (
	// StateLive: the lease is there.
	StateLive State = iota + 1
	// StateDraining: the daemon accepts no new steps and will soon end the lease.
	StateDraining
	// StateLost: the stream broke; the session is trying to open a fresh lease.
	StateLost
	// StateClosed: Close was called.
	StateClosed
)

func (s State) String() string {
	switch s {
	case StateLive:
		return "live"
	case StateDraining:
		return "draining"
	case StateLost:
		return "lost"
	case StateClosed:
		return "closed"
	}
	return "unknown"
}

// Session is an engine's lease, renewed whenever it is lost: a fresh lease gets the same buffers and
// caches, and the next step of each cache sends its whole tables. It is safe for concurrent use.
type Session struct {
	client  *Client
	request *twilightv1.OpenLeaseRequest
	geom    Geometry
	onState func(State, error)

	end  context.CancelFunc // of the session's goroutine
	over chan struct{}      // closed when it has ended

	// registrations holds an item while buffers and caches change or are registered anew.
	registrations chan struct{}
	buffers       map[uint32]*Buffer
	caches        map[uint32]*Cache
	lastBuffer    uint32
	lastCache     uint32

	mu      sync.Mutex
	lease   *lease // nil while lost
	opened  *twilightv1.OpenLeaseResponse
	state   State
	cause   error
	changed chan struct{} // closed at the next change of state
}

// Open opens a session.
func (c *Client) Open(ctx context.Context, o OpenOptions) (*Session, error) {
	s := &Session{
		client: c,
		geom:   o.Geometry.withDefaults(),
		request: &twilightv1.OpenLeaseRequest{
			ProtocolVersion: protocolVersion,
			EngineId:        engineID(),
			EngineName:      o.EngineName,
			Device:          o.Device,
			Geometry:        o.Geometry.proto(),
			ConfigJson:      o.Config,
		},
		onState:       o.OnState,
		over:          make(chan struct{}),
		registrations: make(chan struct{}, 1),
		buffers:       make(map[uint32]*Buffer),
		caches:        make(map[uint32]*Cache),
		changed:       make(chan struct{}),
	}
	l, err := openLease(ctx, c, s.request)
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	s.end = end
	s.set(StateLive, nil, l)
	go s.run(life, l)
	return s, nil
}

// Config is the config as it runs: JSON, every key with its value.
func (s *Session) Config() string { return s.answer().GetConfigJson() }

// Geometry is what the session was opened with, defaults filled in.
func (s *Session) Geometry() Geometry { return s.geom }

// Device is the device that serves the session; the generated type documents its fields.
func (s *Session) Device() *twilightv1.Device { return s.answer().GetDevice() }

// Limits are the daemon's; the generated type documents its fields.
func (s *Session) Limits() *twilightv1.Limits { return s.answer().GetLimits() }

func (s *Session) answer() *twilightv1.OpenLeaseResponse {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened
}

// State tells how the session stands, and why unless it is live.
func (s *Session) State() (State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state, s.cause
}

// WaitLive waits until the session is live.
func (s *Session) WaitLive(ctx context.Context) error {
	for {
		s.mu.Lock()
		state, cause, changed := s.state, s.cause, s.changed
		s.mu.Unlock()
		switch state {
		case StateLive:
			return nil
		case StateClosed:
			return cause
		default:
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Close ends the lease and frees every buffer of the session. It returns once the daemon has let go of
// them. Calls in flight fail. It may be called twice.
func (s *Session) Close() error {
	s.end()
	<-s.over
	return nil
}

// current is the lease that requests go to.
func (s *Session) current() (*lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease == nil {
		return nil, s.cause
	}
	return s.lease, nil
}

func (s *Session) set(state State, cause error, l *lease) {
	s.mu.Lock()
	s.state, s.cause, s.lease = state, cause, l
	if l != nil {
		s.opened = l.opened
	}
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
	if s.onState != nil {
		s.onState(state, cause)
	}
}

// run renews the lease whenever it is lost, until life ends. It alone changes the state.
func (s *Session) run(life context.Context, l *lease) {
	defer close(s.over)
	draining, born, pause := l.draining, time.Now(), minBackoff
	for l != nil {
		select {
		case reason := <-draining:
			draining = nil
			s.set(StateDraining, reason, l)
		case <-l.done:
			s.set(StateLost, l.err, nil)
			if time.Since(born) > maxBackoff { // else pauses go on growing
				pause = minBackoff
			}
			if l = s.renew(life, &pause); l != nil {
				draining, born = l.draining, time.Now()
				s.set(StateLive, nil, l)
			}
		case <-life.Done():
			s.set(StateClosed, errClosed, nil)
			l.close()
			l = nil
		}
	}
	if state, _ := s.State(); state != StateClosed {
		s.set(StateClosed, errClosed, nil)
	}
	s.registrations <- struct{}{}
	for _, b := range s.buffers {
		b.free()
	}
	clear(s.buffers)
	clear(s.caches)
	<-s.registrations
}

// renew returns a fresh lease with all that the lost one had, or nil once life ends. Before each attempt
// it pauses, each time for longer.
func (s *Session) renew(life context.Context, pause *time.Duration) *lease {
	for {
		jitter := rand.N(*pause / 2) //nolint:gosec // no secret: engines that lost one daemon come back apart
		select {
		case <-time.After(*pause/2 + jitter):
		case <-life.Done():
			return nil
		}
		*pause = min(2**pause, maxBackoff)
		l, err := s.restore(life)
		if err == nil {
			return l
		}
		s.mu.Lock()
		s.cause = leaseLost(err)
		s.mu.Unlock()
	}
}

func (s *Session) restore(life context.Context) (*lease, error) {
	ctx, cancel := context.WithTimeout(life, restoreTimeout)
	defer cancel()
	unlock, err := s.lockRegistrations(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s.client.conn.ResetConnectBackoff()
	l, err := openLease(ctx, s.client, s.request)
	if err != nil {
		return nil, err
	}
	if err := s.registerAll(ctx, l); err != nil {
		l.release()
		<-l.done
		return nil, err
	}
	return l, nil
}

// registerAll registers every buffer, then every cache, in the order they were made.
func (s *Session) registerAll(ctx context.Context, l *lease) error {
	for _, id := range slices.Sorted(maps.Keys(s.buffers)) {
		if err := s.buffers[id].register(ctx, l); err != nil {
			return err
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.caches)) {
		if err := s.caches[id].register(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// lockRegistrations gives the caller, until it calls unlock, the session's buffers and caches.
func (s *Session) lockRegistrations(ctx context.Context) (unlock func(), err error) {
	select {
	case s.registrations <- struct{}{}:
		return func() { <-s.registrations }, nil
	case <-s.over:
		return nil, errClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// add registers a buffer and keeps it.
func (s *Session) add(ctx context.Context, b *Buffer) error {
	unlock, err := s.lockRegistrations(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	l, err := s.current()
	if err != nil {
		return err
	}
	s.lastBuffer++
	b.id = s.lastBuffer
	if err := b.register(ctx, l); err != nil {
		return err
	}
	s.buffers[b.id] = b
	return nil
}
