package client_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// fake is a daemon that does nothing and answers as a test wants.
type fake struct {
	twilightv1.UnimplementedTwilightServiceServer

	t      testing.TB
	opened twilightv1.OpenLeaseResponse
	fds    *fdsock.Server
	inbox  *fdsock.Inbox
	server *grpc.Server
	listen *bufconn.Listener

	// answer, if not nil, sees each request first; true means that it takes care of the answer.
	answer func(*stream, *twilightv1.LeaseRequest) bool
	refuse func() error // of OpenLease

	mu       sync.Mutex
	requests []*twilightv1.LeaseRequest // of all streams
	streams  []*stream
	tokens   []string
}

// serveUnix serves on a Unix socket, too, and returns its target.
func (f *fake) serveUnix() string {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), "grpc")
	l, err := net.Listen("unix", path)
	if err != nil {
		f.t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = f.server.Serve(l) })
	f.t.Cleanup(func() { f.server.Stop(); serving.Wait() })
	return "unix://" + path
}

// stream is one lease as the fake sees it.
type stream struct {
	grpc.BidiStreamingServer[twilightv1.LeaseRequest, twilightv1.LeaseResponse]
	sending sync.Mutex
	broken  chan error
}

func (s *stream) reply(res *twilightv1.LeaseResponse) {
	s.sending.Lock()
	defer s.sending.Unlock()
	_ = s.Send(res)
}

var leaseToken = fdsock.LeaseToken{7}

func newFake(t testing.TB) *fake {
	t.Helper()
	f := &fake{t: t, server: grpc.NewServer(), listen: bufconn.Listen(1 << 20)}
	path := filepath.Join(t.TempDir(), "fd")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	f.fds = fdsock.NewServer(func(uint32) error { return nil }, slog.New(slog.DiscardHandler))
	f.inbox = f.fds.Open(leaseToken, uint32(os.Getuid()), 100)
	f.opened = twilightv1.OpenLeaseResponse{
		ProtocolVersion: 1, Token: leaseToken[:], FdEndpoint: path, ConfigJson: "{}",
		Limits: &twilightv1.Limits{MaxMessageBytes: 4096},
	}
	twilightv1.RegisterTwilightServiceServer(f.server, f)
	var serving sync.WaitGroup
	serving.Go(func() { f.fds.Serve(l) })
	serving.Go(func() { _ = f.server.Serve(f.listen) })
	t.Cleanup(func() {
		f.server.Stop()
		f.fds.Close()
		serving.Wait()
	})
	return f
}

func (f *fake) OpenLease(context.Context, *twilightv1.OpenLeaseRequest) (*twilightv1.OpenLeaseResponse, error) {
	if f.refuse != nil {
		if err := f.refuse(); err != nil {
			return nil, err
		}
	}
	return &f.opened, nil
}

func (f *fake) Lease(server grpc.BidiStreamingServer[twilightv1.LeaseRequest, twilightv1.LeaseResponse]) error {
	s := &stream{BidiStreamingServer: server, broken: make(chan error, 1)}
	md, _ := metadata.FromIncomingContext(s.Context())
	f.mu.Lock()
	f.streams = append(f.streams, s)
	f.tokens = append(f.tokens, md.Get("twilight-lease-bin")...)
	f.mu.Unlock()
	ended := make(chan error, 1)
	go func() {
		for {
			req, err := s.Recv()
			if err != nil {
				ended <- nil
				return
			}
			f.mu.Lock()
			f.requests = append(f.requests, req)
			f.mu.Unlock()
			if f.answer == nil || !f.answer(s, req) {
				s.reply(accept(req))
			}
		}
	}()
	select {
	case err := <-ended:
		return err
	case err := <-s.broken:
		return err
	}
}

