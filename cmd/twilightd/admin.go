package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/twilight-sidecar/twilight/service"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// startAdmin serves the admin listener in the background until ctx is done.
//
// There is none by default: whoever is on the host may connect to a loopback port, and would see what
// the sockets of the service, which are the user's alone, keep from them. A Unix socket has the same
// permissions as those.
func startAdmin(ctx context.Context, group *errgroup.Group, told *telemetry.Telemetry, server *service.Server, o *options, logger *slog.Logger) error {
	l, err := listen(ctx, *o.Admin, len(o.AllowUID) > 0)
	if err != nil {
		return err
	}
	local := true
	if tcp, ok := l.Addr().(*net.TCPAddr); ok {
		local = tcp.IP.IsLoopback()
	}
	web := &http.Server{
		Handler:           told.Handler(telemetry.Admin{Healthy: server.Healthy, Local: local}),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		BaseContext:       func(net.Listener) context.Context { return ctx }, // ends streams
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	logger.Info("admin", "network", o.Admin.network, "address", l.Addr().String())
	group.Go(func() error {
		if err := web.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return web.Close()
	})
	return nil
}
