package service

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// deadline bounds every wait of a test: what takes longer hangs.
const deadline = time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logBuffer is a log that a test can read.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// daemon is a server on a Unix socket of its own, with a client.
type daemon struct {
	*Server
	t      testing.TB
	path   string
	log    *logBuffer
	client twilightv1.TwilightServiceClient
	conn   *grpc.ClientConn
}

// start serves devices that have passed their tests, until the test ends.
func start(t testing.TB, config Config, devices ...gpu.Device) *daemon {
	t.Helper()
	d := startUntested(t, config, devices...)
	if err := d.SelfTest(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

func startUntested(t testing.TB, config Config, devices ...gpu.Device) *daemon {
	t.Helper()
	d := &daemon{t: t, log: &logBuffer{}, path: filepath.Join(shortTempDir(t), "t.sock")}
	config.Devices, config.Methods = devices, allMethods(t)
	config.Logger = slog.New(telemetry.LogHandler(slog.NewJSONHandler(d.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	server, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	d.Server = server
	l, err := Listen(t.Context(), d.path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	serving := make(chan error, 1)
	go func() { serving <- server.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		server.config.DrainGrace = time.Millisecond
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		if err := server.Drain(ctx); err != nil {
			t.Error("drain:", err)
		}
		if err := <-serving; err != nil {
			t.Error("serve:", err)
		}
	})
	d.conn, d.client = d.dial()
	return d
}

func allMethods(t testing.TB) *pipeline.Methods {
	t.Helper()
	m, err := methods.New()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// shortTempDir is short enough for the path of a socket.
func shortTempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (d *daemon) dial(opts ...grpc.DialOption) (*grpc.ClientConn, twilightv1.TwilightServiceClient) {
	d.t.Helper()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient("unix://"+d.path, opts...)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { conn.Close() })
	return conn, twilightv1.NewTwilightServiceClient(conn)
}

// engine is one engine's side of a lease.
type engine struct {
	t      testing.TB
	opened *twilightv1.OpenLeaseResponse
	stream grpc.BidiStreamingClient[twilightv1.LeaseRequest, twilightv1.LeaseResponse]
	cancel context.CancelFunc
	lastID uint64
}

func openRequest() *twilightv1.OpenLeaseRequest {
	return &twilightv1.OpenLeaseRequest{
		ProtocolVersion: 1,
		EngineId:        make([]byte, 16),
		EngineName:      "test",
		Geometry: &twilightv1.Geometry{
			NumLayers: 1, QueryHeads: 2, KvHeads: 1, KDim: 16, VDim: 16, SoftmaxScale: 0.25,
			QueryDtype: twilightv1.DataType_DATA_TYPE_F32, OutputDtype: twilightv1.DataType_DATA_TYPE_F32,
		},
	}
}

func (d *daemon) open() *engine { return openOn(d.t, d.client) }

func openOn(t testing.TB, client twilightv1.TwilightServiceClient) *engine {
	t.Helper()
	return openWith(t, client, openRequest())
}

func openWith(t testing.TB, client twilightv1.TwilightServiceClient, req *twilightv1.OpenLeaseRequest) *engine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	opened, err := client.OpenLease(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := client.Lease(withToken(ctx, opened.GetToken()))
	if err != nil {
		t.Fatal(err)
	}
	return &engine{t: t, opened: opened, stream: stream, cancel: cancel}
}

func withToken(ctx context.Context, token []byte) context.Context {
	return metadata.AppendToOutgoingContext(ctx, tokenKey, string(token))
}

// ask sends a request as it is, but for its id, and waits for the answer.
func (e *engine) ask(req *twilightv1.LeaseRequest) *twilightv1.LeaseResponse {
	e.t.Helper()
	e.send(req)
	return e.receive(req.GetRequestId())
}

func (e *engine) send(req *twilightv1.LeaseRequest) {
	e.t.Helper()
	e.lastID++
	req.RequestId = e.lastID
	if err := e.stream.Send(req); err != nil {
		e.t.Fatal("send:", err)
	}
}

func (e *engine) receive(id uint64) *twilightv1.LeaseResponse {
	e.t.Helper()
	resp, err := e.stream.Recv()
	if err != nil {
		e.t.Fatal("receive:", err)
	}
	if resp.GetRequestId() != id {
		e.t.Fatalf("answer to request %d, want %d: %v", resp.GetRequestId(), id, resp)
	}
	return resp
}

// must is ask for a request that has to succeed.
func (e *engine) must(req *twilightv1.LeaseRequest) *twilightv1.LeaseResponse {
	e.t.Helper()
	resp := e.ask(req)
	if resp.GetError() != nil {
		e.t.Fatalf("%v was refused: %v", req, resp.GetError())
	}
	return resp
}

// lend makes a file of size bytes, sends it to the daemon and returns its token.
func (e *engine) lend(size int64) []byte {
	e.t.Helper()
	fd, err := unix.MemfdCreate("lent", unix.MFD_CLOEXEC)
	if err != nil {
		e.t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		e.t.Fatal(err)
	}
	return e.lendFD(fd)
}

func (e *engine) lendFD(fd int) []byte {
	e.t.Helper()
	tokens, err := fdsock.Send(e.stream.Context(), e.opened.GetFdEndpoint(), e.opened.GetToken(), fd)
	if err != nil {
		e.t.Fatal(err)
	}
	return tokens[0][:]
}

const testRegionBytes = 1 << 16

// region is a request to register region id of generation 1, of a file that it sends.
func (e *engine) region(id uint32) *twilightv1.LeaseRequest {
	e.t.Helper()
	return registerRegion(id, 1, e.lend(testRegionBytes))
}

func registerRegion(id uint32, generation uint64, token []byte) *twilightv1.LeaseRequest {
	return request(&twilightv1.RegisterRegion{
		RegionId: id, Generation: generation, Size: testRegionBytes, Access: twilightv1.Access_ACCESS_READ_WRITE,
		Kind: &twilightv1.RegisterRegion_SharedMemory{SharedMemory: &twilightv1.SharedMemory{FdToken: token}},
	})
}

// registerCache is a cache of one layer, of 16-token pages, in region 1: K, then V.
func registerCache(id uint32) *twilightv1.LeaseRequest {
	const page = 16 * 16 * 4
	return request(&twilightv1.RegisterCache{
		CacheId: id, Dtype: twilightv1.DataType_DATA_TYPE_F32, PageSize: 16, NumPages: 8,
		KStrides: &twilightv1.Strides{Page: page, Head: page, Token: 16 * 4},
		Layers: []*twilightv1.CacheLayer{{
			K: &twilightv1.Location{RegionId: 1, Generation: 1},
			V: &twilightv1.Location{RegionId: 1, Generation: 1, Offset: 8 * page},
		}},
	})
}

// step declares step id of cache 1: one sequence of 20 tokens on pages 0 and 1.
func step(id uint64) *twilightv1.LeaseRequest {
	return request(&twilightv1.Step{
		CacheId: 1, StepId: id, Sequences: []uint64{1}, Lengths: []int32{20},
		Table: &twilightv1.TableUpdate{Counts: []uint32{2}, Entries: []int32{0, 1}},
	})
}

// layer asks for layer 0 of step id of cache 1.
func layer(id uint64) *twilightv1.LeaseRequest {
	return request(&twilightv1.Layer{
		CacheId: 1, StepId: id, Query: &twilightv1.Layer_QueryInline{QueryInline: make([]byte, 2*16*4)},
	})
}

// request wraps what a lease can be asked.
func request(message any) *twilightv1.LeaseRequest {
	switch m := message.(type) {
	case *twilightv1.RegisterRegion:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_RegisterRegion{RegisterRegion: m}}
	case *twilightv1.ReleaseRegion:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_ReleaseRegion{ReleaseRegion: m}}
	case *twilightv1.RegisterCache:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_RegisterCache{RegisterCache: m}}
	case *twilightv1.ReleaseCache:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_ReleaseCache{ReleaseCache: m}}
	case *twilightv1.Step:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_Step{Step: m}}
	case *twilightv1.Layer:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_Layer{Layer: m}}
	case *twilightv1.CancelStep:
		return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_CancelStep{CancelStep: m}}
	}
	panic("no request")
}

// ready opens a lease with region 1, cache 1 and its step 1.
func (d *daemon) ready() *engine {
	d.t.Helper()
	e := d.open()
	e.prepare()
	return e
}

func (e *engine) prepare() {
	e.t.Helper()
	e.must(e.region(1))
	e.must(registerCache(1))
	e.must(step(1))
}

// eventually waits for what another goroutine is about to do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

// released waits until nothing is open on a device.
func released(t testing.TB, d *fakeDevice) {
	t.Helper()
	eventually(t, "everything released", func() bool {
		return d.leases.Load() == 0 && d.memories.Load() == 0 && d.caches.Load() == 0
	})
}

// cutConn is a connection that a test can cut, or let fall silent.
type cutConn struct {
	net.Conn
	silent chan struct{}
}

func (c *cutConn) Write(p []byte) (int, error) {
	select {
	case <-c.silent:
		return len(p), nil
	default:
		return c.Conn.Write(p)
	}
}