// accept is the answer to any request.
func accept(req *twilightv1.LeaseRequest) *twilightv1.LeaseResponse {
	res := &twilightv1.LeaseResponse{RequestId: req.GetRequestId()}
	switch r := req.GetRequest().(type) {
	case *twilightv1.LeaseRequest_RegisterRegion:
		res.Response = &twilightv1.LeaseResponse_RegionRegistered{RegionRegistered: &twilightv1.RegionRegistered{}}
	case *twilightv1.LeaseRequest_ReleaseRegion:
		res.Response = &twilightv1.LeaseResponse_RegionReleased{RegionReleased: &twilightv1.RegionReleased{}}
	case *twilightv1.LeaseRequest_RegisterCache:
		res.Response = &twilightv1.LeaseResponse_CacheRegistered{CacheRegistered: &twilightv1.CacheRegistered{
			ShadowBytes: 64, ShadowBytesPerToken: 0.5,
		}}
	case *twilightv1.LeaseRequest_ReleaseCache:
		res.Response = &twilightv1.LeaseResponse_CacheReleased{CacheReleased: &twilightv1.CacheReleased{}}
	case *twilightv1.LeaseRequest_Step:
		res.Response = &twilightv1.LeaseResponse_StepResult{StepResult: &twilightv1.StepResult{}}
	case *twilightv1.LeaseRequest_Layer:
		res.Response = &twilightv1.LeaseResponse_LayerResult{LayerResult: &twilightv1.LayerResult{
			Kept: []uint32{r.Layer.GetLayer()},
		}}
	case *twilightv1.LeaseRequest_CancelStep:
		res.Response = &twilightv1.LeaseResponse_StepCancelled{StepCancelled: &twilightv1.StepCancelled{}}
	}
	return res
}

func refuse(req *twilightv1.LeaseRequest, e *twilightv1.Error) *twilightv1.LeaseResponse {
	return &twilightv1.LeaseResponse{RequestId: req.GetRequestId(), Response: &twilightv1.LeaseResponse_Error{Error: e}}
}

// last is the newest stream.
func (f *fake) last() *stream {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.streams[len(f.streams)-1]
}

// steps are the steps sent so far.
func (f *fake) steps() []*twilightv1.Step {
	f.mu.Lock()
	defer f.mu.Unlock()
	var steps []*twilightv1.Step
	for _, req := range f.requests {
		if step := req.GetStep(); step != nil {
			steps = append(steps, step)
		}
	}
	return steps
}

func (f *fake) dial() *client.Client {
	f.t.Helper()
	c, err := client.Dial("passthrough:///bufconn", client.WithGRPC(
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return f.listen.DialContext(ctx) }),
	))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

var geometry = client.Geometry{Layers: 1, QueryHeads: 2, KVHeads: 1, KDim: 8, Query: client.F16}

func (f *fake) open(onState func(client.State, error)) *client.Session {
	f.t.Helper()
	s, err := f.dial().Open(f.t.Context(), client.OpenOptions{Geometry: geometry, OnState: onState})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { s.Close() })
	return s
}

// cache opens a session with a cache in a buffer.
func (f *fake) cache(onState func(client.State, error)) (*client.Session, *client.Cache) {
	f.t.Helper()
	s := f.open(onState)
	b, err := s.NewBuffer(f.t.Context(), 4096, client.ReadOnly)
	if err != nil {
		f.t.Fatal(err)
	}
	c, err := s.RegisterCache(f.t.Context(), spec(b))
	if err != nil {
		f.t.Fatal(err)
	}
	return s, c
}

func spec(b *client.Buffer) client.CacheSpec {
	return client.CacheSpec{
		DType: client.F16, PageSize: 16, NumPages: 8, K: client.Strides{Page: 256, Head: 256, Token: 16},
		Layers: []client.CacheLayer{{K: client.Location{Buffer: b}, V: client.Location{Buffer: b, Offset: 2048}}},
	}
}

func batch(length int, pages ...int32) client.Batch {
	return client.Batch{Sequences: []client.Sequence{{ID: 1, Len: length, Table: pages}}}
}

func (f *fake) step(c *client.Cache, b client.Batch) *client.Step {
	f.t.Helper()
	step, err := c.Step(f.t.Context(), b)
	if err != nil {
		f.t.Fatal(err)
	}
	return step
}
