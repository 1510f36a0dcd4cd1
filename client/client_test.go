package client_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Every code of the wire has a sentinel, and its particulars arrive.
func TestRefusals(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	_, cache := f.cache(nil)
	step := f.step(cache, batch(8, 0))
	for number, name := range twilightv1.ErrorCode_name {
		if number == 0 {
			continue
		}
		f.answer = func(s *stream, req *twilightv1.LeaseRequest) bool {
			s.reply(refuse(req, &twilightv1.Error{
				Code: twilightv1.ErrorCode(number), Field: "layer.p[0]", Message: "is 2; at most 1", Requested: 5, Available: 4,
			}))
			return true
		}
		_, err := step.Layer(t.Context(), client.Layer{})
		var e *client.Error
		if !errors.As(err, &e) || !errors.Is(err, client.Code(number)) {
			t.Errorf("%s: got %v", name, err)
			continue
		}
		if e.Field != "layer.p[0]" || e.Requested != 5 || e.Available != 4 || err.Error() != "layer.p[0]: is 2; at most 1" {
			t.Errorf("%s: particulars are %+v", name, e)
		}
		if strings.Contains(e.Code.Error(), "error code") {
			t.Errorf("%s has no text", name)
		}
	}
	f.answer = nil
	if _, err := step.Layer(t.Context(), client.Layer{}); err != nil {
		t.Errorf("after refusals: %v", err)
	}
}

func TestOpenRefused(t *testing.T) {
	t.Parallel()
	detailed, err := status.New(codes.FailedPrecondition, "text").WithDetails(&twilightv1.Error{
		Code: twilightv1.ErrorCode_ERROR_CODE_STALE_GENERATION, Field: "f", Message: "m",
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		err  error
		want error
	}{
		{detailed.Err(), client.ErrStaleGeneration},
		{status.Error(codes.InvalidArgument, "t"), client.ErrInvalid},
		{status.Error(codes.NotFound, "t"), client.ErrNotFound},
		{status.Error(codes.AlreadyExists, "t"), client.ErrAlreadyExists},
		{status.Error(codes.FailedPrecondition, "t"), client.ErrPrecondition},
		{status.Error(codes.OutOfRange, "t"), client.ErrOutOfRange},
		{status.Error(codes.Unimplemented, "t"), client.ErrUnsupported},
		{status.Error(codes.ResourceExhausted, "t"), client.ErrExhausted},
		{status.Error(codes.PermissionDenied, "t"), client.ErrPermission},
		{status.Error(codes.Unauthenticated, "t"), client.ErrPermission},
		{status.Error(codes.DataLoss, "t"), client.ErrDataLoss},
		{status.Error(codes.Unavailable, "t"), client.ErrUnreachable},
		{status.Error(codes.Canceled, "t"), context.Canceled},
		{status.Error(codes.DeadlineExceeded, "t"), context.DeadlineExceeded},
		{status.Error(codes.Unknown, "t"), client.ErrInternal},
	} {
		f := newFake(t)
		f.refuse = func() error { return tc.err }
		_, err := f.dial().Open(t.Context(), client.OpenOptions{Geometry: geometry})
		var e *client.Error
		if !errors.Is(err, tc.want) || !errors.As(err, &e) {
			t.Errorf("%v became %v, want %v", tc.err, err, tc.want)
		}
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	c, err := client.Dial("unix://" + filepath.Join(t.TempDir(), "nobody"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry}); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("open: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := c.WaitServing(ctx); !errors.Is(err, client.ErrUnreachable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting: %v", err)
	}
	c, err = client.Dial("tcp://127.0.0.1:1", client.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Health(t.Context()); !errors.Is(err, client.ErrUnreachable) || strings.Contains(err.Error(), "resolver") {
		t.Errorf("nobody on TCP: %v", err)
	}
	if _, err := client.Dial("dns://%"); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("no target: %v", err)
	}
}

// Answers find their calls in whatever order they come.
func TestCallsInFlight(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	_, cache := f.cache(nil)
	step := f.step(cache, batch(8, 0))
	const n = 8
	var held []*twilightv1.LeaseRequest
	f.answer = func(s *stream, req *twilightv1.LeaseRequest) bool {
		if held = append(held, req); len(held) == n {
			for _, req := range slices.Backward(held) {
				s.reply(accept(req))
			}
		}
		return true
	}
	var flying sync.WaitGroup
	for i := range n {
		flying.Go(func() {
			res, err := step.Layer(t.Context(), client.Layer{Layer: i})
			if err != nil || !slices.Equal(res.Kept, []uint32{uint32(i)}) {
				t.Errorf("layer %d: got %v, %v", i, res, err)
			}
		})
	}
	flying.Wait()
	for i, req := range held {
		if i > 0 && req.GetRequestId() != held[i-1].GetRequestId()+1 {
			t.Errorf("request ids %d and %d follow each other", held[i-1].GetRequestId(), req.GetRequestId())
		}
	}
}

// A call that is given up leaves the stream, and what the SDK knows of the daemon, intact.
func TestCancelledCalls(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session, cache := f.cache(nil)
	step := f.step(cache, batch(8, 0))

	release, arrived := make(chan struct{}), make(chan struct{}, 1)
	f.answer = func(_ *stream, _ *twilightv1.LeaseRequest) bool {
		arrived <- struct{}{}
		<-release
		return false
	}
	cancelled := func(what string, call func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- call(ctx) }()
		<-arrived
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want %v", what, err, context.Canceled)
		}
		release <- struct{}{}
	}
	cancelled("layer", func(ctx context.Context) error {
		_, err := step.Layer(ctx, client.Layer{Layer: 5})
		return err
	})
	cancelled("step", func(ctx context.Context) error {
		_, err := cache.Step(ctx, batch(17, 0, 1))
		return err
	})
	// A registration that is given up is taken back.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := session.NewBuffer(ctx, 4096, client.ReadOnly)
		done <- err
	}()
	<-arrived
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("buffer: got %v", err)
	}
	release <- struct{}{}
	<-arrived
	release <- struct{}{}
	f.mu.Lock()
	registered, released := f.requests[len(f.requests)-2].GetRegisterRegion(), f.requests[len(f.requests)-1].GetReleaseRegion()
	f.mu.Unlock()
	if registered.GetRegionId() == 0 || registered.GetRegionId() != released.GetRegionId() {
		t.Errorf("%v was followed by %v", registered, released)
	}

	close(release)
	go func() {
		for range arrived {
		}
	}()
	defer close(arrived)
	if res, err := step.Layer(t.Context(), client.Layer{Layer: 6}); err != nil || res.Kept[0] != 6 {
		t.Errorf("next layer: %v, %v", res, err)
	}
	// The step that was given up has been accepted: its tables need not be sent again.
	f.step(cache, batch(33, 0, 1, 2))
	steps := f.steps()
	if last := steps[len(steps)-1].GetTable(); !slices.Equal(last.GetEntries(), []int32{2}) || last.GetStarts()[0] != 2 {
		t.Errorf("the next step sent %v", last)
	}
}

