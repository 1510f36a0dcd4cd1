package service

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"

	"github.com/twilight-sidecar/twilight/internal/fault"
)

// peerCredentials authenticates whom it can: over a Unix socket by the kernel's word on the peer's
// user, else by TLS. Peers of other transports stay anonymous, if they are let in at all.
type peerCredentials struct {
	credentials.TransportCredentials // of anonymous peers
	anonymous                        bool
	tls                              credentials.TransportCredentials
	uid                              func(syscall.Conn) (uint32, error)
}

func newPeerCredentials(config *Config) *peerCredentials {
	c := &peerCredentials{
		TransportCredentials: insecure.NewCredentials(), anonymous: config.Insecure, uid: config.peerUID,
	}
	if config.TLS != nil {
		c.tls = credentials.NewTLS(config.TLS)
	}
	return c
}

func (c *peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if unixConn, ok := conn.(*net.UnixConn); ok {
		uid, err := c.uid(unixConn)
		if err != nil {
			return nil, nil, err
		}
		return conn, unixPeer{
			CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
			uid:            uid,
			socket:         conn.LocalAddr().String(),
		}, nil
	}
	if c.tls != nil {
		return c.tls.ServerHandshake(conn)
	}
	if !c.anonymous {
		return nil, nil, fmt.Errorf("a %s connection without TLS is refused: use a Unix socket or mTLS", conn.LocalAddr().Network())
	}
	return c.TransportCredentials.ServerHandshake(conn)
}

func (c *peerCredentials) Clone() credentials.TransportCredentials {
	clone := *c
	return &clone
}

// unixPeer is what is known of the other end of a Unix socket.
type unixPeer struct {
	credentials.CommonAuthInfo
	uid    uint32
	socket string // ours, that the peer connected to
}

func (unixPeer) AuthType() string { return "unix" }

// identity is who opens a lease; the stream must come from the same. It is fit for logs, and empty for
// anonymous peers.
func identity(ctx context.Context) string {
	switch info := authInfo(ctx).(type) {
	case unixPeer:
		return fmt.Sprintf("uid %d", info.uid)
	case credentials.TLSInfo:
		if certs := info.State.PeerCertificates; len(certs) > 0 {
			sum := sha256.Sum256(certs[0].RawSubjectPublicKeyInfo)
			return fmt.Sprintf("key %s (%s)", hex.EncodeToString(sum[:8]), certs[0].Subject)
		}
	}
	return ""
}

func authInfo(ctx context.Context) credentials.AuthInfo {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	return p.AuthInfo
}

// authorize lets in peers of the daemon's own user and of those configured. TLS has seen to its own.
func (s *Server) authorize(ctx context.Context) (context.Context, error) {
	if p, ok := authInfo(ctx).(unixPeer); ok {
		return ctx, s.authorizeUID(p.uid)
	}
	return ctx, nil
}

func (s *Server) authorizeUID(uid uint32) error {
	if uid == uint32(os.Geteuid()) || slices.Contains(s.config.AllowedUIDs, uid) {
		return nil
	}
	return fault.Newf(fault.Permission, "",
		"user %d may not use this daemon, which runs as user %d: have the user allowed (--allow-uid)", uid, os.Geteuid())
}
