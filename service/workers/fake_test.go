package workers_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/twilight-sidecar/twilight/client"
	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/fault"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/service/workers"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// This test's binary is a worker of the host's device if it is called by this name, and a daemon if
// daemonPath is in its environment.
const (
	workerName = "twilight-worker"
	daemonPath = "TWILIGHT_TEST_DAEMON"
)

// deadline bounds every wait of a test: what takes longer hangs.
const deadline = time.Minute

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == workerName {
		os.Exit(workers.Main(os.Args[1:], os.Stdout, os.Stderr, fake(filepath.Dir(os.Args[0]))))
	}
	if path := os.Getenv(daemonPath); path != "" {
		os.Exit(daemonProcess(path))
	}
	goleak.VerifyTestMain(m)
}

// fake is a backend whose GPUs are the host: two, or one if a folder has a file of that name, or "none". What is
// wrong with them other files there tell, each named by a GPU: "hang" and "crash" at the start, or any other text, which is the error of a device that does not
// open. Upon SIGUSR1 the device of a worker is lost.
func fake(folder string) workers.Backend {
	return workers.Backend{
		List: func() ([]workers.GPU, error) {
			if _, err := os.Stat(filepath.Join(folder, "none")); err == nil {
				return nil, errors.New("no driver")
			}
			gpus := []workers.GPU{
				{UUID: "GPU-0", Name: "fake", MemoryBytes: 8 << 30, Capability: "9.0", MPS: true},
				{UUID: "GPU-1", Name: "fake", MemoryBytes: 8 << 30, Capability: "9.0"},
			}
			if _, err := os.Stat(filepath.Join(folder, "one")); err == nil {
				gpus = gpus[:1]
			}
			return gpus, nil
		},
		Open: func(s *workers.Settings, lost func(error)) (gpu.Device, error) {
			switch wrong, _ := os.ReadFile(filepath.Join(folder, s.Device)); string(wrong) {
			case "":
			case "hang":
				select {}
			case "crash":
				fmt.Println("the driver says no")
				os.Exit(127)
			default:
				return nil, errors.New(string(wrong))
			}
			signals := make(chan os.Signal, 1)
			signal.Notify(signals, syscall.SIGUSR1)
			go func() {
				<-signals
				lost(fault.Newf(fault.Unavailable, "", "the fake GPU was lost: open a lease anew"))
			}()
			return host.New(host.Options{Methods: s.Methods, Log: s.Logger, ShadowBytes: s.ShadowBytes}), nil
		},
	}
}

// folder makes a folder with the worker's program; workers there are wrong as fake says.
func folder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tw") // short enough for the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, filepath.Join(dir, workerName))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// wrong makes a file of what is wrong with a GPU, or how many there are.
func wrong(t testing.TB, dir, gpu, how string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, gpu), []byte(how), 0o600); err != nil {
		t.Fatal(err)
	}
}

// oneGPU is a folder where there is but one.
func oneGPU(t testing.TB) string {
	t.Helper()
	dir := folder(t)
	wrong(t, dir, "one", "")
	return dir
}

// daemon is a twilightd of fake GPUs alone.
type daemon struct {
	told       *telemetry.Telemetry
	supervisor *workers.Supervisor
	server     *service.Server
	served     chan error
}

func startDaemon(ctx context.Context, dir string, o workers.Options) (*daemon, error) {
	told, err := telemetry.Start(ctx, telemetry.Options{})
	if err != nil {
		return nil, err
	}
	o.Path, o.Telemetry = filepath.Join(dir, workerName), told
	supervisor, err := workers.New(ctx, o)
	if err != nil {
		return nil, err
	}
	all, err := methods.New()
	if err != nil {
		return nil, err
	}
	server, err := service.New(service.Config{
		Remotes: supervisor.Devices(), Methods: all, Logger: o.Logger, DrainGrace: o.DrainGrace, Telemetry: told,
	})
	if err != nil {
		return nil, err
	}
	listener, err := service.Listen(ctx, filepath.Join(dir, "d"), 0o600)
	if err != nil {
		return nil, err
	}
	d := &daemon{told: told, supervisor: supervisor, server: server, served: make(chan error, 1)}
	go func() { d.served <- server.Serve(context.WithoutCancel(ctx), listener) }()
	return d, server.SelfTest(ctx)
}

func (d *daemon) stop(ctx context.Context) error {
	err := errors.Join(d.server.Drain(ctx), <-d.served)
	d.supervisor.Close()
	return errors.Join(err, d.told.Shutdown(ctx))
}

