package workers_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/internal/otlptest"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/service/workers"
)

// Series of the workers in one state, and of those that ended in one way.
const (
	spares = `twilight_workers{twilight_worker_state="spare"}`
	leased = `twilight_workers{twilight_worker_state="leased"}`
	ends   = `twilight_worker_ends_total{twilight_reason="%s"}`
)

// leasedTo are the process ids of the workers that have leases, by their sockets.
func leasedTo(t testing.TB, dir string) (pids []int) {
	t.Helper()
	sockets, err := filepath.Glob(filepath.Join(dir, "d.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, socket := range sockets {
		if pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(socket), "d.")); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func signalTo(t testing.TB, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

// A lease is served by a worker of its own, at a socket of its own, and the worker ends with it.
func TestLease(t *testing.T) {
	t.Parallel()
	dir := oneGPU(t)
	d := serve(t, dir, workers.Options{Spares: 1})
	d.becomes(t, spares, 1)
	c := dial(t, dir)
	first, second := newEngine(t, c, "GPU-0"), newEngine(t, c, "GPU-0")
	want := first.mustDecode(200)
	if got := second.mustDecode(200); got != want || len(want) != 2*headSize*4 {
		t.Errorf("two leases answer differently, with %d and %d bytes", len(want), len(got))
	}
	if pids := leasedTo(t, dir); len(pids) != 2 {
		t.Errorf("the leases' workers are %v", pids)
	}
	d.becomes(t, leased, 2)
	d.becomes(t, spares, 1)
	for _, e := range []*engine{first, second} {
		if err := e.session.Close(); err != nil {
			t.Error(err)
		}
	}
	d.becomes(t, fmt.Sprintf(ends, "ended"), 2)
	d.becomes(t, leased, 0)
	if pids := leasedTo(t, dir); len(pids) > 0 {
		t.Errorf("workers left sockets: %v", pids)
	}
	if warm := d.scrape(t)[`twilight_worker_open_duration_seconds_count{twilight_worker_start="warm"}`]; warm < 1 {
		t.Errorf("%v leases got a spare", warm)
	}
}

// Without spares a worker is started for each lease.
func TestCold(t *testing.T) {
	t.Parallel()
	dir := oneGPU(t)
	d := serve(t, dir, workers.Options{})
	newEngine(t, dial(t, dir), "GPU-0").mustDecode(100)
	series := d.scrape(t)
	if series[spares] != 0 || series[`twilight_worker_open_duration_seconds_count{twilight_worker_start="cold"}`] != 1 {
		t.Errorf("%v spares, or no cold lease", series[spares])
	}
}

// What a GPU can do its workers say; a request that is refused costs none of them.
func TestCapabilities(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	d := serve(t, dir, workers.Options{Spares: 1, Leases: 2, ShadowBytes: 1 << 30})
	c := dial(t, dir)
	told, err := c.Capabilities(t.Context(), &client.ShadowQuery{Geometry: geometry})
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range told.GetDevices() {
		if g.GetId() != fmt.Sprintf("GPU-%d", i) || g.GetBackend() != "cuda" || g.Mps == nil || g.GetMps() != (i == 0) ||
			g.GetUnusable() != "" || g.GetShadowBytesFree() != 1<<30 || g.ShadowBytesPerToken == nil || len(g.GetSelectors()) == 0 {
			t.Errorf("capabilities %v", g)
		}
	}
	started := d.scrape(t)["twilight_worker_start_duration_seconds_count"]
	for _, o := range []client.OpenOptions{
		{Geometry: geometry, Device: "GPU-0", Config: `{"selector": {"type": "none such"}}`},
		{Geometry: geometry}, // of which GPU?
		{Geometry: geometry, Device: "GPU-2"},
		{Geometry: client.Geometry{Layers: 1, QueryHeads: 3, KVHeads: 2, KDim: 8, Query: client.F32}, Device: "GPU-0"},
	} {
		if s, err := c.Open(t.Context(), o); err == nil {
			s.Close()
			t.Errorf("%+v was opened", o)
		}
	}
	e := newEngine(t, c, "GPU-0")
	if got := e.session.Limits().GetMaxShadowBytes(); got != 1<<29 {
		t.Errorf("a lease may have %d bytes of shadows", got)
	}
	if !e.session.Device().GetMps() {
		t.Error("the engine is not told of MPS")
	}
	other := newEngine(t, c, "GPU-0")
	if _, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry, Device: "GPU-0"}); !errors.Is(err, client.ErrExhausted) {
		t.Errorf("a third lease: %v", err)
	}
	if now := d.scrape(t)["twilight_worker_start_duration_seconds_count"]; now > started+1 {
		t.Errorf("%v workers were started, of which %v for refusals", now, now-started)
	}
	if err := other.session.Close(); err != nil {
		t.Error(err)
	}
	for free := uint64(0); free == 0; time.Sleep(20 * time.Millisecond) {
		told, err := c.Capabilities(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		free = told.GetDevices()[0].GetShadowBytesFree()
	}
	newEngine(t, c, "GPU-0").mustDecode(20)
}

// A worker that dies costs its own lease alone, whose engine goes on with another.
func TestWorkerDies(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]struct {
		signal syscall.Signal
		reason string
		says   string
	}{
		"killed":       {syscall.SIGKILL, "killed", "worker"},
		"device lost":  {syscall.SIGUSR1, "device_lost", "the fake GPU was lost"},
		"unresponsive": {syscall.SIGSTOP, "unresponsive", "worker"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			d := serve(t, dir, workers.Options{Spares: 1, HealthTimeout: 2 * time.Second})
			c := dial(t, dir)
			e := newEngine(t, c, "GPU-0")
			victim := leasedTo(t, dir)
			if len(victim) != 1 {
				t.Fatalf("the lease's workers are %v", victim)
			}
			neighbour, far := newEngine(t, c, "GPU-0"), newEngine(t, c, "GPU-1")
			want := e.mustDecode(150)

			signalTo(t, victim[0], how.signal)
			e.until(client.StateLost)
			_, lost := e.session.State()
			if lost != nil && (!errors.Is(lost, client.ErrLeaseLost) || !strings.Contains(lost.Error(), how.says)) {
				t.Errorf("the lease was lost by %v", lost)
			}
			for _, other := range []*engine{neighbour, far} {
				if other.mustDecode(150) != want {
					t.Error("another lease answers differently")
				}
			}
			e.until(client.StateLive)
			if e.mustDecode(150) != want {
				t.Error("the new lease answers differently")
			}
			d.becomes(t, fmt.Sprintf(ends, how.reason), 1)
			d.becomes(t, leased, 3)
			for _, pid := range leasedTo(t, dir) {
				if pid == victim[0] {
					t.Error("the dead worker's socket is left")
				}
			}
		})
	}
}

