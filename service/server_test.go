package service

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/kv"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const serviceName = "twilight.v1.TwilightService"

func (d *daemon) health(service string) healthpb.HealthCheckResponse_ServingStatus {
	d.t.Helper()
	resp, err := healthpb.NewHealthClient(d.conn).Check(d.t.Context(), &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.GetStatus()
}

func TestHealth(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.selfTest = func(context.Context) error { return errors.New("wrong sum") }
	second := newFake()
	second.info.ID = "second"
	d := startUntested(t, Config{}, second, fake)
	want := func(status healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, name := range []string{"", serviceName} {
			if got := d.health(name); got != status {
				t.Errorf("health of %q is %v, want %v", name, got, status)
			}
		}
	}
	want(healthpb.HealthCheckResponse_NOT_SERVING)
	if err := d.SelfTest(t.Context()); err == nil || !strings.Contains(err.Error(), "fake") {
		t.Errorf("self-test: %v", err)
	}
	want(healthpb.HealthCheckResponse_NOT_SERVING)
	if _, err := d.client.OpenLease(t.Context(), openRequest()); status.Code(err) != codes.Unavailable {
		t.Errorf("a lease on an untested device: %v", err)
	}
	fake.selfTest = nil
	if err := d.SelfTest(t.Context()); err != nil {
		t.Error(err)
	}
	want(healthpb.HealthCheckResponse_SERVING)
	d.stopOpening(t.Context())
	want(healthpb.HealthCheckResponse_NOT_SERVING)
	if err := d.SelfTest(t.Context()); err != nil {
		t.Error(err)
	}
	want(healthpb.HealthCheckResponse_NOT_SERVING)
}

func TestDrain(t *testing.T) {
	t.Parallel()
	running, finish := make(chan struct{}), make(chan struct{})
	fake := newFake()
	fake.onLayer = func(_ context.Context, _ *gpu.LayerRequest, res *gpu.LayerResult) error {
		running <- struct{}{}
		<-finish
		res.Kept = []uint32{42}
		return nil
	}
	d := start(t, Config{DrainGrace: 300 * time.Millisecond}, fake)
	busy, idle, polite := d.ready(), d.ready(), d.ready()
	waiting, err := d.client.OpenLease(t.Context(), openRequest())
	if err != nil {
		t.Fatal(err)
	}
	busy.send(layer(1))
	<-running

	drained := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		drained <- d.Drain(ctx)
	}()
	for _, e := range []*engine{busy, idle, polite} {
		got := e.receive(0).GetDraining()
		if got.GetGraceMs() != 300 || got.GetReason() == "" {
			t.Errorf("draining: %v", got)
		}
	}
	if got := d.health(""); got != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health is %v", got)
	}
	if _, err := d.client.OpenLease(t.Context(), openRequest()); status.Code(err) != codes.Unavailable {
		t.Errorf("a lease of a draining daemon: %v", err)
	}
	late, err := d.client.Lease(withToken(t.Context(), waiting.GetToken()))
	if err == nil {
		_, err = late.Recv()
	}
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a stream of a draining daemon ended by %v", err)
	}
	for _, req := range []*twilightv1.LeaseRequest{step(2), registerCache(2), registerRegion(2, 1, make([]byte, 16))} {
		if got := idle.ask(req).GetError(); got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE {
			t.Errorf("%v: answer %v", req, got)
		}
	}
	idle.must(request(&twilightv1.ReleaseCache{CacheId: 1}))
	if err := polite.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}

	close(finish)
	if got := busy.receive(busy.lastID).GetLayerResult().GetKept(); !slices.Equal(got, []uint32{42}) {
		t.Errorf("the running layer answered %v", got)
	}
	for _, e := range []*engine{busy, idle} {
		if _, err := e.stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended by %v", err)
		}
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	released(t, fake)
	if !fake.closed.Load() {
		t.Error("the device is open")
	}
}

