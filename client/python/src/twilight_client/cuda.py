"""Memory and streams of a GPU, by cuda-bindings and torch.

:meth:`Session.share_tensor` lends a tensor. A step that is armed with ``Arming(stream=True)`` rings and waits in
torch's current CUDA stream, so that no layer meets the host; with a :class:`StepGraph` rings and waits are captured,
once, in the graph of a batch size. The words lie in shared memory that both processes let the GPU see, so that a
CPU's store always ends a wait, whatever became of the daemon.

What is here has not run on a GPU yet; tests/test_cuda.py does, where there is one.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ._futex import WORD_BYTES
from ._proto import error_pb2, memory_pb2
from .armed import Arming, Words
from .buffer import Access, Buffer, SharedBuffer, send_fds
from .errors import InternalError, InvalidArgument, ResourceExhausted, Unsupported

try:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue] # has no types
except ImportError as e:
    raise ImportError("memory of a GPU needs cuda-bindings: pip install 'twilight-client[cuda]'") from e

if TYPE_CHECKING:
    from ._lease import Lease
    from .armed import ArmedStep
    from .cache import Cache
    from .session import Session
    from .step import Batch

_HANDLE_BYTES = 64  # of CUDA IPC
_POLL = 20e-6  # seconds between looks at an event
_SPINS = 200  # looks without a pause


def _call(result: tuple[Any, ...], what: str) -> Any:
    """Return what a driver call returned, or raise."""
    code, *values = result
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise ResourceExhausted(f"{what}: the GPU is out of memory")
    if code != driver.CUresult.CUDA_SUCCESS:
        raise InternalError(f"{what}: {code.name}")
    return values[0] if values else None


class CudaBuffer(Buffer):
    """Memory of a GPU that a torch tensor lies in, which the buffer keeps."""

    def __init__(self, session: Session, tensor: torch.Tensor, access: Access) -> None:
        if tensor.device.type != "cuda" or not tensor.is_contiguous():
            raise InvalidArgument(
                f"is on {tensor.device}, or has gaps; lend a contiguous tensor on a GPU", field="tensor"
            )
        super().__init__(session, tensor.numel() * tensor.element_size(), access)
        self.tensor = tensor
        self._uuid = f"GPU-{torch.cuda.get_device_properties(tensor.device).uuid}"

    @property
    def address(self) -> int:
        """The address of the first byte, on the GPU."""
        return self.tensor.data_ptr()

    def _describe(self, request: memory_pb2.RegisterRegion, lease: Lease, timeout: float | None) -> None:
        request.device = self._uuid
        at = self.address
        attribute = driver.CUpointer_attribute
        with torch.cuda.device(self.tensor.device):
            torch.cuda.current_stream().synchronize()  # what is lent is there
            if _pointer(attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at):
                base, _ = _range(at)
                handle = _call(driver.cuIpcGetMemHandle(base), "cuIpcGetMemHandle")
                request.cuda_ipc.handle = ctypes.string_at(handle.getPtr(), _HANDLE_BYTES)
                request.cuda_ipc.offset = at - base
                return
            if int(_pointer(attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, at) or 0):
                raise Unsupported(
                    "the memory is of cudaMallocAsync, which other processes cannot map; unset backend:cudaMallocAsync "
                    "in PYTORCH_CUDA_ALLOC_CONF"
                )
            self._describe_chunks(request, lease, timeout)

    def _describe_chunks(self, request: memory_pb2.RegisterRegion, lease: Lease, timeout: float | None) -> None:
        """Name the physical chunks that cover the memory: expandable segments."""
        start, end = self.address, self.address + self.size
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        first, _ = _range(start)
        request.cuda_vmm.offset = start - first
        fds: list[int] = []
        try:
            at = first
            while at < end:
                _, size = _range(at)
                handle = _call(driver.cuMemRetainAllocationHandle(at), "cuMemRetainAllocationHandle")
                try:
                    code, fd = driver.cuMemExportToShareableHandle(handle, kind, 0)
                finally:
                    driver.cuMemRelease(handle)
                if code != driver.CUresult.CUDA_SUCCESS:
                    raise Unsupported(
                        f"a chunk of the memory cannot be exported ({code.name}); allocate it by cudaMalloc, without "
                        "expandable_segments:True in PYTORCH_CUDA_ALLOC_CONF"
                    )
                fds.append(int(fd))
                request.cuda_vmm.chunks.add(size=size)
                at += size
            for chunk, token in zip(request.cuda_vmm.chunks, send_fds(lease, fds, timeout), strict=True):
                chunk.fd_token = token
        finally:
            for fd in fds:
                os.close(fd)


def _pointer(attribute: Any, at: int) -> Any:
    return _call(driver.cuPointerGetAttribute(attribute, at), "cuPointerGetAttribute")


def _range(at: int) -> tuple[int, int]:
    """Return base and size of the allocation, or of the mapped chunk, that an address lies in."""
    code, base, size = driver.cuMemGetAddressRange(at)
    _call((code,), "cuMemGetAddressRange")
    return int(base), int(size)


class Mapped:
    """Shared memory that the current GPU sees."""

    def __init__(self, buffer: SharedBuffer) -> None:
        self.buffer = buffer
        torch.cuda.current_stream().synchronize()  # makes the context
        flags = driver.CU_MEMHOSTREGISTER_DEVICEMAP | driver.CU_MEMHOSTREGISTER_PORTABLE
        _call(driver.cuMemHostRegister(buffer.address, buffer.size, flags), "cuMemHostRegister")
        self.address = int(_call(driver.cuMemHostGetDevicePointer(buffer.address, 0), "cuMemHostGetDevicePointer"))

    def close(self) -> None:
        """Let the GPU see it no more."""
        _call(driver.cuMemHostUnregister(self.buffer.address), "cuMemHostUnregister")


class StreamWords(Words):
    """Words at which a CUDA stream rings and waits."""

    def __init__(self, mapped: Mapped, layers: int, graph: StepGraph | None) -> None:
        super().__init__(mapped.buffer, layers)
        self._mapped = mapped
        self._graph = graph
        self.captured = graph is not None
        self._event = torch.cuda.Event()
        self._ended = False

    def begin(self, step_id: int) -> None:
        """Zero all words, then ring the step's, in stream order."""
        if self._graph is not None:
            self._graph.prepare(step_id)
            return
        _fill(self.at(0), 0, 1 + 2 * self.layers)
        _write(self.at(1 + 2 * self.layers), step_id)

    def ring(self, i: int) -> None:
        """Ring for a layer once the stream has come so far."""
        _write(self.at(1 + i), 1)

    def wait(self, i: int, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Let the stream wait for a layer."""
        equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        _call(driver.cuStreamWaitValue32(_stream(), self.at(1 + self.layers + i), 1, equal), "cuStreamWaitValue32")
        return True

    def end(self) -> None:
        """Take the status, in stream order, and tell when the stream has come so far."""
        if not self._ended:
            if self._graph is None:
                self.take_status()
            self._event.record()
            self._ended = True

    def settle(self, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Wait until the stream is through the step."""
        self.end()
        for _ in range(_SPINS):
            if self._event.query():
                return True
        deadline = time.monotonic() + timeout
        while not self._event.query():
            if stopped() or time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def failed(self) -> int:
        """Return the status that was taken, once the stream is through."""
        return self.taken.load() if self._ended and self._event.query() else 0

    def release(self, code: int) -> threading.Thread:
        """End the stream's waits, again and again until it is through: a begin may undo the first time."""

        def run() -> None:
            while not (self._ended and self._event.query()):
                self.status.store(code)
                for i in range(self.layers):
                    self.done(i).store(1)
                time.sleep(1e-3)

        thread = threading.Thread(target=run, name="twilight-release", daemon=True)
        thread.start()
        return thread

    def take_status(self) -> None:
        """Copy the status to a word of the engine's, in stream order."""
        _copy(self.at(self.spare), self.at(0), 1)

    def at(self, word: int) -> int:
        """Return the address of a word, on the GPU."""
        return self._mapped.address + word * WORD_BYTES


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _write(at: int, value: int) -> None:
    _call(driver.cuStreamWriteValue32(_stream(), at, value & 0xFFFFFFFF, 0), "cuStreamWriteValue32")


def _fill(at: int, value: int, words: int) -> None:
    _call(driver.cuMemsetD32Async(at, value & 0xFFFFFFFF, words, _stream()), "cuMemsetD32Async")


def _copy(to: int, source: int, words: int) -> None:
    _call(driver.cuMemcpyAsync(to, source, words * WORD_BYTES, _stream()), "cuMemcpyAsync")


class StepGraph:
    """The rings and waits of armed steps in a CUDA graph that is captured once and replayed for every step::

        steps = StepGraph(cache, Arming(layers))
        with torch.cuda.graph(graph):
            steps.begin()
            for i in range(len(layers)):
                ...                    # the query, and the token's K and V
                steps.ready(i)
                steps.wait(i)
                ...                    # the output
            steps.end()

        step = steps.arm(batch)        # for each decode step
        step.begin()
        graph.replay()                 # in the same stream
        step.finish()                  # raises unless the step may be used

    A replay that no step was armed for, a warm-up, passes all waits by itself. The graph holds as long as no step of
    more layers is armed on the cache.
    """

    def __init__(self, cache: Cache, how: Arming) -> None:
        self._cache = cache
        self._how = replace(how, stream=True, graph=self)
        self._layers = len(how.layers)
        words = cache.words(self._how)
        assert isinstance(words, StreamWords)  # noqa: S101 - by the stream
        self._words = words
        # At rest: status, ready and done that pass all waits, and no step.
        rest = [error_pb2.ERROR_CODE_FAILED_PRECONDITION, *[0] * self._layers, *[1] * self._layers, 0]
        self._rest = torch.tensor(rest, dtype=torch.int32, device="cuda")
        self._next = self._rest.clone()

    def arm(self, batch: Batch, timeout: float | None = None) -> ArmedStep:
        """Arm a step of the graph: :meth:`Cache.arm`."""
        return self._cache.arm(batch, self._how, timeout)

    def begin(self) -> None:
        """Capture the beginning of a step."""
        words = 1 + 2 * self._layers
        _copy(self._words.at(0), self._next.data_ptr(), words)
        _copy(self._words.at(words), self._next.data_ptr() + words * WORD_BYTES, 1)

    def ready(self, i: int) -> None:
        """Capture the ring of layer ``i``."""
        self._words.ring(i)

    def wait(self, i: int) -> None:
        """Capture the wait for layer ``i``."""
        self._words.wait(i, 0, bool)

    def end(self) -> None:
        """Capture the end of a step."""
        self._words.take_status()
        _copy(self._next.data_ptr(), self._rest.data_ptr(), self._rest.numel())

    def prepare(self, step_id: int) -> None:
        """Let the next replay be that of an armed step, in stream order."""
        words = 1 + 2 * self._layers
        _fill(self._next.data_ptr(), 0, words)
        _fill(self._next.data_ptr() + words * WORD_BYTES, step_id, 1)
