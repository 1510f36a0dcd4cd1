package gputest

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/armed"
)

// Memfd allocates shared memory, as an engine on a CPU does: memfds that are sealed against shrinking.
type Memfd struct{}

// Alloc implements Memory.
func (Memfd) Alloc(t testing.TB, size int) Buffer {
	t.Helper()
	fd, err := unix.MemfdCreate("gputest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	data, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Munmap(data), unix.Close(fd)); err != nil {
			t.Error(err)
		}
	})
	return &memfd{fd, data}
}

type memfd struct {
	fd   int
	data []byte
}

func (b *memfd) Region(t testing.TB, size int, writable bool) *gpu.Region {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(b.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return &gpu.Region{
		Kind: gpu.SharedMemory, Size: uint64(size), Writable: writable, Chunks: []gpu.Chunk{{FD: fd}},
	}
}

func (b *memfd) Write(offset int, data []byte) { copy(b.data[offset:][:len(data)], data) }

func (b *memfd) Read(offset int, data []byte) { copy(data, b.data[offset:][:len(data)]) }

func (b *memfd) Store(offset int, v uint32) { armed.At(b.data[offset:]).Store(v) }

func (b *memfd) Ring(offset int, v uint32) { armed.At(b.data[offset:]).Ring(v) }

func (b *memfd) Load(offset int) uint32 { return armed.At(b.data[offset:]).Load() }

func (b *memfd) Await(offset int, v uint32, timeout time.Duration) bool {
	return armed.At(b.data[offset:]).Await(v, timeout, func() bool { return false })
}
