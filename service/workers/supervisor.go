package workers

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// listTimeout bounds what the worker's program may take to list the GPUs.
const listTimeout = 30 * time.Second

// Options configure a Supervisor. Path is required; other zero fields take the defaults that their comments
// name.
type Options struct {
	// Path is the worker's program.
	Path string
	// Spares are workers of each GPU that are kept warm: started, with a context, waiting for a lease; none.
	Spares int
	// Leases is the most leases that a GPU has at a time; 4. Each may take an equal share of ShadowBytes.
	Leases int
	// ShadowBytes bounds the shadows on each GPU; half of its memory.
	ShadowBytes uint64

	// AllowedUIDs and DrainGrace are as in service.Config.
	AllowedUIDs []uint32
	DrainGrace  time.Duration

	// Logger takes what there is to say, and the workers' own logs, from LogLevel on; discarded.
	Logger   *slog.Logger
	LogLevel slog.Level

	// Telemetry takes what workers tell of themselves, and what becomes of them; nobody.
	Telemetry *telemetry.Telemetry

	// StartTimeout is how long a worker may take until it can serve; 30 s.
	StartTimeout time.Duration
	// HealthTimeout is how long a worker may owe an answer before it is killed; 5 s.
	HealthTimeout time.Duration
}

func (o Options) withDefaults() Options {
	o.Leases = cmp.Or(o.Leases, 4)
	o.DrainGrace = cmp.Or(o.DrainGrace, 5*time.Second)
	o.StartTimeout = cmp.Or(o.StartTimeout, 30*time.Second)
	o.HealthTimeout = cmp.Or(o.HealthTimeout, 5*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Supervisor keeps the workers of every GPU.
type Supervisor struct {
	options Options
	gpus    []*device
	keeping sync.WaitGroup
	starts  chan func()
}

// New asks the worker's program for the GPUs that are visible. None is no error. Close ends it, once the
// devices are drained.
func New(ctx context.Context, o Options) (*Supervisor, error) {
	s := &Supervisor{options: o.withDefaults(), starts: make(chan func())}
	gpus, err := s.list(ctx)
	if err != nil {
		return nil, err
	}
	for _, g := range gpus {
		d := newDevice(s, g)
		s.gpus = append(s.gpus, d)
		s.keeping.Go(func() { d.keep(context.WithoutCancel(ctx)) })
	}
	go s.startAll()
	return s, nil
}

// Devices are the GPUs.
func (s *Supervisor) Devices() []service.Remote {
	var list []service.Remote
	for _, d := range s.gpus {
		list = append(list, d)
	}
	return list
}

// Close kills what is left of the workers.
func (s *Supervisor) Close() {
	for _, d := range s.gpus {
		d.stop()
		d.kill()
	}
	s.keeping.Wait()
	close(s.starts)
}

// list asks for the GPUs in a process of its own, as the driver may end it.
func (s *Supervisor) list(ctx context.Context) ([]GPU, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.options.Path, "list") //nolint:gosec // the operator names the program
	cmd.Env = environment()
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		said := strings.Join(strings.Fields(string(out)+" "+stderr.String()), " ")
		return nil, fmt.Errorf("%s list: %w: %.200s", s.options.Path, err, said)
	}
	var gpus []GPU
	if err := json.Unmarshal(out, &gpus); err != nil {
		return nil, fmt.Errorf("%s list: what it says is no list of GPUs: %w", s.options.Path, err)
	}
	return gpus, nil
}

// startAll starts every process, on one thread: a child is told of the death of the thread that started it
// (PR_SET_PDEATHSIG), not of the process.
func (s *Supervisor) startAll() {
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	for start := range s.starts {
		start()
	}
}

// start starts a worker, which inherits control.
func (s *Supervisor) start(settings *Settings, control, output *os.File) (*exec.Cmd, error) {
	args, err := settings.arguments()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(s.options.Path, args...) //nolint:gosec // the operator names the program
	cmd.Env = append(environment(), "CUDA_DEVICE_MAX_CONNECTIONS=32")
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = []*os.File{control}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// Not SIGKILL: under MPS what dies while its kernel runs takes its neighbours along.
		Pdeathsig: syscall.SIGTERM,
		Setpgid:   true, // a terminal's Ctrl-C is the daemon's to handle
	}
	done := make(chan error)
	s.starts <- func() { done <- cmd.Start() }
	return cmd, <-done
}

// inherited are the variables, or their beginnings, that workers have of the daemon.
var inherited = []string{
	"PATH=", "HOME=", "TMPDIR=", "TZ=", "LANG=", "LC_", "LD_LIBRARY_PATH=", "SSL_CERT_",
	"CUDA_", "NVIDIA_", "OTEL_", "HTTP_PROXY=", "HTTPS_PROXY=", "NO_PROXY=", "GODEBUG=", "GOTRACEBACK=",
}

// environment is what a worker may know of the daemon's environment.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return !slices.ContainsFunc(inherited, func(prefix string) bool { return strings.HasPrefix(v, prefix) }) ||
			strings.HasPrefix(v, "CUDA_DEVICE_MAX_CONNECTIONS=")
	})
}

var errGone = errors.New("the worker is gone")
