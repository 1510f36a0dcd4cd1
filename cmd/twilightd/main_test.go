package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/internal/fdsock"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// runVar, in the environment, makes this test's binary the daemon.
const runVar = "TWILIGHTD_TEST_RUN"

// deadline bounds every wait of a test: what takes longer hangs.
const deadline = time.Minute

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == workerName {
		os.Exit(brokenWorker())
	}
	if os.Getenv(runVar) != "" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

// process is a daemon in a process of its own.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	log *bufio.Scanner
}

func launch(t *testing.T, args ...string) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), runVar+"=1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(deadline, func() { _ = cmd.Process.Kill() })
	t.Cleanup(func() {
		kill.Stop()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return &process{t: t, cmd: cmd, log: bufio.NewScanner(stderr)}
}

// says reads the log up to a record with the message.
func (p *process) says(message string) {
	p.t.Helper()
	var seen []string
	for p.log.Scan() {
		seen = append(seen, p.log.Text())
		if strings.Contains(p.log.Text(), `"msg":"`+message+`"`) {
			return
		}
	}
	p.t.Fatalf("the daemon never said %q, but:\n%s", message, strings.Join(seen, "\n"))
}

func (p *process) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// exit waits for the end and returns how it came.
func (p *process) exit() *os.ProcessState {
	p.t.Helper()
	for p.log.Scan() { // Wait closes the pipe
	}
	_ = p.cmd.Wait()
	return p.cmd.ProcessState
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw") // short enough for the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func dial(t *testing.T, target string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// engine is a lease with a current step.
type engine struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[twilightv1.LeaseRequest, twilightv1.LeaseResponse]
	lastID uint64
}

func open(t *testing.T, conn *grpc.ClientConn) *engine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	client := twilightv1.NewTwilightServiceClient(conn)
	opened, err := client.OpenLease(ctx, &twilightv1.OpenLeaseRequest{
		ProtocolVersion: 1, EngineId: make([]byte, 16),
		Geometry: &twilightv1.Geometry{
			NumLayers: 1, QueryHeads: 1, KvHeads: 1, KDim: 16, VDim: 16, SoftmaxScale: 1,
			QueryDtype: twilightv1.DataType_DATA_TYPE_F32, OutputDtype: twilightv1.DataType_DATA_TYPE_F32,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := client.Lease(metadata.AppendToOutgoingContext(ctx, "twilight-lease-bin", string(opened.GetToken())))
	if err != nil {
		t.Fatal(err)
	}
	e := &engine{t: t, stream: stream}

	const page = 16 * 16 * 4
	fd, err := unix.MemfdCreate("lent", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 4*page); err != nil {
		t.Fatal(err)
	}
	tokens, err := fdsock.Send(ctx, opened.GetFdEndpoint(), opened.GetToken(), fd)
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range []*twilightv1.LeaseRequest{
		{Request: &twilightv1.LeaseRequest_RegisterRegion{RegisterRegion: &twilightv1.RegisterRegion{
			RegionId: 1, Size: 4 * page, Access: twilightv1.Access_ACCESS_READ_ONLY,
			Kind: &twilightv1.RegisterRegion_SharedMemory{SharedMemory: &twilightv1.SharedMemory{FdToken: tokens[0][:]}},
		}}},
		{Request: &twilightv1.LeaseRequest_RegisterCache{RegisterCache: &twilightv1.RegisterCache{
			CacheId: 1, Dtype: twilightv1.DataType_DATA_TYPE_F32, PageSize: 16, NumPages: 2,
			KStrides: &twilightv1.Strides{Page: page, Token: 16 * 4, Head: page},
			Layers: []*twilightv1.CacheLayer{{
				K: &twilightv1.Location{RegionId: 1}, V: &twilightv1.Location{RegionId: 1, Offset: 2 * page},
			}},
		}}},
		step(1),
	} {
		e.send(req)
		if got := e.receive().GetError(); got != nil {
			t.Fatal(got)
		}
	}
	return e
}

func step(id uint64) *twilightv1.LeaseRequest {
	return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_Step{Step: &twilightv1.Step{
		CacheId: 1, StepId: id, Sequences: []uint64{1}, Lengths: []int32{20},
		Table: &twilightv1.TableUpdate{Counts: []uint32{2}, Entries: []int32{0, 1}},
	}}}
}

func layer() *twilightv1.LeaseRequest {
	return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_Layer{Layer: &twilightv1.Layer{
		CacheId: 1, StepId: 1, Query: &twilightv1.Layer_QueryInline{QueryInline: make([]byte, 16*4)},
	}}}
}

func (e *engine) send(req *twilightv1.LeaseRequest) {
	e.t.Helper()
	e.lastID++
	req.RequestId = e.lastID
	if err := e.stream.Send(req); err != nil {
		e.t.Fatal(err)
	}
}

func (e *engine) receive() *twilightv1.LeaseResponse {
	e.t.Helper()
	resp, err := e.stream.Recv()
	if err != nil {
		e.t.Fatal(err)
	}
	return resp
}

func TestServeAndDrain(t *testing.T) {
	t.Parallel()
	path := filepath.Join(tempDir(t), "t.sock")
	settings := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(settings, []byte("listen: [unix://"+path+"]\ndrain-timeout: 7s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := launch(t, "--settings", settings)
	p.says("serving")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, error %v", info.Mode(), err)
	}
	conn := dial(t, "unix://"+path)
	health, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health %v, error %v", health, err)
	}
	e := open(t, conn)

	p.signal(syscall.SIGTERM)
	if got := e.receive().GetDraining(); got.GetGraceMs() != 7000 {
		t.Errorf("draining: %v", got)
	}
	e.send(layer()) // of a step that was begun
	if got := e.receive().GetLayerResult(); len(got.GetOutput()) != 16*4 {
		t.Errorf("layer: %v", got)
	}
	e.send(step(2))
	if got := e.receive().GetError(); got.GetCode() != twilightv1.ErrorCode_ERROR_CODE_UNAVAILABLE {
		t.Errorf("a new step: %v", got)
	}
	if err := e.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
	for _, left := range []string{path, path + ".fd"} {
		if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", left, err)
		}
	}
}

