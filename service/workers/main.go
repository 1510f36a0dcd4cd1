package workers

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"syscall"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/cliconf"
	"github.com/twilight-sidecar/twilight/pipeline"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// Exit codes of a worker; 0 if its lease ended.
const (
	exitFailed = 1 // the device could not be used
	exitUsage  = 2
	exitLost   = 3 // the device was lost while it served
)

// GPU is what a worker tells of a GPU before there is a context.
type GPU struct {
	UUID        string `json:"uuid"`
	Name        string `json:"name"`
	MemoryBytes uint64 `json:"memory_bytes"`
	Capability  string `json:"capability"` // as in "9.0"
	MPS         bool   `json:"mps"`        // contexts are an MPS server's
}

// Settings are what a worker is started with.
type Settings struct {
	Device      string        `json:"device"`       // the GPU's UUID
	ShadowBytes uint64        `json:"shadow_bytes"` // what the shadows of its lease may take together
	AllowedUIDs []uint32      `json:"allowed_uids"`
	DrainGrace  time.Duration `json:"drain_grace"`
	LogLevel    slog.Level    `json:"log_level"`

	Methods *pipeline.Methods `json:"-"`
	Logger  *slog.Logger      `json:"-"`
}

// Backend is what a worker command serves.
type Backend struct {
	// List tells the GPUs that are visible.
	List func() ([]GPU, error)
	// Open makes a device. It calls lost, if ever the device cannot go on, and then not from within Open.
	Open func(s *Settings, lost func(error)) (gpu.Device, error)
}

const usage = `Serves one lease on one GPU, for the twilightd that starts it. "twilight-worker list" tells the GPUs.`

// Main is a worker's command, and returns its exit code. args are without the command's name:
//
//	list           prints the GPUs as JSON
//	serve SETTINGS serves the daemon at the other end of descriptor 3; SETTINGS as JSON
//	--version
func Main(args []string, stdout, stderr io.Writer, b Backend) int {
	var err error
	switch {
	case len(args) == 1 && args[0] == "--version":
		fmt.Fprintln(stdout, cliconf.Version())
	case len(args) == 1 && args[0] == "list":
		var gpus []GPU
		if gpus, err = b.List(); err == nil {
			err = json.NewEncoder(stdout).Encode(gpus)
		}
	case len(args) == 2 && args[0] == "serve":
		var s Settings
		if err = json.Unmarshal([]byte(args[1]), &s); err == nil {
			err = serve(&s, stderr, b)
		}
	default:
		fmt.Fprintln(stderr, usage)
		return exitUsage
	}
	var lost *lostError
	switch {
	case errors.As(err, &lost):
		return exitLost
	case err != nil:
		fmt.Fprintf(stderr, "twilight-worker: %v\n", err)
		return exitFailed
	}
	return 0
}

// lostError is why a device cannot go on.
type lostError struct{ error }

func (e *lostError) Unwrap() error { return e.error }

func serve(s *Settings, stderr io.Writer, b Backend) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	conn, err := fileConn(controlFD)
	if err != nil {
		return err
	}
	hungUp, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	s.Logger = slog.New(telemetry.LogHandler(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: s.LogLevel})))
	if s.Methods, err = methods.New(); err != nil {
		return err
	}
	told, err := telemetry.Start(ctx, telemetry.Options{Version: cliconf.Version(), Instance: rand.Text(), Gathered: true, Logger: s.Logger})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout/4)
		defer cancel()
		if err := told.Shutdown(ctx); err != nil {
			s.Logger.Warn("telemetry was not sent", "error", err)
		}
	}()
	return serveLease(ctx, newSingle(conn, hangUp), hungUp.Done(), service.Config{
		Methods: s.Methods, AllowedUIDs: s.AllowedUIDs, Logger: s.Logger, Telemetry: told,
		Version: cliconf.Version(), DrainGrace: s.DrainGrace,
	}, func(lost func(error)) (gpu.Device, error) {
		return b.Open(s, func(err error) { lost(&lostError{err}) })
	})
}

// arguments are those of a worker that is to serve.
func (s *Settings) arguments() ([]string, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return []string{"serve", string(text)}, nil
}