// scrape is what Prometheus sees: values by series, without the attributes of the target.
func (d *daemon) scrape(t testing.TB) map[string]float64 {
	t.Helper()
	answer := httptest.NewRecorder()
	d.told.Handler(telemetry.Admin{}).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	series := make(map[string]float64)
	for line := range strings.Lines(answer.Body.String()) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if !strings.Contains(name, "{") {
			name, value, _ = strings.Cut(strings.TrimSpace(line), " ")
		} else {
			name += "}"
		}
		series[name], _ = strconv.ParseFloat(value, 64)
	}
	return series
}

// becomes waits until a series has a value.
func (d *daemon) becomes(t testing.TB, series string, want float64) {
	t.Helper()
	for end := time.Now().Add(deadline); d.scrape(t)[series] != want; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is %v, not %v", series, d.scrape(t)[series], want)
		}
	}
}

// serve starts a daemon in this process.
func serve(t testing.TB, dir string, o workers.Options) *daemon {
	t.Helper()
	o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	if o.DrainGrace == 0 {
		o.DrainGrace = 100 * time.Millisecond
	}
	d, err := startDaemon(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		if err := d.stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return d
}

// daemonProcess is a daemon with a spare of each GPU, until it is killed or told to end.
func daemonProcess(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	d, err := startDaemon(ctx, dir, workers.Options{Spares: 1, DrainGrace: 100 * time.Millisecond})
	if err == nil {
		<-ctx.Done()
		err = d.stop(context.Background())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func dial(t testing.TB, dir string) *client.Client {
	t.Helper()
	c, err := client.Dial("unix://" + filepath.Join(dir, "d"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// engine is a session with a cache of noise.
type engine struct {
	t        testing.TB
	session  *client.Session
	cache    *client.Cache
	states   chan client.State
	sequence uint64 // the last one
	trace    client.Trace
}

const (
	headSize, pageSize, pages = 64, 16, 16
	tokenBytes                = headSize * 4
	half                      = pages * pageSize * tokenBytes
)

var geometry = client.Geometry{Layers: 1, QueryHeads: 2, KVHeads: 1, KDim: headSize, Query: client.F32}

func newEngine(t testing.TB, c *client.Client, gpu string) *engine {
	t.Helper()
	e := &engine{t: t, states: make(chan client.State, 64)}
	session, err := c.Open(t.Context(), client.OpenOptions{
		EngineName: "test", Geometry: geometry, Device: gpu,
		Config: `{"selector": {"type": "quest", "token_budget": 64}, "weight_estimator": {"type": "min_max_quant"},
			"weight_pruner": {"type": "top_p", "threshold": 0.9}, "skip_first_two_layers": false}`,
		OnState: func(s client.State, _ error) { e.states <- s },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	e.session = session
	e.until(client.StateLive)
	memory, err := session.NewBuffer(t.Context(), 2*half, client.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	noise := uint32(1)
	for at := 0; at < memory.Size(); at += 4 {
		noise = noise*1664525 + 1013904223
		client.F32.Encode(memory.Bytes()[at:], []float32{float32(noise>>8)/(1<<23) - 1})
	}
	e.cache, err = session.RegisterCache(t.Context(), client.CacheSpec{
		DType: client.F32, PageSize: pageSize, NumPages: pages,
		K:      client.Strides{Page: pageSize * tokenBytes, Head: tokenBytes, Token: tokenBytes},
		Layers: []client.CacheLayer{{K: client.Location{Buffer: memory}, V: client.Location{Buffer: memory, Offset: half}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// decode is the output of a step of a new sequence, of the cache's first tokens.
func (e *engine) decode(tokens int) (string, error) {
	table := make([]int32, pages)
	for i := range table {
		table[i] = int32(i)
	}
	e.sequence++
	step, err := e.cache.Step(e.t.Context(), client.Batch{
		Sequences: []client.Sequence{{ID: e.sequence, Len: tokens, Table: table}}, Trace: e.trace,
	})
	if err != nil {
		return "", err
	}
	query := make([]float32, 2*headSize)
	for i := range query {
		query[i] = float32(i%7) / 7
	}
	result, err := step.Layer(e.t.Context(), client.Layer{Query: geometry.EncodeQuery(nil, query)})
	if err != nil {
		return "", err
	}
	return string(result.Output), nil
}

func (e *engine) mustDecode(tokens int) string {
	e.t.Helper()
	output, err := e.decode(tokens)
	if err != nil {
		e.t.Fatal(err)
	}
	return output
}

// until waits for a state.
func (e *engine) until(want client.State) {
	e.t.Helper()
	for timeout := time.After(deadline); ; {
		select {
		case s := <-e.states:
			if s == want {
				return
			}
		case <-timeout:
			e.t.Fatalf("the session was never %v", want)
		}
	}
}
