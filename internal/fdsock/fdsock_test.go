package fdsock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func anyone(uint32) error { return nil }

// serve starts a server on a socket of its own.
func serve(t *testing.T, authorize func(uint32) error) (*Server, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fd")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(authorize, slog.New(slog.DiscardHandler))
	go s.Serve(l)
	t.Cleanup(s.Close)
	return s, path
}

// memfd makes a file that no other is mistaken for.
func memfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.MemfdCreate(t.Name(), unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func inode(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// openOn counts this process's descriptors of a file.
func openOn(t testing.TB, ino uint64) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		target, err := os.Stat("/proc/self/fd/" + e.Name())
		if err == nil && target.Sys().(*syscall.Stat_t).Ino == ino {
			n++
		}
	}
	return n
}

// eventually waits for what another goroutine is about to do.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

func TestSendAndClaim(t *testing.T) {
	t.Parallel()
	s, path := serve(t, anyone)
	lease := LeaseToken{1}
	inbox := s.Open(lease, uint32(os.Getuid()), 200)
	defer inbox.Close()

	fds := make([]int, 2*MaxDescriptors+1) // three packets
	for i := range fds {
		fds[i] = memfd(t)
	}
	tokens, err := Send(t.Context(), path, lease[:], fds...)
	if err != nil {
		t.Fatal(err)
	}
	got, missing := inbox.Claim(tokens)
	if missing >= 0 {
		t.Fatalf("token %d is unknown", missing)
	}
	defer closeAll(got)
	for i := range fds {
		if inode(t, got[i]) != inode(t, fds[i]) {
			t.Fatalf("descriptor %d is another file", i)
		}
		flags, err := unix.FcntlInt(uintptr(got[i]), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Fatalf("descriptor %d would be inherited: flags %x, %v", i, flags, err)
		}
	}
	if _, missing := inbox.Claim(tokens[3:4]); missing != 0 {
		t.Error("a token was claimed twice")
	}
}

