package client

import (
	"context"
	"crypto/sha256"
	"sync"

	"golang.org/x/sys/unix"

	twilightv1 "github.com/twilight-sidecar/twilight/proto/twilight/v1"
)

// Access is what the daemon may do with a buffer.
type Access int32

// The accesses.
const (
	// ReadOnly is for caches and queries.
	ReadOnly = Access(twilightv1.Access_ACCESS_READ_ONLY)
	// ReadWrite is for outputs and lists.
	ReadWrite = Access(twilightv1.Access_ACCESS_READ_WRITE)
)

// Buffer is memory lent to the daemon. It survives the loss of a lease: the session lends it again.
type Buffer struct {
	session *Session
	id      uint32
	size    int
	access  Access
	probe   *Probe

	// Shared memory.
	fd     int // ours; -1 for a GPU's memory
	offset uint64
	data   []byte
	// A GPU's memory.
	device string
	export func(context.Context) (GPUExport, error)

	// using is held for reading by what the SDK itself does in data.
	using sync.RWMutex
}

// Bytes is the memory of a buffer that NewBuffer made, nil of what the engine lent by itself. It must not
// be touched after Close.
func (b *Buffer) Bytes() []byte { return b.data }

// Size is in bytes.
func (b *Buffer) Size() int { return b.size }

// Share is memory that the engine already has.
type Share struct {
	// FD is a memfd, POSIX shared memory or any mappable file. The session keeps a duplicate of its own.
	FD int
	// Offset is where the buffer starts in the file, a multiple of 4096; Size is in bytes.
	Offset, Size int
	Access       Access
	// Probe, if not nil, must be found by the daemon through its own mapping, or sharing fails with
	// ErrDataLoss: proof that both mean the same memory.
	Probe *Probe
}

// Probe is what the engine knows to be in a buffer when it shares it: at most 1 MiB.
type Probe struct {
	Offset int // within the buffer
	Bytes  []byte
}

// NewBuffer makes shared memory of size bytes, zeroed, maps it and lends it. Memory lent ReadOnly is
// sealed so that the daemon cannot map it for writing.
func (s *Session) NewBuffer(ctx context.Context, size int, access Access) (*Buffer, error) {
	fd, data, err := newMemory(size, access)
	if err != nil {
		return nil, err
	}
	b := &Buffer{session: s, fd: fd, size: size, access: access, data: data}
	if err := s.add(ctx, b); err != nil {
		b.free()
		return nil, err
	}
	return b, nil
}

