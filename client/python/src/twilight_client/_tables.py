"""The page tables that the daemon has, so that a step sends only what changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ._proto import step_pb2
from .errors import InvalidArgument, OutOfRange
from .step import Batch, Sequence

_INT32 = np.iinfo(np.int32)


@dataclass
class _Built:
    """A step last built, until it is committed."""

    tables: list[tuple[int, np.ndarray]] = field(default_factory=list)  # whole, of those that changed
    ended: list[int] = field(default_factory=list)
    ended_lost: list[int] = field(default_factory=list)


class Tables:
    """``build`` packs a step; ``commit`` books it once the daemon has accepted it."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        # By sequence: int32 [pages, 2], the page or slot of K and of V.
        self._known: dict[int, np.ndarray] = {}
        # Sequences that an earlier lease knew and this one does not. What a batch says of their past is left
        # out: this lease has indexed none of it.
        self._lost: set[int] = set()
        self._built = _Built()

    def forget(self) -> None:
        """Make every known sequence a lost one: the lease is another."""
        self._lost.update(self._known)
        self._known.clear()

    def build(self, batch: Batch) -> step_pb2.Step:
        """Pack a batch."""
        built = self._built = _Built()
        for name in batch.ended:
            (built.ended_lost if name in self._lost else built.ended).append(name)
        m = step_pb2.Step(index_only=batch.index_only, ended=built.ended)
        if batch.trace is not None:
            m.traceparent, m.tracestate = batch.trace.parent, batch.trace.state
        if batch.slots is not None:
            m.slots.slots.extend(batch.slots)
        m.table.SetInParent()

        anonymous = batch.slots is not None and len(batch.sequences) > 0 and batch.sequences[0].id == 0
        k_entries: list[np.ndarray] = []
        v_entries: list[np.ndarray] = []
        for i, s in enumerate(batch.sequences):
            _check(s, i, anonymous)
            if not anonymous:
                m.sequences.append(s.id)
            m.lengths.append(s.length)
            m.first_valid.append(s.first)
            self._claim(m.claims, s)
            table = self._table(s)
            known = None if s.id in batch.ended else self._known.get(s.id)
            start = _start(table, known)
            m.table.starts.append(start)
            m.table.counts.append(len(table) - start)
            k_entries.append(table[start:, 0])
            v_entries.append(table[start:, 1])
            if not anonymous and start < len(table):
                built.tables.append((s.id, table))

        if k_entries:
            k, v = np.concatenate(k_entries), np.concatenate(v_entries)
            m.table.entries.extend(k.tolist())
            if not np.array_equal(k, v):
                m.table.v_entries.extend(v.tolist())
        _unless(m, "first_valid", 0)
        _unless(m.claims, "unchanged_prefix", 0)
        _unless(m.claims, "prefix_of", 0)
        _unless(m.claims, "truncate_to", -1)
        return m

    def commit(self) -> None:
        """Book the step last built."""
        built = self._built
        for name in built.ended:
            self._known.pop(name, None)
        self._lost.difference_update(built.ended_lost)
        for name, table in built.tables:
            self._known[name] = table
            self._lost.discard(name)

    def _claim(self, claims: step_pb2.Claims, s: Sequence) -> None:
        unchanged, prefix_of = s.unchanged_prefix, s.prefix_of
        truncate_to = -1 if s.truncate_to is None else s.truncate_to
        if s.id in self._lost:
            unchanged, prefix_of, truncate_to = 0, 0, -1
        elif prefix_of in self._lost:
            unchanged, prefix_of = 0, 0
        claims.unchanged_prefix.append(unchanged)
        claims.prefix_of.append(prefix_of)
        claims.truncate_to.append(truncate_to)

    def _table(self, s: Sequence) -> np.ndarray:
        """Return the entries of a sequence that its length covers."""
        pages = min(len(s.table), -(-max(s.length, 0) // self._page_size))
        table = np.empty((pages, 2), np.int32)
        table[:, 0] = s.table[:pages]
        table[:, 1] = s.table[:pages] if s.v_table is None else s.v_table[:pages]
        return table


def _start(table: np.ndarray, known: np.ndarray | None) -> int:
    """Return from which entry on the daemon must be told a table."""
    if known is None:
        return 0
    both = min(len(table), len(known))
    differ = np.flatnonzero((table[:both] != known[:both]).any(axis=1))
    start = int(differ[0]) if len(differ) else both
    if start == len(table) and 0 < len(table) < len(known):
        # The daemon's table ends behind what it is sent: the last entry, sent again, shortens it, so that a
        # page that comes back later counts as new.
        start -= 1
    return start


def _unless(message: step_pb2.Step | step_pb2.Claims, column: str, usual: int) -> None:
    """Leave out a column that says nothing: all its values are usual."""
    if all(x == usual for x in getattr(message, column)):
        message.ClearField(column)  # type: ignore[arg-type]


def _check(s: Sequence, i: int, anonymous: bool) -> None:
    """Refuse what would not survive the way into the columns."""
    if anonymous != (s.id == 0):
        raise InvalidArgument(
            f"is {s.id}; ids start at 1, or are 0 in all rows of a batch with slots",
            field=f"step.sequences[{i}]",
        )
    if s.v_table is not None and len(s.v_table) != len(s.table):
        raise InvalidArgument(
            f"row {i} has {len(s.v_table)} entries for V and {len(s.table)} for K; give equally many",
            field="step.table.v_entries",
        )
    for name, value in (
        ("step.lengths", s.length),
        ("step.first_valid", s.first),
        ("step.claims.unchanged_prefix", s.unchanged_prefix),
        ("step.claims.truncate_to", s.truncate_to or 0),
    ):
        if not _INT32.min <= value <= _INT32.max:
            raise OutOfRange(f"is {value}; positions are 32-bit", field=f"{name}[{i}]")
