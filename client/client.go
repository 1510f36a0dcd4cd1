package client

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"math"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

const (
	// window is the flow-control window of streams and connections: room for an inline query of a
	// large batch. gRPC's own estimate starts at 64 KiB and would stall the first layers.
	window = 4 << 20

	minBackoff = 50 * time.Millisecond
	maxBackoff = 2 * time.Second
)

// Option configures Dial.
type Option func(*dialOptions)

type dialOptions struct {
	creds credentials.TransportCredentials
	grpc  []grpc.DialOption
}

// WithTLS sets TLS for a TCP target. Without it the target must prove itself to the system's roots.
func WithTLS(config *tls.Config) Option {
	return func(o *dialOptions) { o.creds = credentials.NewTLS(config) }
}

// WithInsecure speaks plain text to a TCP target.
func WithInsecure() Option {
	return func(o *dialOptions) { o.creds = insecure.NewCredentials() }
}

// WithGRPC adds options of gRPC's own: interceptors, a dialer.
func WithGRPC(opts ...grpc.DialOption) Option {
	return func(o *dialOptions) { o.grpc = append(o.grpc, opts...) }
}

// Client is a connection to a daemon, safe for concurrent use.
type Client struct {
	options dialOptions
	conn    *grpc.ClientConn
	service twilightv1.TwilightServiceClient
}

// Dial names a daemon: unix:///path/to/socket, or tcp://host:port, where tcp:// may be left out. It
// connects on first use, so that it succeeds whether or not the daemon runs.
func Dial(target string, opts ...Option) (*Client, error) {
	c := new(Client)
	for _, opt := range opts {
		opt(&c.options)
	}
	conn, err := c.options.connect(target)
	if err != nil {
		return nil, errorf(ErrInvalid, "target", "%q is no target: %v; use unix:///path or tcp://host:port", target, err)
	}
	c.conn, c.service = conn, twilightv1.NewTwilightServiceClient(conn)
	return c, nil
}

func (o *dialOptions) connect(target string) (*grpc.ClientConn, error) {
	creds := o.creds
	switch {
	case strings.HasPrefix(target, "unix:"):
		creds = insecure.NewCredentials()
	case creds == nil:
		creds = credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13})
	}
	return grpc.NewClient(strings.TrimPrefix(target, "tcp://"), append([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxBackoff},
			MinConnectTimeout: 5 * time.Second,
		}),
	}, o.grpc...)...)
}

// Close closes the connection, and with it every session whose stream it carries: close those first.
func (c *Client) Close() error { return c.conn.Close() }

// Capabilities is what a daemon can do; the generated type documents its fields.
type Capabilities = twilightv1.GetCapabilitiesResponse

// ShadowQuery asks what the shadow of a geometry under a Twilight config ("": the default) costs.
type ShadowQuery struct {
	Geometry Geometry
	Config   string
}

// Capabilities tells the daemon's devices, what they declare they can do, and, unless query is nil,
// each one's answer to it.
func (c *Client) Capabilities(ctx context.Context, query *ShadowQuery) (*Capabilities, error) {
	var req twilightv1.GetCapabilitiesRequest
	if query != nil {
		req.Shadow = &twilightv1.ShadowQuery{Geometry: query.Geometry.proto(), ConfigJson: query.Config}
	}
	res, err := c.service.GetCapabilities(ctx, &req)
	return res, fromStatus(err)
}

// Health returns nil if the daemon is serving.
func (c *Client) Health(ctx context.Context) error {
	res, err := grpc_health_v1.NewHealthClient(c.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return fromStatus(err)
	}
	return serving(res)
}

// WaitServing waits until the daemon is serving, or ctx ends; its error then also tells what the
// daemon last said.
func (c *Client) WaitServing(ctx context.Context) error {
	for delay := minBackoff; ; delay = min(2*delay, maxBackoff/4) {
		c.conn.ResetConnectBackoff()
		err := c.Health(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			e := errorf(ErrUnreachable, "", "waiting for %s to serve: %v", c.conn.Target(), err)
			e.cause = context.Cause(ctx)
			return e
		}
	}
}

func serving(res *grpc_health_v1.HealthCheckResponse) error {
	if s := res.GetStatus(); s != grpc_health_v1.HealthCheckResponse_SERVING {
		return errorf(ErrUnreachable, "", "the daemon's health is %v", s)
	}
	return nil
}

// engineID is the identity of this process towards daemons: random, since a PID is not unique across
// containers.
var engineID = sync.OnceValue(func() []byte {
	id := make([]byte, 16)
	rand.Read(id)
	return id
})