func TestClaimIsAllOrNothing(t *testing.T) {
	t.Parallel()
	s, path := serve(t, anyone)
	lease := LeaseToken{1}
	inbox := s.Open(lease, uint32(os.Getuid()), 8)
	defer inbox.Close()
	tokens, err := Send(t.Context(), path, lease[:], memfd(t), memfd(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, missing := inbox.Claim([]Token{tokens[0], {9}, tokens[1]}); missing != 1 {
		t.Errorf("missing = %d, want 1", missing)
	}
	if _, missing := inbox.Claim([]Token{tokens[0], tokens[0]}); missing != 1 {
		t.Errorf("a repeated token: missing = %d, want 1", missing)
	}
	fds, missing := inbox.Claim(tokens)
	if missing >= 0 {
		t.Errorf("token %d was lost", missing)
	}
	closeAll(fds)
}

func TestUnclaimedAreClosed(t *testing.T) {
	t.Parallel()
	s, path := serve(t, anyone)
	fd := memfd(t)
	for name, end := range map[string]func(*Inbox){
		"with the lease":  (*Inbox).Close,
		"with the server": func(*Inbox) { s.Close() },
	} {
		lease := LeaseToken{byte(len(name))}
		inbox := s.Open(lease, uint32(os.Getuid()), 8)
		if _, err := Send(t.Context(), path, lease[:], fd, fd); err != nil {
			t.Fatal(name, err)
		}
		if n := openOn(t, inode(t, fd)); n != 3 {
			t.Fatalf("%s: %d descriptors before, want 3", name, n)
		}
		end(inbox)
		if n := openOn(t, inode(t, fd)); n != 1 {
			t.Errorf("%s: %d descriptors after, want 1", name, n)
		}
		inbox.Close()
		if name == "with the server" {
			return
		}
	}
}

// Packets that no client of ours sends. None may leave a descriptor open.
func TestRefusals(t *testing.T) {
	t.Parallel()
	s, path := serve(t, anyone)
	lease, other, full := LeaseToken{1}, LeaseToken{2}, LeaseToken{3}
	for _, inbox := range []*Inbox{
		s.Open(lease, uint32(os.Getuid()), 100),
		s.Open(other, uint32(os.Getuid())+1, 100),
		s.Open(full, uint32(os.Getuid()), 2),
	} {
		t.Cleanup(inbox.Close)
	}
	packetOf := func(lease LeaseToken, n int) []byte {
		p := packet{lease: lease, tokens: make([]Token, n)}
		for i := range p.tokens {
			p.tokens[i] = Token{byte(i + 1)}
		}
		return p.encode()
	}
	edit := func(b []byte, at int, v byte) []byte { b[at] = v; return b }
	tests := map[string]struct {
		data   []byte
		fds    int
		answer string // "" for none
	}{
		"empty":               {nil, 1, ""},
		"short":               {[]byte("TWFD\x01\x01"), 1, "header"},
		"magic":               {edit(packetOf(lease, 1), 0, 'X'), 1, "TWFD"},
		"version":             {edit(packetOf(lease, 1), 4, 2), 1, "version 2"},
		"count 0":             {edit(packetOf(lease, 1), 5, 0), 1, "count is 0"},
		"count 65":            {edit(packetOf(lease, 1), 5, 65), 1, "count is 65"},
		"length":              {packetOf(lease, 2)[:headerLen+TokenLen+3], 2, "2 tokens"},
		"too long":            {make([]byte, maxPacket+1), 1, "more than"},
		"fewer descriptors":   {packetOf(lease, 2), 1, "names 2 descriptors and carries 1"},
		"more descriptors":    {packetOf(lease, 1), 2, "names 1 descriptors and carries 2"},
		"no descriptors":      {packetOf(lease, 1), 0, "carries 0"},
		"over 64":             {packetOf(lease, 64), 65, "not all descriptors"},
		"twice in a packet":   {edit(packetOf(lease, 2), headerLen+TokenLen, 1), 2, "taken"},
		"unknown lease":       {packetOf(LeaseToken{7}, 1), 1, "no lease of yours"},
		"another user's":      {packetOf(other, 1), 1, "no lease of yours"},
		"more than the limit": {packetOf(full, 3), 3, "3 descriptors asked, 2 left"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := dial(t, path)
			fd := memfd(t)
			fds := make([]int, tc.fds)
			for i := range fds {
				fds[i] = fd
			}
			var control []byte
			if len(fds) > 0 {
				control = unix.UnixRights(fds...)
			}
			send(t, conn, tc.data, control)
			answer := make([]byte, 1+maxSentence)
			n, err := conn.Read(answer)
			if tc.answer == "" {
				if err == nil {
					t.Errorf("answered %q", answer[:n])
				}
			} else if err != nil {
				t.Error(err)
			} else if err := parseAnswer(answer[:n]); err == nil || !strings.Contains(err.Error(), tc.answer) {
				t.Errorf("answer %v does not say %q", err, tc.answer)
			}
			eventually(t, "all descriptors closed", func() bool { return openOn(t, inode(t, fd)) == 1 })
		})
	}
}

func dial(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// send is sendmsg(2) as it is: Go's own adds a byte to an empty packet.
func send(t *testing.T, conn *net.UnixConn, data, control []byte) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		iov := unix.Iovec{Base: unsafe.SliceData(data)}
		iov.SetLen(len(data))
		msg := unix.Msghdr{Iov: &iov, Iovlen: 1, Control: unsafe.SliceData(control)}
		msg.SetControllen(len(control))
		if _, _, errno := unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), 0); errno != 0 {
			t.Fatal(errno)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

func TestTokenOfTwoPackets(t *testing.T) {
	t.Parallel()
	s, path := serve(t, anyone)
	lease := LeaseToken{1}
	inbox := s.Open(lease, uint32(os.Getuid()), 8)
	defer inbox.Close()
	conn, fd := dial(t, path), memfd(t)
	p := packet{lease: lease, tokens: []Token{{5}}}
	if err := exchange(conn, &p, []int{fd}); err != nil {
		t.Fatal(err)
	}
	if err := exchange(conn, &p, []int{fd}); err == nil {
		t.Error("a token was taken twice")
	}
	if fds, missing := inbox.Claim(p.tokens); missing >= 0 {
		t.Error("the first descriptor was lost")
	} else {
		closeAll(fds)
	}
}

func TestStrangerIsRefused(t *testing.T) {
	t.Parallel()
	s, path := serve(t, func(uid uint32) error { return fmt.Errorf("user %d may not", uid) })
	lease := LeaseToken{1}
	defer s.Open(lease, uint32(os.Getuid()), 8).Close()
	fd := memfd(t)
	if _, err := Send(t.Context(), path, lease[:], fd); err == nil {
		t.Error("descriptors of a stranger were taken")
	}
	eventually(t, "all descriptors closed", func() bool { return openOn(t, inode(t, fd)) == 1 })
}

func TestSendEnds(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fd")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // never accepts
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := Send(ctx, path, make([]byte, LeaseTokenLen), memfd(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	if _, err := Send(ctx, path, []byte("short")); err == nil {
		t.Error("a short token was sent")
	}
}

// FuzzPacket files arbitrary packets with descriptors: each must end in the inbox or stay the caller's.
func FuzzPacket(f *testing.F) {
	lease := LeaseToken{1}
	p := packet{lease: lease, tokens: []Token{{1}, {2}}}
	f.Add(p.encode(), uint8(2))
	f.Add(p.encode(), uint8(1))
	f.Add([]byte("TWFD\x01\x00"), uint8(1))
	f.Add([]byte{}, uint8(0))
	f.Fuzz(func(t *testing.T, data []byte, n uint8) {
		if parsed, err := parsePacket(data); err == nil && !bytes.Equal(parsed.encode(), data) {
			t.Errorf("%x was read as %+v", data, parsed)
		}
		s := NewServer(anyone, slog.New(slog.DiscardHandler))
		inbox := s.Open(lease, 0, 3)
		fds := make([]int, n)
		for i := range fds {
			fds[i] = 1_000_000 + i // beyond what is open, so that closing them closes nothing
		}
		err := s.file(0, data, fds)
		switch {
		case err != nil && len(inbox.fds) != 0:
			t.Errorf("refused with %d of %d descriptors filed: %v", len(inbox.fds), n, err)
		case err == nil && len(inbox.fds) != int(n):
			t.Errorf("accepted with %d of %d descriptors filed", len(inbox.fds), n)
		}
		inbox.Close()
	})
}

// FuzzAnswer reads what a daemon may send.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte{accepted})
	f.Add([]byte{refused, 'n', 'o'})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := parseAnswer(b); err == nil && !bytes.Equal(b, encodeAnswer(nil)) {
			t.Errorf("%x was read as accepted", b)
		}
	})
}
