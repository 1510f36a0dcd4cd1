"""A connection to a daemon, and the lease that an engine holds on it."""

from __future__ import annotations

import contextlib
import enum
import json
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from ._arrays import Array
from ._lease import Lease, lease_lost
from ._proto import lease_pb2, twilight_pb2
from .buffer import Access, Buffer, FileBuffer, Location, Probe, SharedBuffer
from .cache import Cache, CacheSpec, ShadowSize
from .errors import Closed, DeadlineExceeded, Error, InvalidArgument, Unreachable, from_rpc
from .geometry import Geometry

if TYPE_CHECKING:
    import torch

    from .cuda import CudaBuffer

_PROTOCOL_VERSION = 1
_MIN_BACKOFF = 0.05  # seconds
_MAX_BACKOFF = 2.0
_RESTORE_TIMEOUT = 15.0  # of one attempt to renew a lease
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse{status: SERVING}

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", int(1000 * _MIN_BACKOFF)),
    ("grpc.max_reconnect_backoff_ms", int(1000 * _MAX_BACKOFF)),
)

# This process's identity towards daemons: random, since a PID is not unique across containers.
_ENGINE_ID = secrets.token_bytes(16)

Config = str | Path | Mapping[str, Any] | None
"""A Twilight config: JSON, a mapping, or the path of a JSON file. None takes the daemon's default."""


def config_json(config: Config) -> str:
    """Return a config as JSON; "" for the daemon's default."""
    if config is None:
        return ""
    if isinstance(config, Path):
        return config.read_text()
    if isinstance(config, str):
        return config if not config or config.lstrip().startswith("{") else Path(config).read_text()
    return json.dumps(config)


def dial(target: str, *, credentials: grpc.ChannelCredentials | None = None, insecure: bool = False) -> Client:
    """Name a daemon: ``unix:///path/to/socket``, or ``tcp://host:port``, where ``tcp://`` may be left out.

    It connects on first use, so that it succeeds whether or not the daemon runs. TCP speaks TLS, by the system's
    roots unless ``credentials`` are given, or plain text with ``insecure``.
    """
    return Client(target, credentials=credentials, insecure=insecure)


class Client:
    """A connection to a daemon. Its methods may be called by any thread."""

    def __init__(
        self, target: str, *, credentials: grpc.ChannelCredentials | None = None, insecure: bool = False
    ) -> None:
        self._credentials = credentials
        self._insecure = insecure
        self.target = target
        self.channel = self.connect(target)
        self._health = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes
        )

    def connect(self, target: str) -> grpc.Channel:
        """Make a channel of this client's kind."""
        if not target or target == "unix:":
            raise InvalidArgument(f"{target!r} is no target; use unix:///path or tcp://host:port", field="target")
        target = target.removeprefix("tcp://")
        if self._insecure or target.startswith("unix:"):
            return grpc.insecure_channel(target, _CHANNEL_OPTIONS)
        return grpc.secure_channel(target, self._credentials or grpc.ssl_channel_credentials(), _CHANNEL_OPTIONS)

    def close(self) -> None:
        """Close the connection, and with it every session whose stream it carries: close those first."""
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def capabilities(
        self, geometry: Geometry | None = None, config: Config = None, timeout: float | None = None
    ) -> twilight_pb2.GetCapabilitiesResponse:
        """Tell the daemon's devices and what they declare they can do.

        With a geometry each device also states the shadow that it would need under the config.
        """
        request = twilight_pb2.GetCapabilitiesRequest()
        if geometry is not None:
            request.shadow.geometry.CopyFrom(geometry.proto())
            request.shadow.config_json = config_json(config)
        call = self.channel.unary_unary(
            "/twilight.v1.TwilightService/GetCapabilities",
            request_serializer=twilight_pb2.GetCapabilitiesRequest.SerializeToString,
            response_deserializer=twilight_pb2.GetCapabilitiesResponse.FromString,
        )
        try:
            return call(request, timeout=timeout)
        except grpc.RpcError as e:
            raise from_rpc(e) from e

    def check_health(self, timeout: float | None = None) -> None:
        """Raise unless the daemon is serving."""
        try:
            answer = self._health(b"", timeout=timeout)
        except grpc.RpcError as e:
            raise from_rpc(e) from e
        if answer != _SERVING:
            raise Unreachable("the daemon does not serve yet, or no more")

    def wait_serving(self, timeout: float = 30.0) -> None:
        """Wait until the daemon is serving."""
        deadline = time.monotonic() + timeout
        pause = _MIN_BACKOFF
        while True:
            left = deadline - time.monotonic()
            try:
                return self.check_health(max(left, 0.001))
            except Error as e:
                if left < pause:
                    raise DeadlineExceeded(f"waiting for {self.target} to serve: {e}", cause=e) from e
            time.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF / 4)

    def open(
        self,
        geometry: Geometry,
        config: Config = None,
        *,
        engine_name: str = "",
        device: str = "",
        on_state: Callable[[State, Error | None], None] | None = None,
        timeout: float | None = None,
    ) -> Session:
        """Open a session.

        ``engine_name`` is for people: shown in logs, traces and the budget page. ``device`` is a device id of
        :meth:`capabilities`; "" takes the only one. ``on_state`` is called when the state changes, in order, with
        the reason where there is one; it must not block, nor call the session but for ``state``.
        """
        return Session(self, geometry, config, engine_name, device, on_state, timeout)