// What does not heed the grace is cut off.
func TestDrainCutsOff(t *testing.T) {
	t.Parallel()
	running := make(chan struct{})
	fake := newFake()
	fake.onLayer = func(ctx context.Context, _ *gpu.LayerRequest, _ *gpu.LayerResult) error {
		close(running)
		<-ctx.Done()
		return ctx.Err()
	}
	d := start(t, Config{DrainGrace: time.Millisecond}, fake)
	e := d.ready()
	e.send(layer(1))
	<-running
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	if err := d.Drain(ctx); err != nil {
		t.Error(err)
	}
	released(t, fake)
}

// A device that hangs does not hold up who must exit.
func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	running, finish := make(chan struct{}), make(chan struct{})
	fake := newFake()
	fake.onLayer = func(context.Context, *gpu.LayerRequest, *gpu.LayerResult) error {
		close(running)
		<-finish
		return nil
	}
	d := start(t, Config{DrainGrace: time.Millisecond}, fake)
	d.ready().send(layer(1))
	<-running
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("drain returned %v", err)
	}
	close(finish)
}

func TestCapabilities(t *testing.T) {
	t.Parallel()
	small := newFake()
	small.info.ID, small.info.MaxHeadSize = "small", 8
	d := startUntested(t, Config{Version: "v1.2.3"}, newFake(), small)
	resp, err := d.client.GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{
		Shadow: &twilightv1.ShadowQuery{Geometry: openRequest().GetGeometry()},
	})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetVersion() != "v1.2.3" || resp.GetProtocolVersionMin() != 1 || resp.GetProtocolVersionMax() != 1 {
		t.Errorf("capabilities: %v", resp)
	}
	first, second := resp.GetDevices()[0], resp.GetDevices()[1]
	if first.GetId() != "fake" || first.GetShadowBytesPerToken() != 12.5 || first.GetShadowRefusal() != "" ||
		!slices.Equal(first.GetCacheDtypes(), []twilightv1.DataType{
			twilightv1.DataType_DATA_TYPE_F16, twilightv1.DataType_DATA_TYPE_F32,
		}) || !slices.Equal(first.GetRegionKinds(), []twilightv1.RegionKind{twilightv1.RegionKind_REGION_KIND_SHARED_MEMORY}) {
		t.Errorf("device: %v", first)
	}
	if second.ShadowBytesPerToken != nil || !strings.Contains(second.GetShadowRefusal(), "geometry.k_dim") {
		t.Errorf("device: %v", second)
	}
	_, err = d.client.GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{
		Shadow: &twilightv1.ShadowQuery{Geometry: openRequest().GetGeometry(), ConfigJson: `{"slector": {}}`},
	})
	wantStatus(t, "config", err, codes.InvalidArgument, "shadow.config_json.slector")
}

// wantStatus checks a status and the field of the twilight.v1.Error that it carries.
func wantStatus(t *testing.T, name string, err error, code codes.Code, field string) {
	t.Helper()
	st, _ := status.FromError(err)
	var detail *twilightv1.Error
	for _, d := range st.Details() {
		if e, ok := d.(*twilightv1.Error); ok {
			detail = e
		}
	}
	if st.Code() != code || detail.GetField() != field || detail.GetMessage() == "" {
		t.Errorf("%s: status %v with %v, want %v and field %q", name, err, detail, code, field)
	}
}

