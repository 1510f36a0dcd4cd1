// Package shm maps memory of the host that an engine lends.
package shm

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/twilight-sidecar/twilight/gpu"
	"github.com/twilight-sidecar/twilight/internal/fault"
)

// Map maps a region of shared memory. Its descriptors stay the caller's.
func Map(region *gpu.Region) ([]byte, error) {
	if region.Device != "" {
		return nil, fault.Newf(fault.Invalid, "device",
			"shared memory is on no GPU but device is %q: leave it empty", region.Device)
	}
	if len(region.Chunks) != 1 || region.Chunks[0].FD < 0 {
		return nil, fault.Newf(fault.Invalid, "shared_memory.fd_token",
			"shared memory takes exactly one file descriptor")
	}
	if page := uint64(os.Getpagesize()); region.Offset%page != 0 {
		return nil, fault.Newf(fault.Invalid, "shared_memory.offset",
			"offset %d must be a multiple of the page size %d", region.Offset, page)
	}

	fd := region.Chunks[0].FD
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fault.Newf(fault.DataLoss, "shared_memory.fd_token",
			"the file descriptor is gone (%v): send an open one", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fault.Newf(fault.Invalid, "shared_memory.fd_token",
			"the file descriptor is of no regular file: send a memfd, POSIX shared memory or a file")
	}
	fileSize := uint64(stat.Size)
	if region.Size == 0 || region.Offset > fileSize || region.Size > fileSize-region.Offset {
		return nil, fault.Newf(fault.OutOfRange, "size",
			"%d bytes at offset %d must lie in the file, which has %d bytes", region.Size, region.Offset, fileSize)
	}

	protection, access := unix.PROT_READ, "reading"
	if region.Writable {
		protection, access = unix.PROT_READ|unix.PROT_WRITE, "reading and writing"
	}
	data, err := unix.Mmap(fd, int64(region.Offset), int(region.Size), protection, unix.MAP_SHARED)
	switch {
	case err == nil:
		return data, nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fault.Newf(fault.Permission, "access",
			"the file is not open for %s, or sealed: open it so or ask for less access", access)
	case errors.Is(err, unix.ENOMEM):
		return nil, fault.Exhaustedf("size", region.Size, 0,
			"%d bytes find no place in the daemon's address space: lend less, or fewer regions", region.Size)
	default:
		return nil, fault.Newf(fault.Invalid, "shared_memory.fd_token", "the file cannot be mapped (%v)", err)
	}
}
