package service

import (
	"context"
	"errors"
	"log/slog"
	"runtime/debug"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/auth"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/protovalidate"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// interceptors serve unary calls and the opening of streams. What a lease says is looked at by the lease,
// message by message.
func (s *Server) interceptors() (unary, stream grpc.ServerOption) {
	// Probes come often, and from whoever watches over the daemon.
	watched := selector.MatchFunc(func(_ context.Context, call interceptors.CallMeta) bool {
		return call.Service != healthpb.Health_ServiceDesc.ServiceName
	})
	log := logging.LoggerFunc(func(ctx context.Context, level logging.Level, msg string, fields ...any) {
		s.logger.Log(ctx, slog.Level(level), msg, fields...) //nolint:sloglint // the interceptor's messages are constants
	})
	// No StartCall: on streams it is logged with the first message, and whether it was is not guarded
	// against a send and a receive at a time.
	finished := logging.WithLogOnEvents(logging.FinishCall)
	limiter := openLimiter{rate.NewLimiter(s.config.OpenRate, s.config.OpenBurst)}
	recovered := recovery.WithRecoveryHandlerContext(func(ctx context.Context, p any) error {
		return s.panicked(ctx, s.logger, p)
	})
	unary = grpc.ChainUnaryInterceptor(
		selector.UnaryServerInterceptor(s.unaryTelemetry, watched),
		selector.UnaryServerInterceptor(logging.UnaryServerInterceptor(log, finished), watched),
		s.unaryStatus,
		selector.UnaryServerInterceptor(auth.UnaryServerInterceptor(s.authorize), watched),
		selector.UnaryServerInterceptor(ratelimit.UnaryServerInterceptor(limiter), watched),
		protovalidate.UnaryServerInterceptor(s.validator),
		recovery.UnaryServerInterceptor(recovered),
	)
	stream = grpc.ChainStreamInterceptor(
		selector.StreamServerInterceptor(logging.StreamServerInterceptor(log, finished), watched),
		s.streamStatus,
		selector.StreamServerInterceptor(auth.StreamServerInterceptor(s.authorize), watched),
		selector.StreamServerInterceptor(ratelimit.StreamServerInterceptor(limiter), watched),
		recovery.StreamServerInterceptor(recovered),
	)
	return unary, stream
}

func (s *Server) unaryStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	resp, err := next(ctx, req)
	return resp, s.toStatus(ctx, err)
}

func (s *Server) streamStatus(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return s.toStatus(stream.Context(), next(srv, stream))
}

// panicked logs a recovered panic, with the stack of the goroutine that calls it, and turns it into a
// fault.
func (s *Server) panicked(ctx context.Context, logger *slog.Logger, p any) error {
	logger.ErrorContext(ctx, "panic", "panic", p, "stack", string(debug.Stack()))
	return fault.Newf(fault.Internal, "", internalText)
}

type openLimiter struct{ *rate.Limiter }

func (l openLimiter) Limit(context.Context) error {
	if !l.Allow() {
		return errors.New("more calls than the daemon takes a second")
	}
	return nil
}