// alive tells whether a process runs: a zombie does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(stat), ") ")
	return err == nil && !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// children are the processes that a process started.
func children(t testing.TB, pid int) (pids []int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		text, _ := os.ReadFile(task) // the thread may be gone
		for word := range strings.FieldsSeq(string(text)) {
			child, err := strconv.Atoi(word)
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, child)
		}
	}
	return pids
}

// Workers do not outlive their daemon, however it ends; its successor serves their engines.
func TestDaemonDies(t *testing.T) {
	t.Parallel()
	for _, how := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(how.String(), func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			start := func() *exec.Cmd {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), daemonPath+"="+dir)
				cmd.Stderr = os.Stderr
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
				return cmd
			}
			daemon := start()
			c := dial(t, dir)
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			if err := c.WaitServing(ctx); err != nil {
				t.Fatal(err)
			}
			e := newEngine(t, c, "GPU-1")
			want := e.mustDecode(120)
			wrong(t, dir, "GPU-0", "hang")
			busy := newEngine(t, c, "GPU-0") // whose spare's successor hangs as it starts
			for len(children(t, daemon.Process.Pid)) < 4 {
				time.Sleep(time.Millisecond)
			}
			pids := children(t, daemon.Process.Pid)
			signalTo(t, daemon.Process.Pid, how)
			e.until(client.StateLost)
			_ = daemon.Wait()
			for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
				left := 0
				for _, pid := range pids {
					if alive(pid) {
						left++
					}
				}
				if left == 0 {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%d workers outlive the daemon", left)
				}
			}
			wrong(t, dir, "GPU-0", "")
			start()
			for _, e := range []*engine{e, busy} {
				e.until(client.StateLive)
				if e.mustDecode(120) != want {
					t.Error("the next daemon answers differently")
				}
				if err := e.session.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A drain tells engines, waits for them within the grace, and ends every worker.
func TestDrain(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	d := serve(t, dir, workers.Options{Spares: 1, DrainGrace: time.Minute})
	c := dial(t, dir)
	e, other := newEngine(t, c, "GPU-0"), newEngine(t, c, "GPU-1")
	e.mustDecode(100)
	drained := make(chan error, 1)
	go func() { drained <- d.server.Drain(context.Background()) }()
	for _, e := range []*engine{e, other} {
		e.until(client.StateDraining)
		if _, err := e.decode(110); !errors.Is(err, client.ErrDraining) {
			t.Errorf("a step while draining: %v", err)
		}
		if err := e.session.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if _, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry, Device: "GPU-0"}); err == nil {
		t.Error("a lease was opened after the drain")
	}
	series := d.scrape(t)
	if series[spares]+series[leased] != 0 || series[fmt.Sprintf(ends, "ended")] < 4 {
		t.Errorf("%v spares and %v leases are left, %v workers ended", series[spares], series[leased], series[fmt.Sprintf(ends, "ended")])
	}
}

