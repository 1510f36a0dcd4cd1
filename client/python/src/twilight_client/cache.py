"""Where a KV cache lies, and the cache as the daemon knows it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._arrays import Array, dtype_of, strides
from ._lease import Lease, wait
from ._proto import lease_pb2, memory_pb2
from ._tables import Tables
from .armed import ArmedStep, Armer, Arming, Words
from .buffer import Buffer, Location
from .errors import Closed, DeadlineExceeded, Error, InvalidArgument
from .geometry import DType
from .step import Batch, IndexStats, Step

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True)
class Strides:
    """Distances in bytes: between pages, KV heads, and tokens within a page."""

    page: int
    head: int
    token: int

    def proto(self) -> memory_pb2.Strides:
        """Return the message."""
        return memory_pb2.Strides(page=self.page, head=self.head, token=self.token)


@dataclass(frozen=True)
class CacheLayer:
    """Where one layer starts."""

    layer: int
    """The model's layer index."""
    k: Location
    v: Location
    k_scales: Sequence[float] = ()
    """For F8_E4M3 caches: real value = stored * scale; empty means 1, else one scale or one per KV head."""
    v_scales: Sequence[float] = ()


@dataclass(frozen=True)
class CacheSpec:
    """Where a KV cache lies.

    The element at (page p, KV head h, token-in-page t, dimension d) is at
    base + p * page + h * head + t * token + d * size.
    """

    dtype: DType
    page_size: int
    """Tokens of a page."""
    num_pages: int
    """Page ids are 0..num_pages-1."""
    k: Strides
    layers: Sequence[CacheLayer]
    """As many as Geometry.layers."""
    v: Strides | None = None
    """None: as ``k``."""
    null_page: int | None = None
    """A page id that pads tables and holds no tokens."""
    max_tokens: int = 0
    """Needed where ``page_size`` is not a multiple of 16: the most tokens that all live sequences hold together.
    0 means num_pages * page_size."""

    @classmethod
    def of_tensors(
        cls,
        session: Session,
        keys: Sequence[Array],
        values: Sequence[Array],
        *,
        layers: Sequence[int] | None = None,
        null_page: int | None = None,
        max_tokens: int = 0,
    ) -> CacheSpec:
        """Describe a cache by its tensors, as :meth:`Session.register_tensors` takes them."""
        indices = range(len(keys)) if layers is None else layers
        if not len(keys) == len(values) == len(indices) or not keys:
            raise InvalidArgument(
                f"{len(keys)} keys, {len(values)} values and {len(indices)} layers; give one of each for every layer",
                field="register_cache.layers",
            )
        pages, _, page_size, _ = keys[0].shape
        return cls(
            dtype=dtype_of(keys[0]),
            page_size=page_size,
            num_pages=pages,
            k=_strides(keys),
            v=_strides(values),
            layers=[
                CacheLayer(layer, _locate(session, k), _locate(session, v))
                for layer, k, v in zip(indices, keys, values, strict=True)
            ],
            null_page=null_page,
            max_tokens=max_tokens,
        )

    def proto(self, cache_id: int) -> memory_pb2.RegisterCache:
        """Return the message."""
        return memory_pb2.RegisterCache(
            cache_id=cache_id,
            dtype=int(self.dtype),  # type: ignore[arg-type]
            page_size=self.page_size,
            num_pages=self.num_pages,
            k_strides=self.k.proto(),
            v_strides=None if self.v is None else self.v.proto(),
            null_page=self.null_page,
            max_tokens=self.max_tokens,
            layers=[
                memory_pb2.CacheLayer(
                    layer=x.layer, k=x.k.proto(), v=x.v.proto(), k_scales=x.k_scales, v_scales=x.v_scales
                )
                for x in self.layers
            ],
        )


def _strides(tensors: Sequence[Array]) -> Strides:
    page, head, token, dim = strides(tensors[0])
    if dim != dtype_of(tensors[0]).size:
        raise InvalidArgument(
            f"the last axis has a stride of {dim} bytes; the dimensions of a head must be contiguous",
            field="register_cache.k_strides",
        )
    for t in tensors:
        if strides(t) != (page, head, token, dim) or t.shape != tensors[0].shape:
            raise InvalidArgument(
                "the tensors of two layers differ in shape or strides; give all layers the same, or a cache each",
                field="register_cache.layers",
            )
    return Strides(page, head, token)


def _locate(session: Session, tensor: Array) -> Location:
    location = session.locate(tensor)
    if location is None:
        raise InvalidArgument(
            "a tensor lies in no buffer of the session; make it in one by new_buffer, or lend it by share_tensor",
            field="register_cache.layers",
        )
    return location


@dataclass(frozen=True)
class ShadowSize:
    """What a cache's shadow takes."""

    bytes: int
    per_token: float
    """Bytes, over all layers and KV heads."""


