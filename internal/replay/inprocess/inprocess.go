// Package inprocess runs what twilightd is within the calling process, for the demo and for tests.
package inprocess

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// Daemon serves the CPU on a Unix socket, as twilightd does.
type Daemon struct {
	folder string // ours to remove; "" if the socket's place was given
	path   string
	server *service.Server
	served chan error
}

// Options are what a daemon is started with; the zero value works.
type Options struct {
	Path    string // of the socket; in a new folder if empty
	Version string
	// DrainGrace is how long Stop waits for leases to end; service.Config's default if 0.
	DrainGrace time.Duration
	// Telemetry, if not nil, is told what the daemon does. It is the caller's to shut down.
	Telemetry *telemetry.Telemetry
}

// Start starts a daemon. It serves once Start returns.
func Start(ctx context.Context, o Options) (*Daemon, error) {
	d := &Daemon{path: o.Path, served: make(chan error, 1)}
	if d.path == "" {
		folder, err := os.MkdirTemp("", "twilight-")
		if err != nil {
			return nil, err
		}
		d.folder, d.path = folder, filepath.Join(folder, "twilight.sock")
	}
	if err := d.serve(ctx, o); err != nil {
		return nil, errors.Join(err, d.removeFolder())
	}
	return d, nil
}

func (d *Daemon) serve(ctx context.Context, o Options) error {
	all, err := methods.New()
	if err != nil {
		return err
	}
	listener, err := service.Listen(ctx, d.path, 0o600)
	if err != nil {
		return err
	}
	device := host.New(host.Options{Methods: all})
	d.server, err = service.New(service.Config{
		Devices: []gpu.Device{device}, Methods: all, Version: o.Version, DrainGrace: o.DrainGrace, Telemetry: o.Telemetry,
	})
	if err != nil {
		return errors.Join(err, listener.Close(), device.Close())
	}
	go func() { d.served <- d.server.Serve(context.WithoutCancel(ctx), listener) }()
	if err := d.server.SelfTest(ctx); err != nil {
		return errors.Join(err, d.drain(ctx))
	}
	return nil
}

// Target is what client.Dial takes.
func (d *Daemon) Target() string { return "unix://" + d.path }

// Stop drains the daemon and removes what it made, also if ctx has ended.
func (d *Daemon) Stop(ctx context.Context) error { return errors.Join(d.drain(ctx), d.removeFolder()) }

func (d *Daemon) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(d.server.Drain(ctx), <-d.served)
}

func (d *Daemon) removeFolder() error {
	if d.folder == "" {
		return nil
	}
	return os.RemoveAll(d.folder)
}
