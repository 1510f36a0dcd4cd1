package service

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListen(t *testing.T) {
	t.Parallel()
	dir := shortTempDir(t)
	path := filepath.Join(dir, "t.sock")
	l, err := Listen(t.Context(), path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	if _, err := Listen(t.Context(), path, 0o600); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second daemon: %v", err)
	}
	// A daemon that was killed leaves its socket.
	l.SetUnlinkOnClose(false)
	l.Close()
	l, err = Listen(t.Context(), path, 0o666)
	if err != nil {
		t.Fatal("over a stale socket:", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
	l.Close()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// Of daemons that start together over a stale socket, one comes to listen.
func TestListenTogether(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortTempDir(t), "t.sock")
	stale, err := Listen(t.Context(), path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	listening := make(chan *net.UnixListener)
	for range 8 {
		go func() {
			l, err := Listen(t.Context(), path, 0o600)
			if err != nil && !strings.Contains(err.Error(), "already") {
				t.Error(err)
			}
			listening <- l
		}()
	}
	n := 0
	for range 8 {
		if l := <-listening; l != nil {
			defer l.Close()
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d listen", n)
	}
}

func TestListenRefusals(t *testing.T) {
	t.Parallel()
	dir := shortTempDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil { // not narrowed by the umask
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	packets, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: other, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	for path, want := range map[string]string{
		"":                                   "no path",
		"@abstract":                          "no path",
		filepath.Join(dir, "none", "t.sock"): "folder",
		filepath.Join(file, "t.sock"):        "folder",
		filepath.Join(open, "t.sock"):        "writable by others",
		file:                                 "no socket",
		other:                                "in use",
		filepath.Join(dir, strings.Repeat("x", 120)): "bytes",
	} {
		if l, err := Listen(t.Context(), path, 0o600); err == nil || !strings.Contains(err.Error(), want) {
			if err == nil {
				l.Close()
			}
			t.Errorf("%q: error %v does not say %q", path, err, want)
		}
	}
	if _, err := os.Stat(file); err != nil {
		t.Error("a file was removed:", err)
	}
}
