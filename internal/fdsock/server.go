package fdsock

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxConns bounds the connections served at a time; others wait to be accepted.
	maxConns = 64
	// idleTimeout is how long a connection may take over its next packet, or over reading an answer.
	idleTimeout = 10 * time.Second
)

// Server receives descriptors for the leases that have an Inbox. It is safe for concurrent use.
type Server struct {
	authorize func(uid uint32) error
	logger    *slog.Logger
	slots     chan struct{}
	serving   sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	listeners map[*net.UnixListener]struct{}
	conns     map[*net.UnixConn]struct{}
	inboxes   map[LeaseToken]*Inbox
}

// NewServer makes a Server. authorize says whether a user may connect; its error is the answer.
func NewServer(authorize func(uid uint32) error, logger *slog.Logger) *Server {
	return &Server{
		authorize: authorize,
		logger:    logger,
		slots:     make(chan struct{}, maxConns),
		listeners: make(map[*net.UnixListener]struct{}),
		conns:     make(map[*net.UnixConn]struct{}),
		inboxes:   make(map[LeaseToken]*Inbox),
	}
}

// Serve accepts connections from a "unixpacket" listener, which it owns, until that or the server is
// closed.
func (s *Server) Serve(l *net.UnixListener) {
	defer l.Close()
	if !s.add(func() { s.listeners[l] = struct{}{} }) {
		return
	}
	defer s.serving.Done()
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, or the peer went away: neither ends the service.
			s.logger.Warn("descriptor socket: accept", "error", err)
			time.Sleep(50 * time.Millisecond)
			continue
		}
		s.slots <- struct{}{}
		if !s.add(func() { s.conns[conn] = struct{}{} }) {
			conn.Close()
			return
		}
		go s.serve(conn)
	}
}

// add counts a goroutine that Close waits for, unless the server is closed.
func (s *Server) add(register func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.serving.Add(1)
	register()
	return true
}

// Close stops serving, and closes all connections and unclaimed descriptors. It may be called twice.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for conn := range s.conns {
		conn.Close()
	}
	for _, inbox := range s.inboxes {
		inbox.closeLocked()
	}
	s.mu.Unlock()
	s.serving.Wait()
}

// errHungUp ends a connection that has nothing to be answered.
var errHungUp = errors.New("peer hung up or idled")

// serve answers a connection's packets until one is refused, the peer hangs up or idles.
func (s *Server) serve(conn *net.UnixConn) {
	defer func() {
		conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
		<-s.slots
		s.serving.Done()
	}()
	uid, err := PeerUID(conn)
	if err == nil {
		err = s.authorize(uid)
	}
	for err == nil {
		_ = conn.SetDeadline(time.Now().Add(idleTimeout))
		if err = s.receive(conn, uid); err == nil {
			_, err = conn.Write(encodeAnswer(nil))
		}
	}
	if errors.Is(err, errHungUp) {
		return
	}
	s.logger.Warn("descriptors refused", "uid", uid, "error", err)
	_ = conn.SetWriteDeadline(time.Now().Add(idleTimeout))
	_, _ = conn.Write(encodeAnswer(err))
}

// receive takes one packet. Whatever it reads, each descriptor ends in an inbox or closed.
func (s *Server) receive(conn *net.UnixConn, uid uint32) error {
	data := make([]byte, maxPacket)
	control := make([]byte, unix.CmsgSpace(4*MaxDescriptors))
	// The net package sets MSG_CMSG_CLOEXEC. An empty packet reads as io.EOF, but may carry descriptors.
	n, controlLen, flags, _, err := conn.ReadMsgUnix(data, control)
	fds := rights(control[:controlLen])
	switch {
	case err != nil:
		err = errHungUp
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("the packet has more than %d bytes", maxPacket)
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("not all descriptors could be received: send at most %d a packet, "+
			"or raise the daemon's limit of open files", MaxDescriptors)
	default:
		err = s.file(uid, data[:n], fds)
	}
	if err != nil {
		closeAll(fds)
	}
	return err
}

// rights returns the descriptors in control messages.
func rights(control []byte) []int {
	var fds []int
	for len(control) > 0 {
		header, data, rest, err := unix.ParseOneSocketControlMessage(control)
		if err != nil {
			break
		}
		some, err := unix.ParseUnixRights(&unix.SocketControlMessage{Header: header, Data: data})
		if err == nil {
			fds = append(fds, some...)
		}
		control = rest
	}
	return fds
}

// file puts the descriptors of a user's packet into their inbox. They stay the caller's if it fails.
func (s *Server) file(uid uint32, data []byte, fds []int) error {
	p, err := parsePacket(data)
	if err != nil {
		return err
	}
	if len(fds) != len(p.tokens) {
		return fmt.Errorf("the packet names %d descriptors and carries %d", len(p.tokens), len(fds))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	inbox := s.inboxes[p.lease]
	if inbox == nil || inbox.uid != uid {
		return errors.New("no lease of yours has this token: send descriptors between OpenLease and the end of the stream")
	}
	return inbox.fileLocked(p.tokens, fds)
}

// Inbox holds the descriptors of one lease that no registration has claimed yet.
type Inbox struct {
	server *Server
	lease  LeaseToken
	uid    uint32
	limit  int
	fds    map[Token]int // nil once closed
}

// Open makes the inbox of a lease that belongs to a user and takes at most limit descriptors at a
// time. The caller closes it.
func (s *Server) Open(lease LeaseToken, uid uint32, limit int) *Inbox {
	inbox := &Inbox{server: s, lease: lease, uid: uid, limit: limit, fds: make(map[Token]int)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		inbox.fds = nil
		return inbox
	}
	s.inboxes[lease] = inbox
	return inbox
}

func (b *Inbox) fileLocked(tokens []Token, fds []int) error {
	if left := b.limit - len(b.fds); len(fds) > left {
		return fmt.Errorf("%d descriptors asked, %d left of the %d that a lease may have unclaimed: "+
			"register regions with them first", len(fds), left, b.limit)
	}
	fresh := make(map[Token]int, len(fds))
	for i, token := range tokens {
		_, known := b.fds[token]
		if _, twice := fresh[token]; known || twice {
			return fmt.Errorf("token %d of the packet is taken: draw tokens at random, each for one descriptor", i)
		}
		fresh[token] = fds[i]
	}
	maps.Copy(b.fds, fresh)
	return nil
}

// Claim hands over the descriptors under tokens, which the caller then owns; the tokens are used up.
// If one is unknown or used, its index is returned in missing and nothing is handed over; missing is
// -1 otherwise.
func (b *Inbox) Claim(tokens []Token) (fds []int, missing int) {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	seen := make(map[Token]struct{}, len(tokens))
	for i, token := range tokens {
		_, twice := seen[token]
		if _, known := b.fds[token]; !known || twice {
			return nil, i
		}
		seen[token] = struct{}{}
	}
	for _, token := range tokens {
		fds = append(fds, b.fds[token])
		delete(b.fds, token)
	}
	return fds, -1
}

// Close closes what was not claimed; the lease takes no more. It may be called twice.
func (b *Inbox) Close() {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	b.closeLocked()
}

func (b *Inbox) closeLocked() {
	delete(b.server.inboxes, b.lease)
	for _, fd := range b.fds {
		unix.Close(fd)
	}
	b.fds = nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}