// A GPU whose workers fail is said to be unusable, and why; it is used once they do not. The other one is
// used all along.
func TestUnusable(t *testing.T) {
	t.Parallel()
	for how, says := range map[string]string{
		"no kernels for this GPU": "no kernels for this GPU",
		"crash":                   "the driver says no",
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			dir := folder(t)
			wrong(t, dir, "GPU-0", how)
			d := serve(t, dir, workers.Options{Spares: 1})
			c := dial(t, dir)
			told, err := c.Capabilities(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if why := told.GetDevices()[0].GetUnusable(); !strings.Contains(why, says) {
				t.Errorf("unusable because of %q, not %q", why, says)
			}
			if why := told.GetDevices()[1].GetUnusable(); why != "" {
				t.Errorf("the other GPU is unusable: %s", why)
			}
			if _, err := c.Open(t.Context(), client.OpenOptions{Geometry: geometry, Device: "GPU-0"}); !errors.Is(err, client.ErrDraining) {
				t.Errorf("a lease on an unusable GPU: %v", err)
			}
			newEngine(t, c, "GPU-1").mustDecode(30)
			if got := d.scrape(t)[`twilight_gpu_usable{twilight_device_id="GPU-0"}`]; got != 0 {
				t.Error("the GPU is told to be usable")
			}
			if err := os.Remove(filepath.Join(dir, "GPU-0")); err != nil {
				t.Fatal(err)
			}
			d.becomes(t, `twilight_gpu_usable{twilight_device_id="GPU-0"}`, 1)
			newEngine(t, c, "GPU-0").mustDecode(30)
		})
	}
}