// An engine that does not heed the drain does not hold it up.
func TestDrainOfABusyDaemon(t *testing.T) {
	t.Parallel()
	path := filepath.Join(tempDir(t), "t.sock")
	p := launch(t, "--listen", "unix://"+path, "--drain-timeout", "50ms")
	p.says("serving")
	e := open(t, dial(t, "unix://"+path))
	p.signal(os.Interrupt)
	e.receive() // Draining
	if _, err := e.stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended by %v", err)
	}
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
}

func TestSecondSignal(t *testing.T) {
	t.Parallel()
	path := filepath.Join(tempDir(t), "t.sock")
	p := launch(t, "--listen", "unix://"+path, "--drain-timeout", "7s")
	p.says("serving")
	e := open(t, dial(t, "unix://"+path))
	p.signal(syscall.SIGTERM)
	e.receive() // Draining
	p.signal(syscall.SIGTERM)
	if status := p.exit().Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("exit: %v", status)
	}
	// The socket that it leaves is no hindrance.
	p = launch(t, "--listen", "unix://"+path, "--allow-uid", "4711")
	p.says("serving")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("a socket for several users has mode %v, error %v", info.Mode(), err)
	}
	p.signal(syscall.SIGTERM)
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
}

// workerName makes this test's binary, called by it, a worker that serves nothing.
const workerName = "twilight-worker"

// brokenWorker answers a list of GPUs by the file beside it of that name.
func brokenWorker() int {
	if os.Args[1] == "list" {
		list, err := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), "list"))
		if fmt.Printf("%s", list); err == nil && list[0] == '[' {
			return 0
		}
	}
	fmt.Println("broken")
	return exitFailed
}

// worker is the program of a brokenWorker.
func worker(t *testing.T, list string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), workerName)
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, path)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(filepath.Dir(path), "list"), []byte(list), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A GPU that cannot be used is told, beside the devices that can.
func TestUnusableGPU(t *testing.T) {
	t.Parallel()
	path := filepath.Join(tempDir(t), "t.sock")
	p := launch(t, "--listen", "unix://"+path, "--worker", worker(t, `[{"uuid": "GPU-1", "name": "Blank", "memory_bytes": 8589934592}]`))
	p.says("worker did not start")
	p.says("serving")
	told, err := twilightv1.NewTwilightServiceClient(dial(t, "unix://"+path)).GetCapabilities(t.Context(), &twilightv1.GetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	devices := told.GetDevices()
	if len(devices) != 2 || devices[0].GetId() != "host" || devices[0].Mps != nil || devices[1].GetId() != "GPU-1" ||
		devices[1].GetShadowBytesTotal() != 4<<30 || !strings.Contains(devices[1].GetUnusable(), "broken") {
		t.Errorf("devices %v", devices)
	}
	p.signal(syscall.SIGTERM)
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
}

func TestTCP(t *testing.T) {
	t.Parallel()
	p := launch(t, "--listen", "tcp://127.0.0.1:0", "--insecure-tcp")
	p.says("listening")
	var address string
	if _, after, ok := strings.Cut(p.log.Text(), `"address":"`); ok {
		address, _, _ = strings.Cut(after, `"`)
	}
	p.says("serving")
	health, err := healthpb.NewHealthClient(dial(t, address)).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health %v, error %v", health, err)
	}
	p.signal(syscall.SIGTERM)
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
}