func TestOpenRefusals(t *testing.T) {
	t.Parallel()
	grouped := newFake()
	grouped.info.ID, grouped.info.MaxGroup, grouped.info.HeadSizes = "grouped", 1, []int{16}
	failing := newFake()
	failing.info.ID = "failing"
	failing.onOpen = func() error { return fault.Newf(fault.Unsupported, "config_json.selector", "is not served") }
	d := start(t, Config{Limits: Limits{Leases: 1}}, newFake(), grouped, failing)
	for _, tc := range []struct {
		name  string
		edit  func(*twilightv1.OpenLeaseRequest)
		code  codes.Code
		field string
	}{
		{"version 0", func(r *twilightv1.OpenLeaseRequest) { r.ProtocolVersion = 0 }, codes.InvalidArgument, "protocol_version"},
		{"version 2", func(r *twilightv1.OpenLeaseRequest) { r.ProtocolVersion = 2 }, codes.Unimplemented, "protocol_version"},
		{"engine id", func(r *twilightv1.OpenLeaseRequest) { r.EngineId = nil }, codes.InvalidArgument, "engine_id"},
		{"one of several devices", func(r *twilightv1.OpenLeaseRequest) { r.Device = "" }, codes.InvalidArgument, "device"},
		{"no such device", func(r *twilightv1.OpenLeaseRequest) { r.Device = "GPU-1" }, codes.NotFound, "device"},
		{"no geometry", func(r *twilightv1.OpenLeaseRequest) { r.Geometry = nil }, codes.InvalidArgument, "geometry"},
		{"group", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.KvHeads = 3 }, codes.InvalidArgument, "geometry"},
		{"sinks", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.Sinks = []float32{1} }, codes.InvalidArgument, "geometry"},
		{"scale", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.SoftmaxScale = 0 }, codes.InvalidArgument, "geometry.softmax_scale"},
		{"query scale", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.QueryScale = 2 }, codes.InvalidArgument, "geometry.query_scale"},
		{"key size", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.KDim = 512 }, codes.Unimplemented, "geometry.k_dim"},
		{"value size", func(r *twilightv1.OpenLeaseRequest) { r.Geometry.VDim = 2000 }, codes.InvalidArgument, "geometry.v_dim"},
		{"listed size", func(r *twilightv1.OpenLeaseRequest) { r.Device, r.Geometry.VDim = "grouped", 32 }, codes.Unimplemented, "geometry.v_dim"},
		{"group size", func(r *twilightv1.OpenLeaseRequest) { r.Device = "grouped" }, codes.Unimplemented, "geometry.query_heads"},
		{"query dtype", func(r *twilightv1.OpenLeaseRequest) {
			r.Geometry.QueryDtype = twilightv1.DataType_DATA_TYPE_BF16
		}, codes.Unimplemented, "geometry.query_dtype"},
		{"output dtype", func(r *twilightv1.OpenLeaseRequest) {
			r.Geometry.OutputDtype = twilightv1.DataType_DATA_TYPE_F8_E4M3
		}, codes.InvalidArgument, "geometry.output_dtype"},
		{"config", func(r *twilightv1.OpenLeaseRequest) { r.ConfigJson = `{"selector": {"type": "quest", "budget": 1}}` }, codes.InvalidArgument, "config_json.selector.budget"},
		{"device's own", func(r *twilightv1.OpenLeaseRequest) { r.Device = "failing" }, codes.Unimplemented, "config_json.selector"},
	} {
		req := openRequest()
		req.Device = "fake"
		tc.edit(req)
		_, err := d.client.OpenLease(t.Context(), req)
		wantStatus(t, tc.name, err, tc.code, tc.field)
	}
	// Refusals take no place.
	req := openRequest()
	req.Device = "fake"
	if _, err := d.client.OpenLease(t.Context(), req); err != nil {
		t.Error(err)
	}
	_, err := d.client.OpenLease(t.Context(), req)
	wantStatus(t, "too many leases", err, codes.ResourceExhausted, "")
}