class State(enum.Enum):
    """How a session stands with the daemon."""

    LIVE = "live"
    DRAINING = "draining"
    """The daemon accepts no new steps and will soon end the lease."""
    LOST = "lost"
    """The stream broke; the session is trying to open a fresh lease."""
    CLOSED = "closed"


class Session:
    """An engine's lease, renewed whenever it is lost.

    A fresh lease gets the same buffers and caches, and the next step of each cache sends its whole tables. All
    methods may be called by any thread.
    """

    def __init__(
        self,
        client: Client,
        geometry: Geometry,
        config: Config,
        engine_name: str,
        device: str,
        on_state: Callable[[State, Error | None], None] | None,
        timeout: float | None,
    ) -> None:
        self._client = client
        self.geometry = geometry.filled()
        self._request = twilight_pb2.OpenLeaseRequest(
            protocol_version=_PROTOCOL_VERSION,
            engine_id=_ENGINE_ID,
            engine_name=engine_name,
            device=device,
            geometry=geometry.proto(),
            config_json=config_json(config),
        )
        self._on_state = on_state
        self._registrations = threading.Lock()
        self.buffers: dict[int, Buffer] = {}
        self.caches: dict[int, Cache] = {}
        self._last_buffer = self._last_cache = 0

        self._changed = threading.Condition()
        self._wake = threading.Event()  # of the thread that renews the lease: it has something to do
        self._closing = False
        lease = Lease(client, self._request, timeout)
        self._opened = lease.opened
        self._lease: Lease | None = lease
        self._state = State.LIVE
        self._cause: Error | None = None
        if on_state is not None:
            on_state(State.LIVE, None)
        self._keeper = threading.Thread(target=self._keep, args=(lease,), name="twilight-session", daemon=True)
        self._keeper.start()

    @property
    def config(self) -> str:
        """The config as it runs: JSON, every key with its value."""
        return self._opened.config_json

    @property
    def device(self) -> twilight_pb2.Device:
        """The device that serves the session."""
        return self._opened.device

    @property
    def limits(self) -> twilight_pb2.Limits:
        """What the session may ask for."""
        return self._opened.limits

    @property
    def state(self) -> tuple[State, Error | None]:
        """How the session stands, and why unless it is live."""
        with self._changed:
            return self._state, self._cause

    @property
    def live(self) -> bool:
        """Whether the daemon takes new steps."""
        return self._state is State.LIVE

    def wait_live(self, timeout: float | None = None) -> None:
        """Wait until the session is live."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state in (State.LIVE, State.CLOSED), timeout):
                raise DeadlineExceeded(f"the session is {self._state.value} after {timeout} s: {self._cause}")
            if self._state is State.CLOSED:
                raise Closed("the session is closed")

    def new_buffer(self, size: int, access: Access, timeout: float | None = None) -> SharedBuffer:
        """Make shared memory of ``size`` bytes, zeroed, and lend it.

        What is lent read-only is sealed so that the daemon cannot map it for writing.
        """
        buffer = SharedBuffer(self, size, access)
        self._add(buffer, timeout)
        return buffer

    def share_fd(
        self,
        fd: int,
        size: int,
        access: Access,
        *,
        offset: int = 0,
        probe: Probe | None = None,
        timeout: float | None = None,
    ) -> FileBuffer:
        """Lend memory that the engine already has: a memfd, POSIX shared memory or any mappable file.

        ``offset``, a multiple of 4096, is where it starts in the file. The session keeps a duplicate of the
        descriptor. A ``probe`` that the daemon does not find fails with :class:`~twilight_client.errors.DataLoss`.
        """
        buffer = FileBuffer(self, fd, size, offset, access, probe)
        self._add(buffer, timeout)
        return buffer

    def share_tensor(self, tensor: torch.Tensor, access: Access, timeout: float | None = None) -> CudaBuffer:
        """Lend the storage that a torch tensor on a GPU lies in; the buffer keeps the tensor alive.

        Memory of cudaMalloc goes by CUDA IPC, that of expandable segments by descriptors of its chunks. Other
        processes cannot map what cudaMallocAsync made: that is refused. Allocations should be multiples of 2 MiB, as
        those of torch's caching allocator are: others are mapped in small pages, far slower to read at random.
        """
        from .cuda import CudaBuffer

        buffer = CudaBuffer(self, tensor, access)
        self._add(buffer, timeout)
        return buffer

    def locate(self, array: Array) -> Location | None:
        """Return where in the session's buffers an array lies; None if in none."""
        for buffer in self.buffers.values():
            if array in buffer:
                return buffer.locate(array)
        return None

    def register_cache(self, spec: CacheSpec, timeout: float | None = None) -> Cache:
        """Say where a KV cache lies and take the shadow for it."""
        with self.registering(timeout):
            cache = Cache(self, self._last_cache + 1, spec)
            for buffer in cache.buffers:
                if self.buffers.get(buffer.id) is not buffer:
                    raise InvalidArgument(
                        "a layer lies in a buffer that this session has not; share it, and close it later",
                        field="register_cache.layers",
                    )
            cache.register(self.lease(), timeout)
            self._last_cache = cache.id
            self.caches[cache.id] = cache
        return cache

    def register_tensors(
        self,
        keys: Sequence[Array],
        values: Sequence[Array],
        *,
        layers: Sequence[int] | None = None,
        null_page: int | None = None,
        max_tokens: int = 0,
        timeout: float | None = None,
    ) -> Cache:
        """Register a cache by a tensor of keys and one of values for each layer.

        Each is [pages, kv_heads, page_size, dim] in *this order of axes*, in a buffer of the session. Strides may
        be any, dim's alone is contiguous: whatever order the engine keeps, ``permute`` gives the view. ``layers``
        are the model's layer indices, 0, 1, ... by default.
        """
        return self.register_cache(
            CacheSpec.of_tensors(self, keys, values, layers=layers, null_page=null_page, max_tokens=max_tokens),
            timeout,
        )

    def shadow_size(self, spec: CacheSpec, timeout: float | None = None) -> ShadowSize:
        """Tell what :meth:`register_cache` would take, and take nothing."""
        message = spec.proto(1)
        message.size_only = True
        answer = self.lease().call(lease_pb2.LeaseRequest(register_cache=message), timeout)
        return ShadowSize(answer.cache_registered.shadow_bytes, answer.cache_registered.shadow_bytes_per_token)

    def close(self) -> None:
        """End the lease and let go of every buffer. Calls in flight fail. It may be called twice."""
        self._closing = True
        self._wake.set()
        self._keeper.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lease(self) -> Lease:
        """Return the lease that requests go to."""
        with self._changed:
            if self._lease is None:
                raise (self._cause or Closed("the session is closed")).with_traceback(None)
            return self._lease

    def lease_if_any(self) -> Lease | None:
        """Return the lease, None while it is lost."""
        return self._lease

    @contextlib.contextmanager
    def registering(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the session's buffers and caches."""
        if not self._registrations.acquire(timeout=-1 if timeout is None else timeout):
            raise DeadlineExceeded(f"the session was busy registering for {timeout} s")
        try:
            if self._state is State.CLOSED:
                raise Closed("the session is closed")
            yield
        finally:
            self._registrations.release()

    def _add(self, buffer: Buffer, timeout: float | None) -> None:
        try:
            with self.registering(timeout):
                buffer.id = self._last_buffer + 1
                buffer.register(self.lease(), timeout)
                self._last_buffer = buffer.id
                self.buffers[buffer.id] = buffer
        except BaseException:
            buffer.free()
            raise

    def _set(self, state: State, cause: Error | None, lease: Lease | None) -> None:
        with self._changed:
            self._state, self._cause, self._lease = state, cause, lease
            if lease is not None:
                self._opened = lease.opened
            self._changed.notify_all()
        if self._on_state is not None:
            self._on_state(state, cause)

    def _keep(self, first: Lease) -> None:
        """Renew the lease whenever it is lost, until the session is closed. It alone changes the state."""
        lease: Lease | None = first
        pause = _MIN_BACKOFF
        while lease is not None:
            born = time.monotonic()
            lease.watch(self._wake)
            while not lease.done.is_set() and not self._closing:
                self._wake.wait()
                self._wake.clear()
                if lease.draining is not None and self._state is State.LIVE:
                    self._set(State.DRAINING, lease.draining, lease)
            if self._closing:
                break
            self._set(State.LOST, lease.error, None)
            if time.monotonic() - born > _MAX_BACKOFF:  # else pauses go on growing
                pause = _MIN_BACKOFF
            lease, pause = self._renew(pause)
            if lease is not None:
                self._set(State.LIVE, None, lease)
        self._set(State.CLOSED, Closed("the session is closed"), None)
        if lease is not None:
            lease.close()
        with self._registrations:
            for buffer in self.buffers.values():
                buffer.free()
            self.buffers.clear()
            self.caches.clear()

    def _renew(self, pause: float) -> tuple[Lease | None, float]:
        """Return a fresh lease with all that the lost one had, or None once the session is closed."""
        while not self._closing:
            # Jitter: engines that lost one daemon come back apart.
            self._wake.wait(pause / 2 + random.uniform(0, pause / 2))  # noqa: S311 - no secret
            self._wake.clear()
            if self._closing:
                break
            pause = min(2 * pause, _MAX_BACKOFF)
            try:
                return self._restore(), pause
            except Error as e:
                with self._changed:
                    self._cause = lease_lost(e)
        return None, pause

    def _restore(self) -> Lease:
        with self._registrations:
            lease = Lease(self._client, self._request, _RESTORE_TIMEOUT)
            try:
                for _, buffer in sorted(self.buffers.items()):
                    buffer.register(lease, _RESTORE_TIMEOUT)
                for _, cache in sorted(self.caches.items()):
                    cache.register(lease, _RESTORE_TIMEOUT)
            except BaseException:
                lease.release()
                raise
            return lease
