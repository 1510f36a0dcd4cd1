package service

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"syscall"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/keepalive"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fdsock"
	"github.com/twilight-sidecar/twilight/pipeline"
	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
	"github.com/twilight-sidecar/twilight/telemetry"
)

// The protocol versions served, inclusive.
const (
	protocolVersionMin = 1
	protocolVersionMax = 1
)

// Config says what a Server serves and to whom. Zero fields take the defaults that their comments name.
type Config struct {
	// Devices are served under the IDs of their Info, which differ; Drain closes them. Remotes are served by
	// other processes, under IDs of the same kind. At least one of either.
	Devices []gpu.Device
	Remotes []Remote
	// Methods are what a lease's config may name.
	Methods *pipeline.Methods
	// Limits are those of each lease.
	Limits Limits

	// AllowedUIDs are users besides the daemon's own that may connect to Unix sockets. They need a way
	// through the socket's permissions, too.
	AllowedUIDs []uint32
	// TLS authenticates peers that come by other ways than Unix sockets; it should demand client
	// certificates. Without it such peers are refused, unless Insecure lets them in unauthenticated.
	TLS      *tls.Config
	Insecure bool

	// Assigned leases are opened by OpenFor alone: peers that ask for one are refused.
	Assigned bool

	// Logger takes the daemon's log; discarded.
	Logger *slog.Logger
	// Telemetry takes what is worth telling; nobody.
	Telemetry *telemetry.Telemetry
	// Version of the build, for GetCapabilities.
	Version string

	// OpenTimeout is how long an opened lease waits for its stream; 10 s.
	OpenTimeout time.Duration
	// DrainGrace is how long Drain leaves engines to end their leases by themselves; 5 s.
	DrainGrace time.Duration
	// OpenRate and OpenBurst bound unary calls and stream openings of all peers together, a second and
	// at once; 100 and 200. Messages within leases are not counted.
	OpenRate  rate.Limit
	OpenBurst int

	// keepalive says how soon a peer that is gone without a word is noticed; after 30 s.
	keepalive keepalive.ServerParameters
	// peerUID asks the kernel for the user at the other end of a Unix socket.
	peerUID func(syscall.Conn) (uint32, error)
}

// Limits bound each lease, besides those of its device (gpu.Limits). Zero fields take the defaults that
// their comments name.
type Limits struct {
	// MessageBytes of a request; 16 MiB. A larger one is refused, and one more than twice as large ends
	// its stream.
	MessageBytes uint32
	Regions      uint32 // 1024
	Caches       uint32 // 64
	// Descriptors that were sent and not claimed; 4096.
	Descriptors int
	// Leases bounds the leases of all engines together; 64.
	Leases int
}

func (c Config) withDefaults() Config {
	c.OpenTimeout = cmp.Or(c.OpenTimeout, 10*time.Second)
	c.DrainGrace = cmp.Or(c.DrainGrace, 5*time.Second)
	c.OpenRate = cmp.Or(c.OpenRate, 100)
	c.OpenBurst = cmp.Or(c.OpenBurst, 200)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.keepalive.Time == 0 {
		c.keepalive = keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}
	}
	if c.peerUID == nil {
		c.peerUID = fdsock.PeerUID
	}
	l := &c.Limits
	l.MessageBytes = cmp.Or(l.MessageBytes, 16<<20)
	l.Regions = cmp.Or(l.Regions, 1024)
	l.Caches = cmp.Or(l.Caches, 64)
	l.Descriptors = cmp.Or(l.Descriptors, 4096)
	l.Leases = cmp.Or(l.Leases, 64)
	return c
}

func (c *Config) validate() error {
	var errs []error
	var ids []string
	for _, d := range c.Devices {
		ids = append(ids, d.Info().ID)
	}
	for _, r := range c.Remotes {
		ids = append(ids, r.ID())
	}
	if len(ids) == 0 {
		errs = append(errs, errors.New("no device to serve: name a backend"))
	}
	for i, id := range ids {
		if id == "" || slices.Contains(ids[:i], id) {
			errs = append(errs, fmt.Errorf("device id %q is empty or not the only one of its name", id))
		}
	}
	if c.Methods == nil {
		errs = append(errs, errors.New("no methods to serve"))
	}
	if c.TLS != nil && c.Insecure {
		errs = append(errs, errors.New("TLS and insecure connections exclude each other"))
	}
	if c.Limits.MessageBytes > maxMessageBytes {
		errs = append(errs, fmt.Errorf("messages of %d bytes are too large: at most %d", c.Limits.MessageBytes, maxMessageBytes))
	}
	return errors.Join(errs...)
}

func (l *Limits) proto(device *gpu.Info) *twilightv1.Limits {
	return &twilightv1.Limits{
		MaxMessageBytes:   l.MessageBytes,
		MaxRegions:        l.Regions,
		MaxCaches:         l.Caches,
		MaxBatch:          uint32(device.Limits.Batch),
		MaxSequenceTokens: uint32(device.Limits.SequenceTokens),
		MaxShadowBytes:    device.Limits.ShadowBytes,
	}
}
