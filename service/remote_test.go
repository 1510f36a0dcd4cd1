package service

import (
	"context"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/twilight-sidecar/twilight/internal/fault"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// fakeRemote opens leases at another server.
type fakeRemote struct {
	server  *daemon
	started bool
	opened  []*Opening
	drained chan struct{}
}

func newRemote(t *testing.T) *fakeRemote {
	t.Helper()
	return &fakeRemote{server: start(t, Config{Assigned: true}, newFake()), drained: make(chan struct{})}
}

func (r *fakeRemote) ID() string            { return "GPU-1" }
func (r *fakeRemote) Start(context.Context) { r.started = true }
func (r *fakeRemote) Drain(context.Context) { close(r.drained) }

func (r *fakeRemote) Describe(_ context.Context, query *twilightv1.ShadowQuery) *twilightv1.Device {
	d := &twilightv1.Device{Id: r.ID(), Unusable: "it is elsewhere"}
	if query != nil {
		d.ShadowRefusal = "asked"
	}
	return d
}

func (r *fakeRemote) Open(ctx context.Context, o *Opening) (*twilightv1.OpenLeaseResponse, error) {
	r.opened = append(r.opened, o)
	there := *o
	there.Socket = r.server.path
	there.Request = proto.CloneOf(o.Request)
	there.Request.Device = ""
	resp, err := r.server.OpenFor(ctx, &there)
	if err == nil {
		resp.Endpoint = "unix://" + r.server.path
	}
	return resp, err
}

func remoteRequest() *twilightv1.OpenLeaseRequest {
	req := openRequest()
	req.Device = "GPU-1"
	return req
}

// follow opens the stream of a lease at its endpoint.
func (r *fakeRemote) follow(t *testing.T, opened *twilightv1.OpenLeaseResponse) *engine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	stream, err := r.server.client.Lease(withToken(ctx, opened.GetToken()))
	if err != nil {
		t.Fatal(err)
	}
	return &engine{t: t, opened: opened, stream: stream, cancel: cancel}
}

// A lease on a remote device is its peer's, and counts as long as it lives.
func TestRemote(t *testing.T) {
	t.Parallel()
	r := newRemote(t)
	d := start(t, Config{Remotes: []Remote{r}, Limits: Limits{Leases: 1}, DrainGrace: deadline}, newFake())
	if !r.started {
		t.Error("the device was not started")
	}
	told, err := d.client.GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{
		Shadow: &twilightv1.ShadowQuery{Geometry: openRequest().GetGeometry()},
	})
	if err != nil || len(told.GetDevices()) != 2 || told.GetDevices()[1].GetId() != "GPU-1" || told.GetDevices()[1].GetShadowRefusal() != "asked" {
		t.Errorf("capabilities %v, error %v", told, err)
	}
	opened, err := d.client.OpenLease(t.Context(), remoteRequest())
	if err != nil {
		t.Fatal(err)
	}
	o := r.opened[0]
	if o.Socket != d.path || o.ID != 1 || o.UID != uint32(os.Geteuid()) || opened.GetFdEndpoint() != r.server.path+fdSuffix {
		t.Errorf("the lease was opened by %+v, with descriptors for %s", o, opened.GetFdEndpoint())
	}
	if _, err := d.client.OpenLease(t.Context(), remoteRequest()); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a lease too many: %v", err)
	}
	if _, err := r.server.client.OpenLease(t.Context(), openRequest()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a lease of a server whose leases are assigned: %v", err)
	}
	e := r.follow(t, opened)
	e.ask(registerRegion(1, 1, nil))

	drained := make(chan error, 1)
	go func() { drained <- d.Drain(context.Background()) }()
	<-r.drained
	select {
	case err := <-drained:
		t.Errorf("drained before the lease was over: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	if err := e.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
}

// A refusal is told as the other server says it, and leaves no lease.
func TestRemoteRefuses(t *testing.T) {
	t.Parallel()
	r := newRemote(t)
	d := start(t, Config{Remotes: []Remote{r}, Limits: Limits{Leases: 1}})
	req := remoteRequest()
	req.ConfigJson = `{"selector": {"type": "none such"}}`
	for range 2 {
		_, err := d.client.OpenLease(t.Context(), req)
		wantStatus(t, "a refusal", err, codes.Unimplemented, "config_json.selector.type")
	}
	if _, err := d.client.OpenLease(t.Context(), openRequest()); err != nil { // the only device
		t.Error(err)
	}
	if _, err := New(Config{Remotes: []Remote{r, r}, Methods: allMethods(t)}); err == nil {
		t.Error("a device was served twice")
	}
}

// A server whose device is lost ends its leases by the reason.
func TestFail(t *testing.T) {
	t.Parallel()
	r := newRemote(t)
	d := start(t, Config{Remotes: []Remote{r}})
	opened, err := d.client.OpenLease(t.Context(), remoteRequest())
	if err != nil {
		t.Fatal(err)
	}
	e := r.follow(t, opened)
	e.ask(registerRegion(1, 1, nil))
	r.server.Fail(fault.Newf(fault.Unavailable, "", "the GPU is lost"))
	_, err = e.stream.Recv()
	wantStatus(t, "the stream's end", err, codes.Unavailable, "")
	if text := status.Convert(err).Message(); text != "the GPU is lost" {
		t.Errorf("the lease ended since %q", text)
	}
	if _, err := d.client.OpenLease(t.Context(), remoteRequest()); status.Code(err) != codes.Unavailable {
		t.Errorf("a lease of a lost device: %v", err)
	}
}
