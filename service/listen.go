package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fdSuffix makes the path of the descriptor socket from that of the gRPC socket.
const fdSuffix = ".fd"

// Sockets are the files that a server makes for a socket at path.
func Sockets(path string) []string { return []string{path, path + fdSuffix} }

// Listen makes a Unix socket at path with the given permissions: 0600 for the daemon's user alone, 0666
// where Config.AllowedUIDs names others. The folder must be one where no other user could replace the
// socket. A socket that a dead daemon left there is removed; one that is served is not.
func Listen(ctx context.Context, path string, perm fs.FileMode) (*net.UnixListener, error) {
	return listenUnix(ctx, "unix", path, perm)
}

// listenBeside makes the descriptor socket that belongs to a socket of Listen.
func listenBeside(ctx context.Context, l *net.UnixListener) (*net.UnixListener, error) {
	path := l.Addr().String()
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return listenUnix(ctx, "unixpacket", path+fdSuffix, info.Mode())
}

func listenUnix(ctx context.Context, network, path string, perm fs.FileMode) (*net.UnixListener, error) {
	if path == "" || path[0] == '@' || strings.ContainsRune(path, 0) {
		return nil, fmt.Errorf("%q is no path of a socket: give one in a folder, whose permissions guard it", path)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	const longest = len(unix.RawSockaddrUnix{}.Path) - 1 - len(fdSuffix)
	if len(strings.TrimSuffix(path, fdSuffix)) > longest {
		return nil, fmt.Errorf("path %s has %d bytes: a socket's may have %d", path, len(path), longest)
	}
	// The lock keeps two daemons that start together from removing each other's socket.
	folder, err := lockFolder(ctx, filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	if err := removeStale(ctx, network, path); err != nil {
		return nil, err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		// Before bind, which takes the mode over: the file never has a wider one.
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(perm.Perm())) }), err)
	}}
	l, err := config.Listen(ctx, network, path)
	if err != nil {
		return nil, err
	}
	// Not narrowed by the umask, which bind applies.
	if err := os.Chmod(path, perm.Perm()); err != nil {
		l.Close()
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// lockFolder opens and locks a folder in which nobody but this user and root can replace our files.
func lockFolder(ctx context.Context, path string) (*os.File, error) {
	folder, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("folder of the socket: %w", err)
	}
	info, err := folder.Stat()
	if err == nil {
		err = checkFolder(path, info)
	}
	if err == nil {
		err = lock(ctx, folder)
	}
	if err != nil {
		folder.Close()
		return nil, err
	}
	return folder, nil
}

// lock waits as long as another daemon may take to make its socket.
func lock(ctx context.Context, folder *os.File) error {
	for range 100 {
		err := unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fmt.Errorf("folder %s stays locked by another process: listen in one of your own", folder.Name())
}

func checkFolder(path string, info fs.FileInfo) error {
	stat := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is no folder", path)
	case stat.Uid != 0 && stat.Uid != uint32(os.Geteuid()):
		return fmt.Errorf("folder %s belongs to user %d, who could replace the socket: use a folder of your own", path, stat.Uid)
	case info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0:
		return fmt.Errorf("folder %s is writable by others (%v), who could replace the socket: use one that is not", path, info.Mode())
	}
	return nil
}

// removeStale removes a socket at path that nobody listens on.
func removeStale(ctx context.Context, network, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("%s exists and is no socket: remove it or listen elsewhere", path)
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("a daemon listens on %s already: stop it or listen elsewhere", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s may be in use: %w", path, err)
	}
	return os.Remove(path)
}
