package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/gpu/host"
	"github.com/twilight-sidecar/twilight/internal/cliconf"
	"github.com/twilight-sidecar/twilight/pipeline/methods"
	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/service/workers"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// drainLimit bounds what follows the grace: the process must end within 10 s.
const drainLimit = 2200 * time.Millisecond

// flushLimit bounds what telemetry may take to send its rest.
const flushLimit = 500 * time.Millisecond

// serve runs the daemon until a signal tells it to end, then drains it.
func serve(ctx context.Context, o *options, logger *slog.Logger) error {
	all, err := methods.New()
	if err != nil {
		return err
	}
	told, err := telemetry.Start(ctx, telemetry.Options{
		Version: cliconf.Version(), Instance: rand.Text(), TraceURL: o.TraceURL, Logger: logger,
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(ctx, flushLimit)
		defer cancel()
		if err := told.Shutdown(ctx); err != nil {
			logger.Warn("telemetry was not sent", "error", err)
		}
	}()
	config := service.Config{
		Telemetry:   told,
		Methods:     all,
		AllowedUIDs: o.AllowUID,
		Insecure:    o.InsecureTCP,
		Logger:      logger,
		Version:     cliconf.Version(),
		DrainGrace:  o.DrainTimeout,
	}
	if o.TLSCert != "" {
		files := &tlsFiles{cert: o.TLSCert, key: o.TLSKey, clientCA: o.TLSClientCA, logger: logger}
		if config.TLS, err = files.config(); err != nil {
			return err
		}
	}
	supervisor, err := supervise(ctx, o, told, logger)
	if err != nil {
		return err
	}
	if supervisor != nil {
		defer supervisor.Close()
		config.Remotes = supervisor.Devices()
	}
	if len(o.Backend) == 0 || slices.Contains(o.Backend, backendHost) {
		device := host.New(host.Options{
			Methods: all, Workers: o.Workers, ShadowBytes: uint64(o.ShadowLimit), Log: logger,
		})
		config.Devices = []gpu.Device{device}
	}
	server, err := service.New(config)
	if err != nil {
		for _, d := range config.Devices {
			err = errors.Join(err, d.Close())
		}
		return err
	}
	signaled, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	group, running := errgroup.WithContext(signaled)
	err = start(running, group, server, o, logger)
	adminCtx, stopAdmin := context.WithCancel(ctx) // not by the signal: a drain is worth watching
	defer stopAdmin()
	if err == nil && o.Admin != nil {
		err = startAdmin(adminCtx, group, told, server, o, logger)
	}
	if err == nil {
		<-running.Done()
	}
	stop() // a second signal does what it does by default: end the process
	logger.Info("draining", "grace", o.DrainTimeout.String())
	drainCtx, cancel := context.WithTimeout(ctx, o.DrainTimeout+drainLimit)
	defer cancel()
	if drainErr := server.Drain(drainCtx); drainErr != nil {
		return errors.Join(err, drainErr) // what still runs ends with the process
	}
	logger.Info("drained")
	stopAdmin()
	if groupErr := group.Wait(); !errors.Is(groupErr, context.Canceled) { // a self-test may have been
		err = errors.Join(err, groupErr)
	}
	return err
}

// supervise finds the GPUs; nil if they are not to be served or, unless --backend says so, there are none.
func supervise(ctx context.Context, o *options, told *telemetry.Telemetry, logger *slog.Logger) (*workers.Supervisor, error) {
	named := slices.Contains(o.Backend, backendCUDA)
	if !named && len(o.Backend) > 0 {
		return nil, nil
	}
	path := o.Worker
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		path = filepath.Join(filepath.Dir(self), "twilight-worker")
		if _, err := os.Stat(path); err != nil && !named {
			return nil, nil
		}
	}
	supervisor, err := workers.New(ctx, workers.Options{
		Path: path, Spares: o.Spares, Leases: o.GPULeases, ShadowBytes: uint64(o.ShadowLimit),
		AllowedUIDs: o.AllowUID, DrainGrace: o.DrainTimeout, Logger: logger, LogLevel: o.LogLevel, Telemetry: told,
	})
	if err == nil && len(supervisor.Devices()) == 0 {
		supervisor.Close()
		supervisor, err = nil, errors.New("no GPU is visible")
	}
	switch {
	case err == nil:
		return supervisor, nil
	case named:
		return nil, fmt.Errorf("--backend cuda: %w", err)
	}
	logger.Warn("serving no GPUs", "error", err)
	return nil, nil
}

// start listens, then serves and tests the devices in the background. ctx is that of group.
func start(ctx context.Context, group *errgroup.Group, server *service.Server, o *options, logger *slog.Logger) error {
	for _, e := range o.Listen {
		l, err := listen(ctx, e, len(o.AllowUID) > 0)
		if err != nil {
			return err
		}
		logger.Info("listening", "network", e.network, "address", l.Addr().String())
		group.Go(func() error { return server.Serve(context.WithoutCancel(ctx), l) })
	}
	group.Go(func() error {
		if err := server.SelfTest(ctx); err != nil {
			return err
		}
		logger.Info("serving", "version", cliconf.Version())
		return nil
	})
	return nil
}

func listen(ctx context.Context, e endpoint, allUsers bool) (net.Listener, error) {
	if e.network == "tcp" {
		var config net.ListenConfig
		return config.Listen(ctx, e.network, e.address)
	}
	if "unix://"+e.address == cliconf.DefaultTarget() {
		// Nobody was asked to make this folder. If somebody else did, Listen refuses it.
		if err := os.Mkdir(filepath.Dir(e.address), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("folder of the socket: %w", err)
		}
	}
	perm := fs.FileMode(0o600)
	if allUsers {
		perm = 0o666
	}
	return service.Listen(ctx, e.address, perm)
}
