"""Decode steps and the results of their layers."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arrays import Array, from_bytes, strides, to_bytes
from ._lease import wait
from ._proto import lease_pb2, step_pb2
from .buffer import Location
from .errors import InvalidArgument

if TYPE_CHECKING:
    from ._lease import Lease
    from .cache import Cache
    from .session import Session

PATH_SPARSE = step_pb2.PATH_SPARSE
"""Selected, pruned, attended over the kept tokens."""
PATH_DENSE = step_pb2.PATH_DENSE
"""Attended over all tokens."""
PATH_VOID = step_pb2.PATH_VOID
"""Nothing computed."""


@dataclass(frozen=True)
class Trace:
    """The W3C trace context of the engine's step: the headers traceparent and tracestate."""

    parent: str
    state: str = ""

    @classmethod
    def current(cls) -> Trace | None:
        """Return the context of the current OpenTelemetry span; None without one, or without opentelemetry-api."""
        try:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            return None
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers)
        return cls(headers["traceparent"], headers.get("tracestate", "")) if "traceparent" in headers else None


@dataclass(frozen=True)
class Sequence:
    """A row of a batch. Positions count from the table's start, left padding included."""

    id: int
    """The engine's name for the sequence, at least 1. With slots all rows of a batch may have 0."""
    length: int
    """Tokens in the cache, this step's included; 0 computes nothing for the row."""
    table: collections.abc.Sequence[int] | np.ndarray
    """Page ids (or, with a page size of 1, token slots) of the whole sequence, in each step. Pages beyond the
    length are ignored."""
    first: int = 0
    """The position of the first real token."""
    v_table: collections.abc.Sequence[int] | np.ndarray | None = None
    """Page ids of V where they differ."""
    unchanged_prefix: int = 0
    """Claims that the first n tokens are as the daemon last indexed them under these pages, a prefix-cache hit:
    what it has of them is kept."""
    prefix_of: int = 0
    """The sequence that the prefix was indexed for, needed where the page size is not a multiple of 16; 0 means
    this one."""
    truncate_to: int | None = None
    """First takes back all tokens from this position on."""


@dataclass(frozen=True)
class Batch:
    """One decode iteration or, with ``index_only``, a prefill."""

    sequences: collections.abc.Sequence[Sequence]
    ended: collections.abc.Sequence[int] = ()
    """Sequences that are over. An id may end and start anew in one step."""
    slots: collections.abc.Sequence[int] | None = None
    """Exactly the token slots (page * page_size + offset) written since the last step, -1 for padding, in place of
    the rule that new tokens are those beyond a sequence's last length. Needs a page size that is a multiple of 16."""
    index_only: bool = False
    """Index what is new in all layers now; no layer follows."""
    trace: Trace | None = None


@dataclass(frozen=True)
class IndexStats:
    """What indexing did, tokens counted once per layer."""

    tokens_indexed: int = 0
    """Read and written to the shadow."""
    tokens_claimed: int = 0
    """Kept from being indexed again by claims."""
    chunks_drifted: int = 0
    """Chunks whose keys stray far from what equalisation was frozen on."""
    retrainings: int = 0
    """Times that a layer's statistics were refreshed and its shadow rebuilt."""

    @classmethod
    def of(cls, m: step_pb2.IndexStats) -> IndexStats:
        """Read a message."""
        return cls(m.tokens_indexed, m.tokens_claimed, m.chunks_drifted, m.statistics_refreshed)


@dataclass(frozen=True)
class Timing:
    """Nanoseconds on the device. Stages are summed over rows that ran in parallel; ``wall`` is not."""

    wall: int = 0
    index: int = 0
    select: int = 0
    prune: int = 0
    attend: int = 0