func TestOpenAnswer(t *testing.T) {
	t.Parallel()
	d := start(t, Config{}, newFake())
	first, second := d.open().opened, d.open().opened
	if len(first.GetToken()) != 32 || string(first.GetToken()) == string(second.GetToken()) {
		t.Error("tokens are not drawn at random")
	}
	if len(first.GetInstanceId()) != 16 || string(first.GetInstanceId()) != string(second.GetInstanceId()) {
		t.Error("instance ids differ")
	}
	if first.GetFdEndpoint() != d.path+".fd" || first.GetEndpoint() != "" || first.GetDevice().GetId() != "fake" ||
		!strings.Contains(first.GetConfigJson(), `"quest"`) || first.GetOpenTimeoutMs() != 10_000 {
		t.Errorf("answer: %v", first)
	}
	want := &twilightv1.Limits{
		MaxMessageBytes: 16 << 20, MaxRegions: 1024, MaxCaches: 64, MaxBatch: 8, MaxSequenceTokens: 1 << 20, MaxShadowBytes: 1 << 20,
	}
	if first.GetLimits().String() != want.String() {
		t.Errorf("limits %v, want %v", first.GetLimits(), want)
	}
}

func TestPanicInUnaryCall(t *testing.T) {
	t.Parallel()
	fake := newFake()
	fake.onOpen = func() error { panic("at 0xc0ffee") }
	d := start(t, Config{Limits: Limits{Leases: 1}}, fake)
	_, err := d.client.OpenLease(t.Context(), openRequest())
	wantStatus(t, "panic", err, codes.Internal, "")
	if strings.Contains(err.Error(), "0x") || !strings.Contains(d.log.String(), "0xc0ffee") {
		t.Errorf("error %v, log %s", err, d.log)
	}
	fake.onOpen = nil
	d.open() // it took no place
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	d := start(t, Config{OpenRate: 1e-9, OpenBurst: 3}, newFake())
	e := d.open() // two calls
	if _, err := d.client.GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := d.client.GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a call too many: %v", err)
	}
	stream, err := d.client.Lease(withToken(t.Context(), make([]byte, 32)))
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a stream too many: %v", err)
	}
	d.health("") // is not counted
	e.prepare()  // nor are messages
}

func TestReflection(t *testing.T) {
	t.Parallel()
	d := start(t, Config{}, newFake())
	stream, err := reflectionpb.NewServerReflectionClient(d.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	listed := ask(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	}).GetListServicesResponse().GetService()
	if !slices.ContainsFunc(listed, func(s *reflectionpb.ServiceResponse) bool { return s.GetName() == serviceName }) {
		t.Errorf("services: %v", listed)
	}
	described := ask(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: serviceName},
	}).GetFileDescriptorResponse().GetFileDescriptorProto()
	if len(described) == 0 {
		t.Error("the service is not described")
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// listenTCP serves d on loopback and returns the address.
func (d *daemon) listenTCP() string {
	d.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		d.t.Fatal(err)
	}
	go func() { _ = d.Serve(context.Background(), l) }() // ends with the server
	return l.Addr().String()
}

func TestTCP(t *testing.T) {
	t.Parallel()
	ca, server, client, stranger := certificates(t)
	serverTLS := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{server}, ClientCAs: ca, ClientAuth: tls.RequireAndVerifyClientCert,
	}
	clientTLS := func(certs ...tls.Certificate) credentials.TransportCredentials {
		return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: ca, Certificates: certs, ServerName: "localhost"})
	}
	for name, tc := range map[string]struct {
		config Config
		creds  credentials.TransportCredentials
		code   codes.Code
	}{
		"mTLS":                  {Config{TLS: serverTLS}, clientTLS(client), codes.OK},
		"TLS, no certificate":   {Config{TLS: serverTLS}, clientTLS(), codes.Unavailable},
		"TLS, of a stranger":    {Config{TLS: serverTLS}, clientTLS(stranger), codes.Unavailable},
		"plain text to TLS":     {Config{TLS: serverTLS}, insecure.NewCredentials(), codes.Unavailable},
		"plain text":            {Config{}, insecure.NewCredentials(), codes.Unavailable},
		"plain text, permitted": {Config{Insecure: true}, insecure.NewCredentials(), codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fake := newFake()
			d := start(t, tc.config, fake)
			conn, err := grpc.NewClient(d.listenTCP(), grpc.WithTransportCredentials(tc.creds))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			opened, err := twilightv1.NewTwilightServiceClient(conn).OpenLease(t.Context(), openRequest())
			if status.Code(err) != tc.code {
				t.Fatalf("error %v, want %v", err, tc.code)
			}
			if err != nil {
				return
			}
			if opened.GetFdEndpoint() != "" {
				t.Errorf("descriptors are taken at %q", opened.GetFdEndpoint())
			}
			stream, err := twilightv1.NewTwilightServiceClient(conn).Lease(withToken(t.Context(), opened.GetToken()))
			if err != nil {
				t.Fatal(err)
			}
			e := &engine{t: t, opened: opened, stream: stream}
			got := e.ask(registerRegion(1, 1, make([]byte, 16))).GetError()
			if got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_UNSUPPORTED {
				t.Errorf("shared memory over TCP: answer %v", got)
			}
		})
	}
}

