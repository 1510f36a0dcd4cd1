package client

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const (
	protocolVersion = 1
	// tokenKey is the stream's metadata key for the token that OpenLease answered.
	tokenKey = "twilight-lease-bin"
	// closeGrace bounds how long a closed lease waits for the daemon to release what it lent.
	closeGrace = 10 * time.Second
)

// lease is one stream and what OpenLease said of it. It lives until the stream breaks, once.
type lease struct {
	opened *twilightv1.OpenLeaseResponse
	fdPath string           // of the socket that takes descriptors; "" if the daemon is not local
	conn   *grpc.ClientConn // to an endpoint of the stream's own; nil where it shares the client's
	stream grpc.BidiStreamingClient[twilightv1.LeaseRequest, twilightv1.LeaseResponse]
	cancel context.CancelFunc

	draining chan error // what the daemon said, at most once

	sending chan struct{} // holds an item while a message is being sent
	done    chan struct{} // closed once the stream broke and every call was told

	mu     sync.Mutex
	lastID uint64
	calls  map[uint64]*call
	armed  map[armedKey]*Armed // those that no ArmedStepDone came for; nil once the stream broke
	closed bool                // by us
	err    error               // why the stream broke
}

// call is a request in flight.
type call struct {
	// settle, if not nil, sees the outcome before the caller does, and also if the caller has left. It
	// runs on the receiving goroutine.
	settle func(*twilightv1.LeaseResponse, error)
	done   chan struct{} // one item
	res    *twilightv1.LeaseResponse
	err    error
}

var calls = sync.Pool{New: func() any { return &call{done: make(chan struct{}, 1)} }}

func (c *call) finish(res *twilightv1.LeaseResponse, err error) {
	c.res, c.err = res, err
	if c.settle != nil {
		c.settle(res, err)
	}
	c.done <- struct{}{}
}

// wait returns the outcome of a call, or gives it up when ctx ends. The call's answer is then dropped.
func (c *call) wait(ctx context.Context) (*twilightv1.LeaseResponse, error) {
	select {
	case <-c.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	res, err := c.res, c.err
	c.settle, c.res, c.err = nil, nil, nil
	calls.Put(c)
	return res, err
}

// openLease opens a lease and its stream.
func openLease(ctx context.Context, c *Client, req *twilightv1.OpenLeaseRequest) (*lease, error) {
	opened, err := c.service.OpenLease(ctx, req)
	if err != nil {
		return nil, fromStatus(err)
	}
	l := &lease{
		opened:   opened,
		draining: make(chan error, 1),
		sending:  make(chan struct{}, 1),
		done:     make(chan struct{}),
		calls:    make(map[uint64]*call),
		armed:    make(map[armedKey]*Armed),
	}
	service, target := c.service, c.conn.Target()
	if endpoint := opened.GetEndpoint(); endpoint != "" {
		if path, local := strings.CutPrefix(endpoint, "unix://"); local {
			if _, err := os.Stat(path); err != nil {
				endpoint = "unix://" + beside(target, path)
			}
		}
		target = endpoint
		if l.conn, err = c.options.connect(endpoint); err != nil {
			return nil, errorf(ErrInvalid, "endpoint", "the daemon named %q: %v", endpoint, err)
		}
		service = twilightv1.NewTwilightServiceClient(l.conn)
	}
	l.fdPath = beside(target, opened.GetFdEndpoint())
	// The stream outlives the call that opens it.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.cancel = cancel
	stop := context.AfterFunc(ctx, cancel)
	l.stream, err = service.Lease(metadata.AppendToOutgoingContext(streamCtx, tokenKey, string(opened.GetToken())))
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		l.release()
		return nil, fromStatus(err)
	}
	go l.receive()
	return l, nil
}

func (l *lease) release() {
	l.cancel()
	if l.conn != nil {
		l.conn.Close()
	}
}

// close ends the lease. Once it returns, the daemon has let go of all that was lent on it, unless it
// took longer than closeGrace.
func (l *lease) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	grace := time.NewTimer(closeGrace)
	defer grace.Stop()
	select {
	case l.sending <- struct{}{}:
		_ = l.stream.CloseSend()
		<-l.sending
		select {
		case <-l.done:
		case <-grace.C:
		}
	case <-l.done:
	case <-grace.C:
	}
	l.release()
	<-l.done
}

// receive hands every answer to its call until the stream breaks.
func (l *lease) receive() {
	for {
		res, err := l.stream.Recv()
		if err != nil {
			l.fail(err)
			return
		}
		if draining := res.GetDraining(); draining != nil {
			select {
			case l.draining <- errorf(ErrDraining, "", "the daemon is draining (%s) and ends the lease within %d ms",
				draining.GetReason(), draining.GetGraceMs()):
			default: // said before
			}
			continue
		}
		if done := res.GetArmedStepDone(); done != nil {
			l.armedDone(done)
			continue
		}
		l.mu.Lock()
		c := l.calls[res.GetRequestId()]
		delete(l.calls, res.GetRequestId())
		l.mu.Unlock()
		if c == nil {
			continue
		}
		if refused := res.GetError(); refused != nil {
			c.finish(nil, fromProto(refused))
			continue
		}
		c.finish(res, nil)
	}
}