// ShareFD lends memory that the engine already has.
func (s *Session) ShareFD(ctx context.Context, share Share) (*Buffer, error) {
	if share.Size < 1 || share.Offset < 0 {
		return nil, errorf(ErrInvalid, "size", "is %d at offset %d; share at least one byte", share.Size, share.Offset)
	}
	fd, err := unix.FcntlInt(uintptr(share.FD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, errorf(ErrInvalid, "fd", "cannot be duplicated: %v", err)
	}
	b := &Buffer{
		session: s, fd: fd, offset: uint64(share.Offset), size: share.Size, access: share.Access, probe: share.Probe,
	}
	return b.share(ctx)
}

// share lends the engine's own memory.
func (b *Buffer) share(ctx context.Context) (*Buffer, error) {
	if err := b.session.add(ctx, b); err != nil {
		b.free()
		return nil, err
	}
	b.probe = nil // the memory may have changed when it is lent again
	return b, nil
}

// Close takes the buffer back once the daemon uses it no more, and unmaps it. Caches in it must be
// closed before.
func (b *Buffer) Close(ctx context.Context) error {
	s := b.session
	unlock, err := s.lockRegistrations(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if s.buffers[b.id] != b {
		return errorf(ErrClosed, "", "the buffer is closed")
	}
	for _, c := range s.caches {
		if _, in := c.buffers[b]; in {
			return errorf(ErrPrecondition, "", "cache %d lies in the buffer; close it first", c.id)
		}
	}
	if l, err := s.current(); err == nil {
		if err := l.giveBack(ctx, b.releaseRequest()); err != nil {
			return err
		}
	}
	delete(s.buffers, b.id)
	b.free()
	return nil
}

// register lends the buffer on a lease.
func (b *Buffer) register(ctx context.Context, l *lease) error {
	req := &twilightv1.RegisterRegion{
		RegionId: b.id,
		Size:     uint64(b.size),
		Access:   twilightv1.Access(b.access),
		Device:   b.device,
	}
	if err := b.lend(ctx, l, req); err != nil {
		return err
	}
	if p := b.probe; p != nil {
		digest := sha256.Sum256(p.Bytes)
		req.Probe = &twilightv1.DigestProbe{
			Offset: uint64(p.Offset), Length: uint32(len(p.Bytes)), ExpectedSha256: digest[:],
		}
	}
	_, err := l.register(ctx,
		&twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_RegisterRegion{RegisterRegion: req}},
		b.releaseRequest())
	return err
}

// lend brings what the message cannot carry to the daemon and names the memory in the message.
func (b *Buffer) lend(ctx context.Context, l *lease, req *twilightv1.RegisterRegion) error {
	if b.export != nil {
		exported, err := b.export(ctx)
		switch {
		case err != nil:
			return err
		case exported == nil:
			return errorf(ErrInvalid, "export", "says nothing of the memory; give a CUDAIPC, CUDAVMM or CUDAFabric")
		}
		return exported.lend(ctx, l, req)
	}
	tokens, err := l.sendFDs(ctx, b.fd)
	if err != nil {
		return err
	}
	req.Kind = &twilightv1.RegisterRegion_SharedMemory{
		SharedMemory: &twilightv1.SharedMemory{FdToken: tokens[0][:], Offset: b.offset},
	}
	return nil
}

func (b *Buffer) releaseRequest() *twilightv1.LeaseRequest {
	return &twilightv1.LeaseRequest{Request: &twilightv1.LeaseRequest_ReleaseRegion{
		ReleaseRegion: &twilightv1.ReleaseRegion{RegionId: b.id},
	}}
}

// usable tells whether a cache of the session may lie in the buffer.
func (b *Buffer) usable(s *Session) error {
	switch {
	case b == nil:
		return errorf(ErrInvalid, "register_cache.layers", "a layer names no buffer; give K and V one each")
	case b.session != s:
		return errorf(ErrPermission, "register_cache.layers", "a layer lies in a buffer of another session; share it in this one")
	case s.buffers[b.id] != b:
		return errorf(ErrClosed, "register_cache.layers", "a layer lies in a buffer that is closed")
	}
	return nil
}

func (b *Buffer) free() {
	b.using.Lock()
	defer b.using.Unlock()
	if b.data != nil {
		_ = unix.Munmap(b.data)
		b.data = nil
	}
	if b.fd >= 0 {
		_ = unix.Close(b.fd)
	}
}

// newMemory makes a memfd of fixed size and maps it.
func newMemory(size int, access Access) (fd int, data []byte, err error) {
	if size < 1 {
		return -1, nil, errorf(ErrInvalid, "size", "is %d; ask for at least one byte", size)
	}
	fd, err = unix.MemfdCreate("twilight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, nil, errorf(ErrExhausted, "", "shared memory cannot be made: %v", err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		_ = unix.Close(fd)
		return -1, nil, errorf(ErrExhausted, "size", "%d bytes of shared memory cannot be had: %v", size, err)
	}
	data, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		_ = unix.Close(fd)
		return -1, nil, errorf(ErrExhausted, "size", "%d bytes of shared memory cannot be mapped: %v", size, err)
	}
	seals := unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
	if access == ReadOnly {
		seals |= unix.F_SEAL_FUTURE_WRITE // all but the mapping just made
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		_ = unix.Munmap(data)
		_ = unix.Close(fd)
		return -1, nil, errorf(ErrUnsupported, "", "shared memory cannot be sealed: %v; Linux 5.1 or later is needed", err)
	}
	return fd, data, nil
}
