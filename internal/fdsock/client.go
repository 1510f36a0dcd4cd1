package fdsock

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Send delivers descriptors to the lease whose token is given, through the socket at path
// (OpenLeaseResponse.fd_endpoint), and returns the tokens by which a registration claims them, in the
// same order. The descriptors stay open and the caller's. If Send fails, some may have been delivered;
// the daemon closes them with the lease.
func Send(ctx context.Context, path string, lease []byte, fds ...int) ([]Token, error) {
	if len(lease) != LeaseTokenLen {
		return nil, fmt.Errorf("a lease token has %d bytes, not %d", LeaseTokenLen, len(lease))
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("descriptor socket: %w", err)
	}
	defer c.Close()
	conn := c.(*net.UnixConn)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	tokens := make([]Token, len(fds))
	for i := range tokens {
		_, _ = rand.Read(tokens[i][:]) // never fails
	}
	rest := tokens
	for some := range slices.Chunk(fds, MaxDescriptors) {
		p := packet{lease: LeaseToken(lease), tokens: rest[:len(some)]}
		rest = rest[len(some):]
		if err := exchange(conn, &p, some); err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return nil, fmt.Errorf("sending %d descriptors: %w", len(fds), err)
		}
	}
	return tokens, nil
}

// exchange sends one packet and waits for its answer.
func exchange(conn *net.UnixConn, p *packet, fds []int) error {
	if _, _, err := conn.WriteMsgUnix(p.encode(), unix.UnixRights(fds...), nil); err != nil {
		return err
	}
	answer := make([]byte, 1+maxSentence)
	n, err := conn.Read(answer)
	if err != nil {
		return err
	}
	return parseAnswer(answer[:n])
}