// A worker that takes too long to start is killed, and another started later.
func TestSlowStart(t *testing.T) {
	t.Parallel()
	dir := oneGPU(t)
	wrong(t, dir, "GPU-0", "hang")
	d := serve(t, dir, workers.Options{Spares: 1, StartTimeout: 3 * time.Second})
	c := dial(t, dir)
	told, err := c.Capabilities(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if why := told.GetDevices()[0].GetUnusable(); !strings.Contains(why, "not ready within 3s") {
		t.Errorf("unusable because of %q", why)
	}
	d.becomes(t, fmt.Sprintf(ends, "start_timeout"), 1)
	if err := os.Remove(filepath.Join(dir, "GPU-0")); err != nil {
		t.Fatal(err)
	}
	d.becomes(t, `twilight_gpu_usable{twilight_device_id="GPU-0"}`, 1)
	newEngine(t, c, "GPU-0").mustDecode(30)
}

// The daemon tells of all leases, and goes on counting what workers did that are gone.
func TestTelemetry(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	d := serve(t, dir, workers.Options{Spares: 1})
	c := dial(t, dir)
	e, other := newEngine(t, c, "GPU-0"), newEngine(t, c, "GPU-1")
	for range 3 {
		e.mustDecode(100)
		other.mustDecode(100)
	}
	const steps = `twilight_request_duration_seconds_count{twilight_request="step"}`
	series := d.scrape(t)
	if series[steps] != 6 || series["twilight_leases"] != 2 || series["twilight_memory_lent_bytes"] != 4*half || series["twilight_draining"] != 0 {
		t.Errorf("%v steps, %v leases, %v bytes lent", series[steps], series["twilight_leases"], series["twilight_memory_lent_bytes"])
	}
	snapshot := d.told.Snapshot(t.Context(), 2)
	if len(snapshot.Leases) != 2 || snapshot.Leases[0].ID == snapshot.Leases[1].ID {
		t.Fatalf("leases %+v", snapshot.Leases)
	}
	for _, l := range snapshot.Leases {
		if l.Engine != "test" || l.Steps != 3 || l.Sequence != "2" || len(l.Budget) != 1 || len(l.Kept) != 1 {
			t.Errorf("lease %+v", l)
		}
	}
	if err := e.session.Close(); err != nil {
		t.Error(err)
	}
	d.becomes(t, "twilight_leases", 1)
	d.becomes(t, "twilight_leases_opened_total", 2)
	d.becomes(t, steps, 6)
	d.becomes(t, "twilight_memory_lent_bytes", 2*half)
}

// One trace has the engine's step and the worker's, which the worker sends itself and links to the call that
// opened the lease at the daemon.
func TestTraces(t *testing.T) {
	collector := otlptest.Start(t, nil)
	for name, value := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT": collector.Endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
		"OTEL_BSP_SCHEDULE_DELAY": "5", "OTEL_METRICS_EXPORTER": "none", "OTEL_TRACES_SAMPLER": "parentbased_always_on",
	} {
		t.Setenv(name, value)
	}
	dir := oneGPU(t)
	serve(t, dir, workers.Options{Spares: 1})
	e := newEngine(t, dial(t, dir), "GPU-0")
	e.trace.Parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	e.mustDecode(100)
	found := func(name string) (span *tracepb.Span) {
		collector.Wait(t, name, func() bool {
			for _, s := range collector.Spans() {
				if s.GetName() == name {
					span = s
				}
			}
			return span != nil
		})
		return span
	}
	opened, step := found("twilight.v1.TwilightService/OpenLease"), found("twilight.step")
	if hex.EncodeToString(step.GetParentSpanId()) != "b7ad6b7169203331" {
		t.Errorf("the step's parent is %x", step.GetParentSpanId())
	}
	if links := step.GetLinks(); len(links) != 1 || string(links[0].GetSpanId()) != string(opened.GetSpanId()) {
		t.Errorf("the step links to %v, not to %x", links, opened.GetSpanId())
	}
	if layer := found("twilight.layer"); string(layer.GetParentSpanId()) != string(step.GetSpanId()) {
		t.Errorf("the layer's parent is %x", layer.GetParentSpanId())
	}
}

// A worker's socket serves the one lease, of the one peer, and nobody else.
func TestForeignPeers(t *testing.T) {
	t.Parallel()
	dir := oneGPU(t)
	serve(t, dir, workers.Options{Spares: 1})
	newEngine(t, dial(t, dir), "GPU-0")
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, fmt.Sprintf("d.%d", leasedTo(t, dir)[0])),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := twilightv1.NewTwilightServiceClient(conn)
	_, err = service.OpenLease(t.Context(), &twilightv1.OpenLeaseRequest{
		ProtocolVersion: 1, EngineId: make([]byte, 16), Geometry: &twilightv1.Geometry{
			NumLayers: 1, QueryHeads: 1, KvHeads: 1, KDim: 16, VDim: 16, SoftmaxScale: 1,
			QueryDtype: twilightv1.DataType_DATA_TYPE_F32, OutputDtype: twilightv1.DataType_DATA_TYPE_F32,
		},
	})
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a lease was asked for at a worker: %v", err)
	}
	stream, err := service.Lease(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a stream without a token: %v", err)
	}
}

// A program that lists no GPUs is no crash.
func TestNoGPUs(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	wrong(t, dir, "none", "")
	if _, err := workers.New(t.Context(), workers.Options{Path: filepath.Join(dir, workerName)}); err == nil || !strings.Contains(err.Error(), "no driver") {
		t.Errorf("without a driver: %v", err)
	}
}