class Cache:
    """A registered KV cache with its shadow in the daemon. Its methods may be called by any thread."""

    def __init__(self, session: Session, cache_id: int, spec: CacheSpec) -> None:
        self.session = session
        self.id = cache_id
        self.shadow = ShadowSize(0, 0.0)
        self.buffers: set[Buffer] = {location.buffer for x in spec.layers for location in (x.k, x.v)}
        self._request = spec.proto(cache_id)
        # Held from the start of a step until its outcome is known; the receiving thread releases it.
        self._stepping = threading.Lock()
        self._tables = Tables(spec.page_size)
        self._lease: Lease | None = None  # whose daemon has the tables
        self._last_step = 0
        self._armer = Armer(self)

    def register(self, lease: Lease, timeout: float | None) -> None:
        """Register the cache on a lease."""
        answer = lease.call(
            lease_pb2.LeaseRequest(register_cache=self._request), timeout, undo=self._release_request()
        ).cache_registered
        self.shadow = ShadowSize(answer.shadow_bytes, answer.shadow_bytes_per_token)

    def step(self, batch: Batch, timeout: float | None = None) -> Step:
        """Declare a batch and make it the cache's current step. A refused step changes nothing.

        The engine hands in its whole page tables; what changed is sent. After a
        :class:`~twilight_client.errors.DeadlineExceeded` the step may or may not have become current; the next
        one waits until that is known.
        """
        lease, future, step_id, _ = self._submit(batch, None, timeout)
        answer = wait(future, timeout).step_result
        return Step(self, lease, step_id, len(batch.sequences), IndexStats.of(answer.index))

    def arm(self, batch: Batch, how: Arming, timeout: float | None = None) -> ArmedStep:
        """Declare a batch and arm its layers: they meet the daemon at words in lent memory, without messages.

        It can be called while another armed step of the cache runs, which the new one then follows; a third waits
        until the daemon has let go of the first. After a failure it waits until the daemon has let go of what was
        armed. A refused step changes nothing.
        """
        how.check()
        _, future, _, armed = self._submit(batch, how, timeout)
        assert armed is not None  # noqa: S101 - how was given
        try:
            wait(future, timeout)
        except Error as e:
            armed.fail(e, tell=True)  # if it is armed nevertheless
            raise
        return armed

    def words(self, how: Arming, timeout: float | None = None) -> Words:
        """Return the words at which armed steps meet the daemon, for who captures them in a graph."""
        self._hold(timeout)
        try:
            return self._armer.words(how, timeout)
        finally:
            self._stepping.release()

    def close(self, timeout: float | None = None) -> None:
        """Give the cache's shadow back. Its steps are over, armed ones too."""
        with self.session.registering(timeout):
            if self.session.caches.get(self.id) is not self:
                raise Closed(f"cache {self.id} is closed")
            lease = self.session.lease_if_any()
            if lease is not None:
                lease.give_back(self._release_request(), timeout)
            del self.session.caches[self.id]
        self._hold(timeout)
        try:
            self._armer.close(timeout)
        finally:
            self._stepping.release()

    def _release_request(self) -> lease_pb2.LeaseRequest:
        return lease_pb2.LeaseRequest(release_cache=memory_pb2.ReleaseCache(cache_id=self.id))

    def _hold(self, timeout: float | None) -> None:
        """Wait until no step's outcome is open."""
        if not self._stepping.acquire(timeout=-1 if timeout is None else timeout):
            raise DeadlineExceeded(f"the step before was not answered within {timeout} s")

    def _submit(
        self, batch: Batch, how: Arming | None, timeout: float | None
    ) -> tuple[Lease, Future[lease_pb2.LeaseResponse], int, ArmedStep | None]:
        """Send a step. It holds ``_stepping`` until its outcome is known."""
        self._hold(timeout)
        try:
            words = None if how is None else self._armer.prepare(how, timeout)
            lease = self.session.lease()
            if lease is not self._lease:
                self._tables.forget()
                self._armer.forget()
                self._lease = lease
            message = self._tables.build(batch)
            self._last_step += 1
            if self._last_step & 0xFFFFFFFF == 0:  # which no word may hold
                self._last_step += 1
            message.cache_id, message.step_id = self.id, self._last_step
            armed = None if how is None or words is None else self._armer.fill(message, lease, how, words)

            def settle(error: Error | None) -> None:
                if error is None:
                    self._tables.commit()
                elif armed is not None:
                    self._armer.refused(armed, error)
                self._stepping.release()

            try:
                future = lease.start(lease_pb2.LeaseRequest(step=message), settle)
            except Error as e:
                if armed is not None:
                    self._armer.refused(armed, e)
                raise
        except BaseException:
            self._stepping.release()
            raise
        return lease, future, message.step_id, armed