// certificates makes an authority, what it signed for a server and a client, and a stranger's.
func certificates(t *testing.T) (ca *x509.CertPool, server, client, stranger tls.Certificate) {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	serial := int64(0)
	sign := func(template, parent *x509.Certificate, k, parentKey *ecdsa.PrivateKey) tls.Certificate {
		serial++
		template.SerialNumber = big.NewInt(serial)
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &k.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k, Leaf: leaf}
	}
	leaf := func(name string) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
	}
	rootKey := key()
	template := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	root := sign(template, template, rootKey, rootKey)
	ca = x509.NewCertPool()
	ca.AddCert(root.Leaf)
	server = sign(leaf("server"), root.Leaf, key(), rootKey)
	client = sign(leaf("engine"), root.Leaf, key(), rootKey)
	own := key()
	stranger = sign(leaf("stranger"), leaf("stranger"), own, own)
	return ca, server, client, stranger
}

func TestConfig(t *testing.T) {
	t.Parallel()
	all := allMethods(t)
	for want, config := range map[string]Config{
		"no device":    {Methods: all},
		"no methods":   {Devices: []gpu.Device{newFake()}},
		"the only one": {Methods: all, Devices: []gpu.Device{newFake(), newFake()}},
		"TLS":          {Methods: all, Devices: []gpu.Device{newFake()}, TLS: &tls.Config{MinVersion: tls.VersionTLS13}, Insecure: true},
		"too large":    {Methods: all, Devices: []gpu.Device{newFake()}, Limits: Limits{MessageBytes: 1 << 30}},
	} {
		if _, err := New(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
}

// The domain's enums are numbered as the wire's: convert relies on it.
func TestNumbering(t *testing.T) {
	t.Parallel()
	for domain, wire := range map[kv.DType]twilightv1.DataType{
		kv.F32:    twilightv1.DataType_DATA_TYPE_F32,
		kv.F16:    twilightv1.DataType_DATA_TYPE_F16,
		kv.BF16:   twilightv1.DataType_DATA_TYPE_BF16,
		kv.F8E4M3: twilightv1.DataType_DATA_TYPE_F8_E4M3,
	} {
		if int(domain) != int(wire) {
			t.Errorf("%v is %d, %v is %d", domain, domain, wire, wire)
		}
	}
	for domain, wire := range map[gpu.RegionKind]twilightv1.RegionKind{
		gpu.SharedMemory: twilightv1.RegionKind_REGION_KIND_SHARED_MEMORY,
		gpu.CUDAIPC:      twilightv1.RegionKind_REGION_KIND_CUDA_IPC,
		gpu.CUDAVMM:      twilightv1.RegionKind_REGION_KIND_CUDA_VMM,
		gpu.CUDAFabric:   twilightv1.RegionKind_REGION_KIND_CUDA_FABRIC,
	} {
		if int(domain) != int(wire) {
			t.Errorf("%v is %d, %v is %d", domain, domain, wire, wire)
		}
	}
}