@dataclass(frozen=True)
class Tensor:
    """Where a tensor [B, heads, dim] lies."""

    at: Location
    row_stride: int = 0
    """Bytes; 0 means packed."""
    head_stride: int = 0

    @classmethod
    def of(cls, session: Session, array: Array) -> Tensor:
        """Return where an array [B, heads, dim] lies in the session's buffers."""
        location = session.locate(array)
        if location is None:
            raise InvalidArgument("an array lies in no buffer of the session; make it in one by new_buffer")
        row, head, _ = strides(array)
        return cls(location, row, head)

    def proto(self) -> step_pb2.Tensor:
        """Return the message."""
        return step_pb2.Tensor(at=self.at.proto(), row_stride=self.row_stride, head_stride=self.head_stride)


@dataclass(frozen=True)
class ListBuffer:
    """Where pruned lists go. One longer than ``capacity`` is cut and named in LayerResult.truncated."""

    lists: Location
    """int32 [R, capacity], ascending token positions."""
    counts: Location
    """int32 [R], entries written of each list."""
    capacity: int

    def proto(self) -> step_pb2.ListBuffer:
        """Return the message."""
        return step_pb2.ListBuffer(lists=self.lists.proto(), counts=self.counts.proto(), capacity=self.capacity)


@dataclass(frozen=True)
class Observation:
    """What the prefill of every sequence of a step saw, for methods that start from it.

    Sent once, with the first message of a layer after the prefill; refused where no method of the config takes it.
    The prefill ended before the query's position or, in a layer without a query, with the sequence's last.
    """

    window_queries: Array | None = None
    """[B, window, Hq, k_dim] of the query dtype: queries of the prefill's last positions."""
    mass: Array | None = None
    """float32 [B, Hq, tokens]: the softmax weight that each position got from all queries of the prefill. What lies
    past a sequence's prefill is ignored."""

    def proto(self) -> step_pb2.Observation:
        """Return the message, with the tensors inline."""
        m = step_pb2.Observation()
        if self.window_queries is not None:
            m.window = self.window_queries.shape[1]
            m.window_queries_inline = to_bytes(self.window_queries)
        if self.mass is not None:
            m.mass_tokens = self.mass.shape[2]
            m.mass_inline = to_bytes(self.mass)
        return m


@dataclass(frozen=True)
class LayerResult:
    """A layer's answer. Columns of R are ordered by sequence, then head.

    R is B * kv_heads under group mode "union", B * query_heads under "per_query_head".
    """

    candidates: np.ndarray
    """uint32 [R]: tokens that the selector kept."""
    kept: np.ndarray
    """uint32 [R]: tokens that the pruner kept. A dense row keeps every valid token."""
    paths: np.ndarray
    """int32 [R]: PATH_SPARSE, PATH_DENSE or PATH_VOID."""
    reasons: np.ndarray
    """int32 [R]: proto PathReason, why a row was not computed sparsely."""
    lists: np.ndarray
    """int32: the rows' lists one behind another, kept[r] ascending positions each; see :meth:`row_lists`."""
    truncated: np.ndarray
    """uint32: rows whose list did not fit the ListBuffer."""
    estimated_mass: np.ndarray
    """float32 [B * Hq]: the share of softmax weight that the kept tokens hold, as the daemon estimates it; or none."""
    estimated_coverage: np.ndarray
    """float32 [B * Hq]: likewise of the candidates."""
    audited: np.ndarray
    """uint32: indices into B * Hq for which the daemon also attended densely."""
    true_mass: np.ndarray
    """float32, as ``audited``: the true share that the kept tokens hold."""
    output_error: np.ndarray
    """float32, as ``audited``: the relative error of the output."""
    index: IndexStats
    timing: Timing
    output: Any = None
    """[B, Hq, v_dim] of the output dtype, an array of the query's kind, unless ``output`` was given."""

    @classmethod
    def of(cls, m: step_pb2.LayerResult, output: Array | None = None) -> LayerResult:
        """Read a message."""
        t = m.timing
        return cls(
            candidates=np.array(m.candidates, np.uint32),
            kept=np.array(m.kept, np.uint32),
            paths=np.array(m.paths, np.int32),
            reasons=np.array(m.reasons, np.int32),
            lists=np.array(m.lists, np.int32),
            truncated=np.array(m.truncated, np.uint32),
            estimated_mass=np.array(m.estimated_mass, np.float32),
            estimated_coverage=np.array(m.estimated_coverage, np.float32),
            audited=np.array(m.audited, np.uint32),
            true_mass=np.array(m.true_mass, np.float32),
            output_error=np.array(m.output_error, np.float32),
            index=IndexStats.of(m.index),
            timing=Timing(t.wall_ns, t.index_ns, t.select_ns, t.prune_ns, t.attend_ns),
            output=output,
        )

    def row_lists(self) -> Iterator[np.ndarray]:
        """Yield the list of each row, which must have been asked for."""
        yield from np.split(self.lists, np.cumsum(self.kept)[:-1])