func (l *lease) fail(err error) {
	if errors.Is(err, io.EOF) {
		err = errors.New("the daemon ended it")
	}
	l.mu.Lock()
	if err = fromStatus(err); l.conn != nil && errors.Is(err, ErrUnreachable) {
		err = &Error{Code: ErrUnreachable, cause: err, Message: "the worker that served it ended without a word, " +
			"of which the daemon's log and its metric twilight.worker.ends tell: " + err.Error()}
	}
	l.err = leaseLost(err)
	if l.closed {
		l.err = errClosed
	}
	left, steps := l.calls, l.armed
	l.calls, l.armed = nil, nil
	l.mu.Unlock()
	l.release()
	for _, a := range steps {
		a.end(nil, l.err)
	}
	for _, c := range left {
		c.finish(nil, l.err)
	}
	close(l.done)
}

// start sends a request, whose id it sets. After it returns, req may be used again. An error means
// that nothing was sent and settle is never called; a broken stream is told by the call.
func (l *lease) start(
	ctx context.Context, req *twilightv1.LeaseRequest, settle func(*twilightv1.LeaseResponse, error),
) (*call, error) {
	select {
	case l.sending <- struct{}{}:
		defer func() { <-l.sending }()
	case <-l.done:
		return nil, l.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	req.RequestId = l.lastID + 1
	if size, most := uint64(proto.Size(req)), uint64(l.opened.GetLimits().GetMaxMessageBytes()); most > 0 && size > most {
		e := errorf(ErrExhausted, "", "the request takes %d bytes of at most %d; split the batch, or lend tensors and "+
			"lists in a buffer", size, most)
		e.Requested, e.Available = size, most
		return nil, e
	}
	c := calls.Get().(*call)
	c.settle = settle
	l.mu.Lock()
	if l.calls == nil {
		l.mu.Unlock()
		return nil, l.err
	}
	l.lastID++
	l.calls[l.lastID] = c
	l.mu.Unlock()
	// An error ends the stream: the receiving goroutine learns it too, and tells this call.
	_ = l.stream.Send(req)
	return c, nil
}

// post sends a request whose answer nobody waits for.
func (l *lease) post(req *twilightv1.LeaseRequest) {
	select {
	case l.sending <- struct{}{}:
		defer func() { <-l.sending }()
	case <-l.done:
		return
	}
	l.mu.Lock()
	l.lastID++
	req.RequestId = l.lastID
	l.mu.Unlock()
	_ = l.stream.Send(req)
}

// do sends a request and waits for its answer.
func (l *lease) do(ctx context.Context, req *twilightv1.LeaseRequest) (*twilightv1.LeaseResponse, error) {
	c, err := l.start(ctx, req, nil)
	if err != nil {
		return nil, err
	}
	return c.wait(ctx)
}

// register is do for a request that undo takes back, if ctx ends before the answer is there: requests
// are served in order.
func (l *lease) register(ctx context.Context, req, undo *twilightv1.LeaseRequest) (*twilightv1.LeaseResponse, error) {
	res, err := l.do(ctx, req)
	if err != nil && ctx.Err() != nil {
		go func() { _, _ = l.do(context.WithoutCancel(ctx), undo) }()
	}
	return res, err
}

// giveBack is do for a release, which may have been sent before by a call that was given up.
func (l *lease) giveBack(ctx context.Context, release *twilightv1.LeaseRequest) error {
	_, err := l.do(ctx, release)
	if errors.Is(err, ErrLeaseLost) || errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// sendFDs brings descriptors to the daemon and returns the tokens that name them, once.
func (l *lease) sendFDs(ctx context.Context, fds ...int) ([]fdsock.Token, error) {
	if l.fdPath == "" {
		return nil, errorf(ErrUnsupported, "", "the daemon is on another host, where memory cannot be lent; run it beside the engine")
	}
	tokens, err := fdsock.Send(ctx, l.fdPath, l.opened.GetToken(), fds...)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, &Error{Code: ErrUnreachable, Message: "the daemon did not take descriptors: " + err.Error(), cause: err}
	}
	return tokens, nil
}

// beside finds the socket that the daemon names. A daemon in another container may know its folder by
// another path; then the socket of that name beside the one that was dialled is meant.
func beside(target, named string) string {
	dialled, local := strings.CutPrefix(target, "unix:")
	if !local || named == "" {
		return named
	}
	path := filepath.Join(filepath.Dir(strings.TrimPrefix(dialled, "//")), filepath.Base(named))
	if _, err := os.Stat(path); err != nil {
		return named
	}
	return path
}