func TestDefaultSocket(t *testing.T) {
	dir := tempDir(t)
	t.Setenv("XDG_RUNTIME_DIR", dir)
	p := launch(t)
	p.says("serving")
	if info, err := os.Stat(filepath.Join(dir, "twilight")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v, %v", info, err)
	}
	conn, err := net.Dial("unix", filepath.Join(dir, "twilight", "twilightd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	p.signal(syscall.SIGTERM)
	if state := p.exit(); state.ExitCode() != 0 {
		t.Errorf("exit: %v", state)
	}
}

func TestExitCodes(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	unix := "unix://" + filepath.Join(dir, "t.sock")
	for _, tc := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--no-such-flag"}, exitUsage, "no-such-flag"},
		{[]string{"--listen", "udp://:1"}, exitUsage, "unix:///PATH"},
		{[]string{"--listen", "unix://relative"}, exitUsage, "unix:///PATH"},
		{[]string{"--listen", "tcp://127.0.0.1:0"}, exitUsage, "--insecure-tcp"},
		{[]string{"--listen", "tcp://127.0.0.1:0", "--tls-cert", file}, exitUsage, "together"},
		{[]string{"--listen", "tcp://127.0.0.1:0", "--insecure-tcp", "--tls-cert", file, "--tls-key", file, "--tls-client-ca", file}, exitUsage, "excludes"},
		{[]string{"--listen", unix, "--shadow-limit", "8GB"}, exitUsage, "8GiB"},
		{[]string{"--listen", unix, "--drain-timeout", "8s"}, exitUsage, "--drain-timeout"},
		{[]string{"--listen", unix, "--workers=-1"}, exitUsage, "--workers"},
		{[]string{"--listen", unix, "--spares=-1"}, exitUsage, "--spares"},
		{[]string{"--listen", unix, "--gpu-leases=0"}, exitUsage, "--gpu-leases"},
		{[]string{"--listen", unix, "--backend", "host,tpu"}, exitUsage, "--backend"},
		{[]string{"--listen", unix, "--backend", "cuda", "--worker", filepath.Join(dir, "none")}, exitFailed, "--backend cuda"},
		{[]string{"--listen", unix, "--backend", "cuda", "--worker", worker(t, "[]")}, exitFailed, "no GPU is visible"},
		{[]string{"--listen", unix, "--backend", "cuda", "--worker", worker(t, "no driver")}, exitFailed, "no driver"},
		{[]string{"--listen", unix, "--log-level", "loud"}, exitUsage, "--log-level"},
		{[]string{"--settings", file}, exitUsage, "configuration file"},
		{[]string{"--listen", "unix://" + file}, exitFailed, "no socket"},
		{[]string{"--listen", "unix://" + filepath.Join(dir, "none", "t.sock")}, exitFailed, "folder"},
		{[]string{"--listen", "tcp://127.0.0.1:0", "--tls-cert", file, "--tls-key", file, "--tls-client-ca", file}, exitFailed, "--tls-cert"},
	} {
		var stdout, stderr strings.Builder
		if code := run(tc.args, &stdout, &stderr); code != tc.code || !strings.Contains(stderr.String(), tc.says) {
			t.Errorf("%v: exit code %d, want %d; said %q, not %q", tc.args, code, tc.code, stderr.String(), tc.says)
		}
	}
}

func TestByteSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{
		"0": 0, "4096": 4096, "1KiB": 1 << 10, "512MiB": 512 << 20, "8 GiB": 8 << 30, "16777215TiB": 16777215 << 40,
	} {
		var got byteSize
		if err := got.UnmarshalText([]byte(text)); err != nil || uint64(got) != want {
			t.Errorf("%q: %d, error %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "GiB", "-1", "1.5GiB", "8G", "16777216TiB", "99999999999999999999"} {
		var got byteSize
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was read as %d", text, got)
		}
	}
}