class Step:
    """The current step of a cache, until the next one."""

    def __init__(self, cache: Cache, lease: Lease, step_id: int, rows: int, index: IndexStats) -> None:
        self.index = index
        """What an ``index_only`` step indexed."""
        self.id = step_id
        self._cache = cache
        self._lease = lease
        self._rows = rows

    def layer(
        self,
        layer: int,
        query: Array | Tensor | None = None,
        *,
        output: Array | Tensor | None = None,
        lists: bool | ListBuffer = False,
        lists_only: bool = False,
        p: collections.abc.Sequence[float] = (),
        token_budget: collections.abc.Sequence[int] = (),
        observation: Observation | None = None,
        timeout: float | None = None,
    ) -> LayerResult:
        """Index a layer of the step and, with a query, run it.

        ``layer`` is the model's layer index. ``query`` is [B, Hq, k_dim] of the geometry's query dtype: where it lies
        in a buffer of the session it is read there, else it travels in the message. ``output``, [B, Hq, v_dim] in a
        buffer lent READ_WRITE, takes the output; without it, it comes in the result. ``lists`` asks for the pruned
        lists, in the result or a buffer; ``lists_only`` leaves attention to the engine. ``p`` and ``token_budget``
        override the config's top-p share and the selector's budget, one value for each sequence, 0 for the config's.

        After a :class:`~twilight_client.errors.DeadlineExceeded` the layer may still run, and write its output, until
        a later request is answered.
        """
        m = step_pb2.Layer(cache_id=self._cache.id, step_id=self.id, layer=layer, lists_only=lists_only)
        session = self._cache.session
        geometry = session.geometry
        if query is not None:
            if isinstance(query, Tensor):
                m.query_tensor.CopyFrom(query.proto())
            elif session.locate(query) is not None:
                m.query_tensor.CopyFrom(Tensor.of(session, query).proto())
            else:
                m.query_inline = to_bytes(query)
        if output is not None:
            tensor = output if isinstance(output, Tensor) else Tensor.of(session, output)
            if tensor is None:
                raise InvalidArgument(
                    "lies in no buffer of the session; make it in one lent READ_WRITE",
                    field="layer.output_tensor",
                )
            m.output_tensor.CopyFrom(tensor.proto())
        if isinstance(lists, ListBuffer):
            m.list_mode = step_pb2.LIST_MODE_BUFFER
            m.list_buffer.CopyFrom(lists.proto())
        elif lists:
            m.list_mode = step_pb2.LIST_MODE_INLINE
        m.p.extend(p)
        m.token_budget.extend(token_budget)
        if observation is not None:
            m.observation.CopyFrom(observation.proto())

        answer = wait(self._lease.start(lease_pb2.LeaseRequest(layer=m)), timeout).layer_result
        inline = None
        if answer.output and geometry.output is not None:
            shape = (self._rows, geometry.query_heads, geometry.v_dim)
            like = np.empty(0) if query is None or isinstance(query, Tensor) else query
            inline = from_bytes(answer.output, geometry.output, shape, like)
        return LayerResult.of(answer, inline)

    def cancel(self, timeout: float | None = None) -> None:
        """Tell the daemon that no layer of the step follows. What it has indexed stays right."""
        request = step_pb2.CancelStep(cache_id=self._cache.id, step_id=self.id)
        self._lease.call(lease_pb2.LeaseRequest(cancel_step=request), timeout)