func TestRefusedStepIsSentAgain(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	_, cache := f.cache(nil)
	refused := false
	f.answer = func(s *stream, req *twilightv1.LeaseRequest) bool {
		if refused {
			return false
		}
		refused = true
		s.reply(refuse(req, &twilightv1.Error{Code: twilightv1.ErrorCode_ERROR_CODE_RESOURCE_EXHAUSTED}))
		return true
	}
	b := batch(17, 4, 5)
	b.Trace = client.Trace{Parent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", State: "a=b"}
	if _, err := cache.Step(t.Context(), b); !errors.Is(err, client.ErrExhausted) {
		t.Fatalf("got %v", err)
	}
	f.step(cache, b)
	steps := f.steps()
	if got := steps[1]; !slices.Equal(got.GetTable().GetEntries(), []int32{4, 5}) || got.GetStepId() <= steps[0].GetStepId() ||
		got.GetTraceparent() != b.Trace.Parent || got.GetTracestate() != "a=b" {
		t.Errorf("the second time: %v", got)
	}
}

func TestMessageLimit(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	_, cache := f.cache(nil)
	step := f.step(cache, batch(8, 0))
	var e *client.Error
	_, err := step.Layer(t.Context(), client.Layer{Query: make([]byte, 4096)})
	if !errors.Is(err, client.ErrExhausted) || !errors.As(err, &e) || e.Available != 4096 || e.Requested <= 4096 {
		t.Errorf("a layer too large: %v", err)
	}
	if _, err := step.Layer(t.Context(), client.Layer{Query: make([]byte, 4000)}); err != nil {
		t.Errorf("a layer just within: %v", err)
	}
	big := make([]int32, 5000)
	for i := range big {
		big[i] = int32(i % 8)
	}
	if _, err := cache.Step(t.Context(), batch(80000, big...)); !errors.Is(err, client.ErrExhausted) {
		t.Errorf("a step too large: %v", err)
	}
	f.step(cache, batch(9, 0))
}

// states records what a session says of itself.
type states chan client.State

func (s states) record(state client.State, _ error) { s <- state }

func (s states) expect(t *testing.T, want ...client.State) {
	t.Helper()
	for _, w := range want {
		select {
		case got := <-s:
			if got != w {
				t.Fatalf("state %v, want %v", got, w)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("state %v never came", w)
		}
	}
}

func TestLeaseLost(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	seen := make(states, 10)
	session, cache := f.cache(seen.record)
	seen.expect(t, client.StateLive)
	step := f.step(cache, batch(17, 0, 1))

	arrived := make(chan struct{})
	f.answer = func(_ *stream, req *twilightv1.LeaseRequest) bool {
		if req.GetLayer() == nil {
			return false
		}
		arrived <- struct{}{}
		return true
	}
	var refusals sync.WaitGroup
	refusals.Add(2)
	tries := 0
	f.refuse = func() error { // the daemon is away for a while
		if tries++; tries <= 2 {
			refusals.Done()
			return status.Error(codes.Unavailable, "away")
		}
		return nil
	}
	flying := make(chan error)
	go func() {
		_, err := step.Layer(t.Context(), client.Layer{})
		flying <- err
	}()
	<-arrived
	f.last().broken <- status.Error(codes.Unavailable, "killed")
	if err := <-flying; !errors.Is(err, client.ErrLeaseLost) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("in flight: %v", err)
	}
	seen.expect(t, client.StateLost)
	if state, err := session.State(); state == client.StateLost && !errors.Is(err, client.ErrLeaseLost) {
		t.Errorf("state %v because of %v", state, err)
	}
	refusals.Wait()
	if err := session.WaitLive(t.Context()); err != nil {
		t.Fatal(err)
	}
	seen.expect(t, client.StateLive)
	if _, err := step.Layer(t.Context(), client.Layer{}); !errors.Is(err, client.ErrLeaseLost) {
		t.Errorf("a step of the lost lease: %v", err)
	}

	// The fresh lease has the buffer and the cache, and is told the whole table.
	f.mu.Lock()
	var again []*twilightv1.LeaseRequest
	for i, req := range f.requests {
		if req.GetLayer() != nil {
			again = f.requests[i+1:]
		}
	}
	f.mu.Unlock()
	if len(again) != 2 || again[0].GetRegisterRegion().GetRegionId() != 1 || again[1].GetRegisterCache().GetCacheId() != 1 {
		t.Errorf("registered again: %v", again)
	}
	b := batch(18, 0, 1)
	b.Sequences[0].UnchangedPrefix = 16
	f.step(cache, b)
	steps := f.steps()
	last := steps[len(steps)-1]
	if !slices.Equal(last.GetTable().GetEntries(), []int32{0, 1}) || len(last.GetClaims().GetUnchangedPrefix()) != 0 {
		t.Errorf("first step of the fresh lease: %v", last)
	}

	if err := session.Close(); err != nil {
		t.Error(err)
	}
	seen.expect(t, client.StateClosed)
	if _, err := cache.Step(t.Context(), b); !errors.Is(err, client.ErrClosed) {
		t.Errorf("step after Close: %v", err)
	}
	if err := session.WaitLive(t.Context()); !errors.Is(err, client.ErrClosed) {
		t.Errorf("waiting after Close: %v", err)
	}
	if _, err := session.NewBuffer(t.Context(), 1, client.ReadOnly); !errors.Is(err, client.ErrClosed) {
		t.Errorf("buffer after Close: %v", err)
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
}

func TestCloseWhileLost(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	seen := make(states, 10)
	session, _ := f.cache(seen.record)
	f.refuse = func() error { return status.Error(codes.Unavailable, "away") }
	f.last().broken <- nil
	seen.expect(t, client.StateLive, client.StateLost)
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	seen.expect(t, client.StateClosed)
}

func TestDraining(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	seen := make(states, 10)
	session, _ := f.cache(seen.record)
	f.last().reply(&twilightv1.LeaseResponse{Response: &twilightv1.LeaseResponse_Draining{
		Draining: &twilightv1.Draining{Reason: "upgrade", GraceMs: 500},
	}})
	seen.expect(t, client.StateLive, client.StateDraining)
	if _, err := session.State(); !errors.Is(err, client.ErrDraining) || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("draining because of %v", err)
	}
	f.last().broken <- nil
	seen.expect(t, client.StateLost, client.StateLive)
}

// A GPU worker serves the stream on an endpoint of its own.
func TestOwnEndpoint(t *testing.T) {
	t.Parallel()
	daemon, worker := newFake(t), newFake(t)
	daemon.opened.Endpoint = worker.serveUnix()
	daemon.opened.FdEndpoint = worker.opened.GetFdEndpoint()
	c, err := client.Dial(daemon.serveUnix())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.NewBuffer(t.Context(), 1, client.ReadOnly); err != nil {
		t.Fatal(err)
	}
	if len(daemon.streams) != 0 || len(worker.streams) != 1 || worker.tokens[0] != string(leaseToken[:]) {
		t.Errorf("%d streams at the daemon, %d at the worker, tokens %q", len(daemon.streams), len(worker.streams), worker.tokens)
	}
}

// An engine may know the sockets' folder by another path than the daemon.
func TestEndpointInAnotherFolder(t *testing.T) {
	t.Parallel()
	daemon, worker := newFake(t), newFake(t)
	socket := strings.TrimPrefix(worker.serveUnix(), "unix://")
	target := daemon.serveUnix()
	beside := filepath.Join(filepath.Dir(strings.TrimPrefix(target, "unix://")), "worker")
	if err := os.Symlink(socket, beside); err != nil {
		t.Fatal(err)
	}
	daemon.opened.Endpoint = "unix:///folder/of/the/daemon/worker"
	c, err := client.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	arrived := func() bool {
		worker.mu.Lock()
		defer worker.mu.Unlock()
		return len(worker.streams) == 1
	}
	for !arrived() {
		if state, err := s.State(); state != client.StateLive {
			t.Fatalf("the stream did not arrive at the worker: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
}

// claim takes the descriptor that a registration names, as a daemon would.
func (f *fake) claim(r *twilightv1.RegisterRegion) int {
	f.t.Helper()
	fds, missing := f.inbox.Claim([]fdsock.Token{fdsock.Token(r.GetSharedMemory().GetFdToken())})
	if missing >= 0 {
		f.t.Fatal("the descriptor was not sent")
	}
	return fds[0]
}

func TestBuffers(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session := f.open(nil)
	for _, access := range []client.Access{client.ReadOnly, client.ReadWrite} {
		b, err := session.NewBuffer(t.Context(), 5000, access)
		if err != nil {
			t.Fatal(err)
		}
		r := f.requests[len(f.requests)-1].GetRegisterRegion()
		fd := f.claim(r)
		defer unix.Close(fd)
		if r.GetSize() != 5000 || r.GetAccess() != twilightv1.Access(access) || b.Size() != 5000 || len(b.Bytes()) != 5000 {
			t.Errorf("lent %v of %d bytes", r, b.Size())
		}
		theirs, err := unix.Mmap(fd, 0, 5000, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Munmap(theirs) }()
		if copy(b.Bytes()[4990:], "engine"); string(theirs[4990:4996]) != "engine" {
			t.Error("the daemon does not see what the engine writes")
		}
		writable, err := unix.Mmap(fd, 0, 5000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err == nil {
			copy(writable, "daemon")
			defer func() { _ = unix.Munmap(writable) }()
		}
		if (err == nil) != (access == client.ReadWrite) {
			t.Errorf("access %d: mapping for writing: %v", access, err)
		}
		if access == client.ReadWrite && string(b.Bytes()[:6]) != "daemon" {
			t.Error("the engine does not see what the daemon writes")
		}
		if unix.Ftruncate(fd, 0) == nil {
			t.Error("the daemon shrank the memory")
		}
		if err := b.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if err := b.Close(t.Context()); !errors.Is(err, client.ErrClosed) {
			t.Errorf("closed twice: %v", err)
		}
	}
	if _, err := session.NewBuffer(t.Context(), 0, client.ReadOnly); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("no bytes: %v", err)
	}
}

func TestShareFD(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session := f.open(nil)
	file, err := os.Create(filepath.Join(t.TempDir(), "kv"))
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("0123456789abcdef"), 512)
	if _, err := file.Write(content); err != nil {
		t.Fatal(err)
	}
	share := client.Share{FD: int(file.Fd()), Offset: 4096, Size: 4096, Access: client.ReadWrite}
	share.Probe = &client.Probe{Offset: 16, Bytes: content[:100]}
	b, err := session.ShareFD(t.Context(), share)
	if err != nil {
		t.Fatal(err)
	}
	file.Close() // the session has its own
	r := f.requests[0].GetRegisterRegion()
	unix.Close(f.claim(r))
	sum := sha256.Sum256(content[:100])
	if r.GetSharedMemory().GetOffset() != 4096 || r.GetProbe().GetOffset() != 16 || r.GetProbe().GetLength() != 100 ||
		!bytes.Equal(r.GetProbe().GetExpectedSha256(), sum[:]) || b.Bytes() != nil {
		t.Errorf("lent %v", r)
	}
	f.last().broken <- nil
	for f.count() < 2 {
		time.Sleep(time.Millisecond)
	}
	if r := f.requests[1].GetRegisterRegion(); r.GetProbe() != nil || r.GetRegionId() != 1 {
		t.Errorf("lent again as %v", r)
	}
	for _, bad := range []client.Share{{FD: -1, Size: 1}, {FD: 0, Size: 0}, {FD: 0, Size: 1, Offset: -1}} {
		if _, err := session.ShareFD(t.Context(), bad); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func (f *fake) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.requests)
}

// A release that was given up, but arrived, is none to complain of.
func TestReleasedTwice(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b, err := f.open(nil).NewBuffer(t.Context(), 1, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	arrived, held := make(chan struct{}), true
	f.answer = func(s *stream, req *twilightv1.LeaseRequest) bool {
		if held {
			held = false
			close(arrived)
			return true
		}
		s.reply(refuse(req, &twilightv1.Error{Code: twilightv1.ErrorCode_ERROR_CODE_NOT_FOUND}))
		return true
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	if err := b.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if err := b.Close(t.Context()); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestNoDescriptorSocket(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.opened.FdEndpoint = ""
	if _, err := f.open(nil).NewBuffer(t.Context(), 1, client.ReadOnly); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	f = newFake(t)
	f.opened.FdEndpoint += "gone"
	if _, err := f.open(nil).NewBuffer(t.Context(), 1, client.ReadOnly); !errors.Is(err, client.ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}

// A daemon in another container may know the folder of its sockets by another path.
func TestDescriptorSocketBesideTheDialled(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	target := f.serveUnix()
	path := filepath.Join(filepath.Dir(strings.TrimPrefix(target, "unix://")), "moved")
	if err := os.Symlink(f.opened.GetFdEndpoint(), path); err != nil {
		t.Fatal(err)
	}
	f.opened.FdEndpoint = "/nowhere/moved"
	c, err := client.Dial(target)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.NewBuffer(t.Context(), 1, client.ReadOnly); err != nil {
		t.Error(err)
	}
}

func TestCaches(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session, other := f.open(nil), f.open(nil)
	b, err := session.NewBuffer(t.Context(), 4096, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	full := spec(b)
	full.V, full.NullPage, full.MaxTokens = client.Strides{Page: 1, Head: 2, Token: 3}, new(int32(0)), 99
	full.Layers[0].Layer, full.Layers[0].KScales = 17, []float32{0.5}
	size, err := session.ShadowBytes(t.Context(), full)
	if err != nil || size != (client.ShadowSize{Bytes: 64, PerToken: 0.5}) {
		t.Errorf("size %v, %v", size, err)
	}
	c, err := session.RegisterCache(t.Context(), full)
	if err != nil {
		t.Fatal(err)
	}
	if c.Shadow() != size {
		t.Errorf("shadow %v", c.Shadow())
	}
	asked, got := f.requests[len(f.requests)-2].GetRegisterCache(), f.requests[len(f.requests)-1].GetRegisterCache()
	if !asked.GetSizeOnly() || got.GetSizeOnly() || got.GetVStrides().GetToken() != 3 || got.NullPage == nil ||
		got.GetMaxTokens() != 99 || got.GetLayers()[0].GetLayer() != 17 || got.GetLayers()[0].GetV().GetOffset() != 2048 {
		t.Errorf("registered %v", got)
	}
	if err := b.Close(t.Context()); !errors.Is(err, client.ErrPrecondition) {
		t.Errorf("closing a buffer under a cache: %v", err)
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if err := c.Close(t.Context()); !errors.Is(err, client.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := other.RegisterCache(t.Context(), spec(b)); !errors.Is(err, client.ErrPermission) {
		t.Errorf("a cache in another session's buffer: %v", err)
	}
	if _, err := session.RegisterCache(t.Context(), spec(nil)); !errors.Is(err, client.ErrInvalid) {
		t.Errorf("a cache in no buffer: %v", err)
	}
	if err := b.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := session.RegisterCache(t.Context(), spec(b)); !errors.Is(err, client.ErrClosed) {
		t.Errorf("a cache in a closed buffer: %v", err)
	}
}

func TestLayerMessages(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	session, cache := f.cache(nil)
	out, err := session.NewBuffer(t.Context(), 4096, client.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	step := f.step(cache, batch(8, 0))
	at := client.Location{Buffer: out, Offset: 64}
	full := client.Layer{
		Layer: 3, QueryAt: &client.Tensor{Location: at, RowStride: 32}, Output: &client.Tensor{Location: at, HeadStride: 16},
		ListBuffer: &client.ListBuffer{Lists: at, Counts: client.Location{Buffer: out}, Capacity: 9},
		P:          []float32{0.5}, TokenBudget: []uint32{64}, ListsOnly: true,
	}
	where := &twilightv1.Location{RegionId: 2, Offset: 64}
	for _, tc := range []struct {
		layer client.Layer
		want  *twilightv1.Layer
	}{
		{full, &twilightv1.Layer{
			Layer:        3,
			Query:        &twilightv1.Layer_QueryTensor{QueryTensor: &twilightv1.Tensor{At: where, RowStride: 32}},
			OutputTensor: &twilightv1.Tensor{At: where, HeadStride: 16},
			ListMode:     twilightv1.ListMode_LIST_MODE_BUFFER,
			ListBuffer: &twilightv1.ListBuffer{
				Lists: where, Counts: &twilightv1.Location{RegionId: 2}, Capacity: 9,
			},
			P: []float32{0.5}, TokenBudget: []uint32{64}, ListsOnly: true,
		}},
		// Nothing of a message is left in the next, which reuses its memory.
		{client.Layer{Query: []byte{1, 2}, Lists: true}, &twilightv1.Layer{
			Query: &twilightv1.Layer_QueryInline{QueryInline: []byte{1, 2}}, ListMode: twilightv1.ListMode_LIST_MODE_INLINE,
		}},
		{client.Layer{}, &twilightv1.Layer{}},
		{full, nil},
		{client.Layer{}, &twilightv1.Layer{}},
	} {
		if _, err := step.Layer(t.Context(), tc.layer); err != nil {
			t.Fatal(err)
		}
		if tc.want == nil {
			continue
		}
		tc.want.CacheId, tc.want.StepId = 1, 1
		if diff := cmp.Diff(tc.want, f.requests[len(f.requests)-1].GetLayer(), protocmp.Transform()); diff != "" {
			t.Errorf("sent (-want +got):\n%s", diff)
		}
	}
	if err := step.Cancel(t.Context()); err != nil {
		t.Error(err)
	}
	if got := f.requests[len(f.requests)-1].GetCancelStep(); got.GetCacheId() != 1 || got.GetStepId() != 1 {
		t.Errorf("cancelled %v", got)
	}
}

func TestRowLists(t *testing.T) {
	t.Parallel()
	r := client.LayerResult{Kept: []uint32{2, 0, 1}, Lists: []int32{3, 5, 8}}
	var got [][]int32
	for row, list := range r.RowLists() {
		if row != len(got) {
			t.Errorf("row %d after %d", row, len(got))
		}
		got = append(got, list)
	}
	if diff := cmp.Diff([][]int32{{3, 5}, {}, {8}}, got); diff != "" {
		t.Error(diff)
	}
	r.Lists = r.Lists[:1] // a daemon that sends less than it says
	for row, list := range r.RowLists() {
		if want := max(0, 1-row); len(list) != want {
			t.Errorf("row %d has %v", row, list)
		}
	}
}

func TestGeometry(t *testing.T) {
	t.Parallel()
	g := client.Geometry{KDim: 4, Query: client.F8E4M3, QueryScale: 0.5, Output: client.F16}
	if got := g.EncodeQuery([]byte{9}, []float32{0.5, -1}); !bytes.Equal(got, []byte{9, 0x38, 0xc0}) {
		t.Errorf("encoded % x", got)
	}
	if got := g.DecodeOutput([]float32{7}, []byte{0, 0x3c, 0, 0xc0}); !slices.Equal(got, []float32{7, 1, -2}) {
		t.Errorf("decoded %v", got)
	}
	opened := newFake(t).open(nil).Geometry()
	if opened.VDim != 8 || opened.Output != client.F16 || opened.QueryScale != 1 || opened.Scale != float32(1/math.Sqrt(8)) {
		t.Errorf("defaults %+v", opened)
	}
}
