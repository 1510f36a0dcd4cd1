package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/twilight-sidecar/twilight/internal/cliconf"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// maxDrain leaves room, within 10 s, to cut off what does not heed the grace.
const maxDrain = 7 * time.Second

// The names of --backend.
const (
	backendHost = "host"
	backendCUDA = "cuda"
)

type options struct {
	Settings cliconf.File     `aliases:"config" placeholder:"FILE" help:"YAML or JSON file with values for flags."`
	Version  kong.VersionFlag `env:"-" help:"Print the version and exit."`

	Listen      []endpoint `default:"${listen}" placeholder:"URL" help:"Where to listen, unix:///PATH or tcp://HOST:PORT; may be repeated (${listen})."`
	AllowUID    []uint32   `name:"allow-uid" placeholder:"UID" help:"Serve this user too on Unix sockets, whose permissions then let all users connect; may be repeated."`
	TLSCert     string     `name:"tls-cert" type:"existingfile" placeholder:"FILE" help:"PEM certificate for TCP, read again when it changes."`
	TLSKey      string     `name:"tls-key" type:"existingfile" placeholder:"FILE" help:"PEM key of --tls-cert."`
	TLSClientCA string     `name:"tls-client-ca" type:"existingfile" placeholder:"FILE" help:"PEM certificates that those of TCP clients must be signed by."`
	InsecureTCP bool       `name:"insecure-tcp" help:"Serve TCP in plain text to whoever connects."`

	Backend     []string `placeholder:"NAME" help:"Devices to serve, host (the CPU), cuda (every visible GPU) or both (host, and GPUs if there are any)."`
	Workers     int      `default:"0" placeholder:"N" help:"Rows that the CPU computes at a time (as many as processors)."`
	ShadowLimit byteSize `default:"0" placeholder:"SIZE" help:"Most memory of each device for shadows, as in 512MiB or 8GiB (half of what it has and, for the CPU, cgroups allow)."`

	Worker    string `placeholder:"PATH" help:"Program that serves a lease on a GPU (twilight-worker, beside this one)."`
	Spares    int    `default:"1" placeholder:"N" help:"Workers of each GPU that are kept warm, so that a lease need not wait for one to start; each takes some hundred MB of the GPU (1)."`
	GPULeases int    `name:"gpu-leases" default:"4" placeholder:"N" help:"Most leases of a GPU at a time, each of which may take an equal share of its --shadow-limit (4)."`

	Admin    *endpoint `placeholder:"URL" help:"Where to serve the budget page, /metrics, /healthz and profiles over HTTP: unix:///PATH or tcp://HOST:PORT, as in tcp://127.0.0.1:9464 (nowhere)."`
	TraceURL string    `name:"trace-url" placeholder:"URL" help:"Where the budget page links to for a trace, with {trace_id} for its id."`

	LogLevel     slog.Level    `default:"info" placeholder:"LEVEL" help:"Least to log: debug, info, warn or error (info)."`
	LogFormat    string        `default:"json" enum:"json,text" placeholder:"FORMAT" help:"Form of the log on stderr: json or text (json)."`
	DrainTimeout time.Duration `default:"5s" placeholder:"DURATION" help:"Time that engines have, once the daemon is told to end, to end their leases themselves; at most 7s (5s)."`
}

// Validate is called by kong.
func (o *options) Validate() error {
	for _, name := range o.Backend {
		if name != backendHost && name != backendCUDA {
			return fmt.Errorf("--backend: %q is neither host nor cuda", name)
		}
	}
	tcp := false
	for _, e := range o.Listen {
		tcp = tcp || e.network == "tcp"
	}
	files := 0
	for _, name := range []string{o.TLSCert, o.TLSKey, o.TLSClientCA} {
		if name != "" {
			files++
		}
	}
	switch {
	case len(o.Listen) == 0:
		return errors.New("--listen: nowhere to listen")
	case files != 0 && files != 3:
		return errors.New("--tls-cert, --tls-key and --tls-client-ca go together")
	case files == 3 && o.InsecureTCP:
		return errors.New("--insecure-tcp excludes --tls-cert")
	case tcp && files == 0 && !o.InsecureTCP:
		return errors.New("--listen tcp:// takes --tls-cert, --tls-key and --tls-client-ca, or --insecure-tcp")
	case o.Workers < 0:
		return fmt.Errorf("--workers: %d is negative", o.Workers)
	case o.Spares < 0:
		return fmt.Errorf("--spares: %d is negative", o.Spares)
	case o.GPULeases < 1:
		return fmt.Errorf("--gpu-leases: %d is less than 1", o.GPULeases)
	case o.DrainTimeout < 0 || o.DrainTimeout > maxDrain:
		return fmt.Errorf("--drain-timeout: %v is not within 0s and %v", o.DrainTimeout, maxDrain)
	}
	return nil
}

func (o *options) logger(w io.Writer) *slog.Logger {
	level := &slog.HandlerOptions{Level: o.LogLevel}
	if o.LogFormat == "text" {
		return slog.New(telemetry.LogHandler(slog.NewTextHandler(w, level)))
	}
	return slog.New(telemetry.LogHandler(slog.NewJSONHandler(w, level)))
}

// endpoint is a URL to listen at.
type endpoint struct{ network, address string }

func (e *endpoint) UnmarshalText(text []byte) error {
	u, err := url.Parse(string(text))
	switch {
	case err != nil:
		return fmt.Errorf("%q is no URL: give unix:///PATH or tcp://HOST:PORT", text)
	case u.Scheme == "unix" && u.Host == "" && strings.HasPrefix(u.Path, "/"):
		*e = endpoint{"unix", u.Path}
	case u.Scheme == "tcp" && u.Port() != "" && u.Path == "":
		*e = endpoint{"tcp", u.Host}
	default:
		return fmt.Errorf("%q is neither unix:///PATH nor tcp://HOST:PORT", text)
	}
	return nil
}

// byteSize is a number of bytes, as in 8GiB.
type byteSize uint64

func (s *byteSize) UnmarshalText(text []byte) error {
	number, shift := string(text), 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(number, unit); ok {
			number, shift = n, 10*(i+1)
			break
		}
	}
	n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 64)
	if err != nil || n > math.MaxUint64>>shift {
		return fmt.Errorf("%q is no size: give bytes, or as in 512MiB or 8GiB", text)
	}
	*s = byteSize(n << shift)
	return nil
}
