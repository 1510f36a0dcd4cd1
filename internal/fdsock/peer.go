package fdsock

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// PeerUID returns the user ID that the other end of a Unix socket had when it connected.
func PeerUID(conn syscall.Conn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	if sockErr != nil {
		return 0, fmt.Errorf("peer credentials: %w", sockErr)
	}
	return cred.Uid, nil
}
