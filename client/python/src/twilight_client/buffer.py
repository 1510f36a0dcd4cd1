"""Memory that is lent to the daemon."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import hashlib
import mmap
import os
import secrets
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import Array, address, extent
from ._proto import lease_pb2, memory_pb2
from .errors import (
    Closed,
    Error,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unreachable,
    Unsupported,
)

if TYPE_CHECKING:
    import torch

    from ._lease import Lease
    from .session import Session

_F_SEAL_FUTURE_WRITE = 0x0010  # which the fcntl module does not name before Python 3.13


class Access(enum.IntEnum):
    """What the daemon may do with a buffer."""

    READ_ONLY = memory_pb2.ACCESS_READ_ONLY
    """For caches and queries."""
    READ_WRITE = memory_pb2.ACCESS_READ_WRITE
    """For outputs, lists and words."""


@dataclass(frozen=True)
class Location:
    """A place in a buffer."""

    buffer: Buffer
    offset: int = 0
    """Bytes."""

    def proto(self) -> memory_pb2.Location:
        """Return the message."""
        return memory_pb2.Location(region_id=self.buffer.id, offset=self.offset)


class Buffer:
    """Memory lent to the daemon, made by :class:`Session`.

    It survives the loss of a lease: the session lends it again. Arrays over it keep its memory mapped, also
    after :meth:`close`; only the daemon then no longer sees it.
    """

    def __init__(self, session: Session, size: int, access: Access) -> None:
        self.id = 0
        self._session = session
        self.size = size
        """Bytes."""
        self.access = access

    @property
    def address(self) -> int:
        """The address of the first byte; 0 where this process does not map it."""
        return 0

    def __contains__(self, array: Array) -> bool:
        """Tell whether an array lies in the buffer."""
        start = address(array)
        return self.address != 0 and self.address <= start and start + extent(array) <= self.address + self.size

    def at(self, offset: int = 0) -> Location:
        """Return a place in the buffer, ``offset`` bytes from its start."""
        return Location(self, offset)

    def locate(self, array: Array) -> Location:
        """Return where an array starts that lies in the buffer."""
        if array not in self:
            raise InvalidArgument("the array does not lie in the buffer; make it by the buffer's numpy() or tensor()")
        return Location(self, address(array) - self.address)

    def close(self, timeout: float | None = None) -> None:
        """Take the buffer back once the daemon uses it no more. Caches in it must be closed before."""
        with self._session.registering(timeout):
            if self._session.buffers.get(self.id) is not self:
                raise Closed("the buffer is closed")
            for cache in self._session.caches.values():
                if self in cache.buffers:
                    raise FailedPrecondition(f"cache {cache.id} lies in the buffer; close it first")
            lease = self._session.lease_if_any()
            if lease is not None:
                lease.give_back(self._release_request(), timeout)
            del self._session.buffers[self.id]
            self.free()

    def free(self) -> None:
        """Let go of what this process holds for the buffer."""

    def register(self, lease: Lease, timeout: float | None) -> None:
        """Lend the buffer on a lease."""
        request = memory_pb2.RegisterRegion(region_id=self.id, size=self.size, access=int(self.access))  # type: ignore[arg-type]
        self._describe(request, lease, timeout)
        lease.call(lease_pb2.LeaseRequest(register_region=request), timeout, undo=self._release_request())

    def _describe(self, request: memory_pb2.RegisterRegion, lease: Lease, timeout: float | None) -> None:
        raise NotImplementedError

    def _release_request(self) -> lease_pb2.LeaseRequest:
        return lease_pb2.LeaseRequest(release_region=memory_pb2.ReleaseRegion(region_id=self.id))


class SharedBuffer(Buffer):
    """Shared memory of this process."""

    def __init__(self, session: Session, size: int, access: Access) -> None:
        super().__init__(session, size, access)
        self._fd, self._map = _new_memory(size, access)
        self._address = np.frombuffer(self._map, np.uint8).__array_interface__["data"][0]

    @property
    def address(self) -> int:
        """The address of the first byte."""
        return self._address

    @property
    def memory(self) -> memoryview:
        """The bytes."""
        return memoryview(self._map)

    def numpy(self, dtype: Any = np.uint8, shape: Any = -1, offset: int = 0) -> np.ndarray:
        """Return the memory from ``offset`` bytes on as a writable array; a shape of -1 takes all of it."""
        dtype = np.dtype(dtype)
        count = (self.size - offset) // dtype.itemsize if shape == -1 else int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def tensor(self, dtype: torch.dtype, shape: Any = -1, offset: int = 0) -> torch.Tensor:
        """Return the memory from ``offset`` bytes on as a torch tensor on the CPU; -1 takes all of it."""
        import torch

        item = torch.empty(0, dtype=dtype).element_size()
        count = (self.size - offset) // item if shape == -1 else int(np.prod(shape))
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def free(self) -> None:
        """Close the descriptor; arrays over the memory keep it mapped."""
        os.close(self._fd)
        with contextlib.suppress(BufferError):  # an array over it lives on, and unmaps it when it ends
            self._map.close()

    def _describe(self, request: memory_pb2.RegisterRegion, lease: Lease, timeout: float | None) -> None:
        (token,) = send_fds(lease, [self._fd], timeout)
        request.shared_memory.fd_token = token


@dataclass(frozen=True)
class Probe:
    """What the engine knows to be in a buffer when it lends it: proof that both mean the same memory."""

    data: bytes
    """At most 1 MiB."""
    offset: int = 0
    """Bytes, within the buffer."""


class FileBuffer(Buffer):
    """Mappable memory that the engine already has, by its descriptor."""

    def __init__(self, session: Session, fd: int, size: int, offset: int, access: Access, probe: Probe | None) -> None:
        super().__init__(session, size, access)
        if size < 1 or offset < 0:
            raise InvalidArgument(f"is {size} at offset {offset}; share at least one byte", field="size")
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        self._offset = offset
        self._probe = probe

    def free(self) -> None:
        """Close the duplicate of the descriptor."""
        os.close(self._fd)

    def register(self, lease: Lease, timeout: float | None) -> None:
        """Lend the buffer on a lease, proving it the first time: later the memory may have changed."""
        super().register(lease, timeout)
        self._probe = None

    def _describe(self, request: memory_pb2.RegisterRegion, lease: Lease, timeout: float | None) -> None:
        (token,) = send_fds(lease, [self._fd], timeout)
        request.shared_memory.fd_token = token
        request.shared_memory.offset = self._offset
        if self._probe is not None:
            request.probe.offset = self._probe.offset
            request.probe.length = len(self._probe.data)
            request.probe.expected_sha256 = hashlib.sha256(self._probe.data).digest()


def _new_memory(size: int, access: Access) -> tuple[int, mmap.mmap]:
    """Make a memfd of fixed size and map it; what is lent read-only only this mapping may write."""
    if size < 1:
        raise InvalidArgument(f"is {size}; ask for at least one byte", field="size")
    try:
        fd = os.memfd_create("twilight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise ResourceExhausted(f"shared memory cannot be made: {e}", cause=e) from e
    try:
        os.ftruncate(fd, size)
        mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as e:
        os.close(fd)
        raise ResourceExhausted(f"{size} bytes of shared memory cannot be had: {e}", field="size", cause=e) from e
    seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    if access == Access.READ_ONLY:
        seals |= _F_SEAL_FUTURE_WRITE
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as e:
        mapped.close()
        os.close(fd)
        raise Unsupported(f"shared memory cannot be sealed: {e}; Linux 5.1 or later is needed", cause=e) from e
    return fd, mapped


# The packet: proto/twilight/v1/memory.proto, at SharedMemory.
_MAGIC = b"TWFD"
_VERSION = 1
_MAX_DESCRIPTORS = 64
_TOKEN_BYTES = 16
_MAX_ANSWER = 256


def send_fds(lease: Lease, fds: list[int], timeout: float | None = None) -> list[bytes]:
    """Bring descriptors to the daemon; return the tokens that name them, once each, in the same order.

    The descriptors stay open and the caller's.
    """
    if not lease.fd_path:
        raise Unsupported("the daemon is on another host, where memory cannot be lent; run it beside the engine")
    tokens = [secrets.token_bytes(_TOKEN_BYTES) for _ in fds]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(timeout)
            s.connect(lease.fd_path)
            for i in range(0, len(fds), _MAX_DESCRIPTORS):
                some = tokens[i : i + _MAX_DESCRIPTORS]
                packet = _MAGIC + bytes((_VERSION, len(some))) + lease.opened.token + b"".join(some)
                socket.send_fds(s, [packet], fds[i : i + _MAX_DESCRIPTORS])
                answer = s.recv(_MAX_ANSWER)
                if answer != b"\0":
                    raise Error(answer[1:].decode(errors="replace") or "the connection was closed")
    except (OSError, Error) as e:
        raise Unreachable(f"the daemon did not take {len(fds)} descriptors: {e}", cause=e) from e
    return tokens
