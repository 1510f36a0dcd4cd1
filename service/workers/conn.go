package workers

import (
	"errors"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// controlFD is the worker's end of the socket pair.
const controlFD = 3

// socketPair makes the daemon's end, and the worker's to be inherited.
func socketPair() (daemon net.Conn, worker *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	worker = os.NewFile(uintptr(fds[1]), "worker")
	daemon, err = fileConn(fds[0])
	if err != nil {
		worker.Close()
	}
	return daemon, worker, err
}

// fileConn makes a connection of a descriptor, which it takes over.
func fileConn(fd int) (net.Conn, error) {
	file := os.NewFile(uintptr(fd), "control")
	if file == nil {
		return nil, errors.New("no socket was inherited: twilightd starts its workers itself")
	}
	defer file.Close()
	return net.FileConn(file)
}

// single is a listener with one connection, which tells when that is closed.
type single struct {
	conns chan net.Conn
	addr  net.Addr
	close func()
}

func newSingle(conn net.Conn, closed func()) *single {
	l := &single{conns: make(chan net.Conn, 1), addr: conn.LocalAddr()}
	l.conns <- &watched{Conn: conn, closed: closed}
	l.close = sync.OnceFunc(func() { close(l.conns) })
	return l
}

func (l *single) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l *single) Close() error {
	l.close()
	return nil
}

func (l *single) Addr() net.Addr { return l.addr }

// watched is a connection that tells when it is closed.
type watched struct {
	net.Conn
	closed func()
}

func (c *watched) Close() error {
	err := c.Conn.Close()
	c.closed()
	return err
}
