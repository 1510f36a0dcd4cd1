"""Armed steps: the layers of a step meet the daemon at words in lent memory, without messages.

This is the way of an engine on a CPU. Where queries and outputs lie on a GPU, :mod:`twilight_client.cuda` rings and
waits by a CUDA stream. proto/twilight/v1/ARMED.md is the protocol.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._futex import WORD_BYTES, Word
from ._proto import lease_pb2, step_pb2
from .buffer import Access, Location, SharedBuffer
from .errors import (
    Cancelled,
    DeadlineExceeded,
    Error,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    of_code,
)
from .step import LayerResult, ListBuffer, Tensor

if TYPE_CHECKING:
    from ._lease import Lease
    from .cache import Cache

_MAX_ARMED = 2  # steps of a cache that the daemon lets be armed
_MAX_TIMEOUT = 60.0
_REASON_GRACE = 1.0  # seconds that a failed step waits for the daemon to say why


@dataclass(frozen=True)
class ArmedLayer:
    """Where one layer of an armed step has its tensors, in buffers of the session."""

    layer: int
    """The model's layer index."""
    query: Tensor
    """[B, Hq, k_dim] of the query dtype."""
    output: Tensor
    """[B, Hq, v_dim] of the output dtype, lent READ_WRITE."""
    lists: ListBuffer | None = None

    def proto(self, ready: Location, done: Location) -> step_pb2.ArmedLayer:
        """Return the message."""
        return step_pb2.ArmedLayer(
            layer=self.layer,
            ready=ready.proto(),
            done=done.proto(),
            query=self.query.proto(),
            output=self.output.proto(),
            lists=None if self.lists is None else self.lists.proto(),
        )


@dataclass(frozen=True)
class Arming:
    """How a step is armed. An engine uses the same for every step of a batch size."""

    layers: Sequence[ArmedLayer]
    """Those that the step runs, in order, each at most once."""
    wait_timeout: float = 5.0
    """Seconds that bound each wait for the other side, the daemon's and the engine's: more than a layer takes on
    either; at most 60."""
    results: bool = False
    """Ask for the layers' results, which :meth:`ArmedStep.results` returns."""

    def check(self) -> None:
        """Refuse what cannot be armed."""
        if not 0 < self.wait_timeout <= _MAX_TIMEOUT:
            raise OutOfRange(f"is {self.wait_timeout} s; at most {_MAX_TIMEOUT}", field="step.armed.wait_timeout_ms")
        if not self.layers:
            raise InvalidArgument("is empty; name the layers that the step runs", field="step.armed.layers")


class _Words:
    """A cache's: status, ready and done of each layer, then step."""

    def __init__(self, buffer: SharedBuffer, layers: int) -> None:
        self.buffer = buffer
        self.layers = layers
        memory = buffer.memory
        self._words = [Word(memory, i * WORD_BYTES) for i in range(2 + 2 * layers)]

    @property
    def status(self) -> Word:
        return self._words[0]

    @property
    def step(self) -> Word:
        return self._words[-1]

    def ready(self, i: int) -> Word:
        return self._words[1 + i]

    def done(self, i: int) -> Word:
        return self._words[1 + self.layers + i]

    def clear(self) -> None:
        for word in self._words[:-1]:
            word.store(0)

    def describe(self, message: step_pb2.Armed, layers: Sequence[ArmedLayer]) -> None:
        at = [self.buffer.at(i * WORD_BYTES) for i in range(len(self._words))]
        message.status.CopyFrom(at[0].proto())
        message.step.CopyFrom(at[-1].proto())
        message.layers.extend(layer.proto(at[1 + i], at[1 + self.layers + i]) for i, layer in enumerate(layers))


class ArmedStep:
    """A step that is armed. One thread at a time runs it; :meth:`cancel` and :meth:`results` any may call."""

    def __init__(self, cache: Cache, armer: Armer, lease: Lease, step_id: int, words: _Words, timeout: float) -> None:
        self.key = (cache.id, step_id)
        self.over = False
        """Whether all layers were waited for."""
        self.failure: Error | None = None
        """Why the step must not be used."""
        self.let_go = threading.Event()
        """Set once the daemon has let go of the step."""
        self._armer = armer
        self._lease = lease
        self._words = words
        self._timeout = timeout
        self._next = 0  # the layer to wait for
        self._begun = False
        self._waiting: Word | None = None
        self._results: list[LayerResult] = []

    def ready(self, i: int) -> None:
        """Tell the daemon that the query of layer ``i`` of Arming.layers, and its tokens' K and V, are in place.

        The first layer's begins the step, whose tables and lengths then hold.
        """
        if self._begin():  # else wait tells
            self._words.ready(i).ring(1)

    def wait(self, i: int) -> None:
        """Wait until the output of layer ``i`` is in place. Layers are waited for in order.

        An error says that the step failed and none of its outputs may be used: the engine attends by itself, and
        arms anew. It ends without the daemon's help: when the lease is lost, and at the latest after
        Arming.wait_timeout, by :class:`~twilight_client.errors.DeadlineExceeded`.
        """
        if i != self._next:
            self.fail(
                FailedPrecondition(f"layer {i} of the step is waited for, layer {self._next} is next"),
                tell=True,
            )
        rung = False
        if self._begin():
            self._waiting = word = self._words.done(i)
            rung = word.wait(1, self._timeout, lambda: self.failure is not None)
            self._waiting = None
        if self.failure is None:
            if not rung:
                self.fail(
                    DeadlineExceeded(f"layer {i} of the step was not done within {self._timeout} s"),
                    tell=True,
                )
            elif (status := self._words.status.load()) != 0:
                self.let_go.wait(_REASON_GRACE)  # the daemon's reason follows the word
                self.fail(of_code(status, "the step failed"), tell=True)
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        self._next += 1
        self.over = self._next == self._words.layers

    def cancel(self) -> None:
        """Give the step up, and with it what is armed behind it. It does not wait."""
        if not self.over:
            self.fail(Cancelled("the step was cancelled"), tell=True)

    def results(self, timeout: float | None = None) -> list[LayerResult]:
        """Wait until the daemon has let go of the step and return the layers' results, if Arming asked for them.

        They come without outputs and lists. An error is why the step failed. The engine need not wait for it to
        go on.
        """
        if not self.let_go.wait(timeout):
            raise DeadlineExceeded(f"the daemon has not let go of the step after {timeout} s")
        if self.failure is not None:
            raise self.failure.with_traceback(None)
        return self._results

    def end(self, layers: Iterable[step_pb2.LayerResult], error: Error | None) -> None:
        """Book that the daemon has let go of the step. It is called once."""
        self._results.extend(map(LayerResult.of, layers))
        if error is not None:
            self.fail(error, tell=False)
        self._armer.remove(self)
        self.let_go.set()

    def fail(self, error: Error, tell: bool) -> None:
        """Make sure that neither the step nor those behind it are used, and that nobody waits for them.

        If the daemon does not know, it is told.
        """
        for i, step in enumerate(self._armer.open_from(self)):
            if step.failure is not None:
                continue
            step.failure = error if i == 0 else type(error)(f"the step before it failed: {error}")
            if (word := step._waiting) is not None:
                word.stop()
            if tell:
                cache_id, step_id = step.key
                cancel = step_pb2.CancelStep(cache_id=cache_id, step_id=step_id)
                step._lease.post(lease_pb2.LeaseRequest(cancel_step=cancel))

    def _begin(self) -> bool:
        """Begin the step unless it has begun, and tell whether it may go on."""
        if self.failure is not None:
            return False
        if self._begun:
            return True
        if self._armer.runs_before(self):
            self.fail(
                FailedPrecondition("the step was begun before the one that was armed before it is over"),
                tell=True,
            )
            return False
        self._words.clear()
        self._words.step.ring(self.key[1] & 0xFFFFFFFF)
        self._begun = True
        return True


class Armer:
    """What a cache keeps from armed step to armed step. Whoever steps the cache has it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._buffer: SharedBuffer | None = None
        self._known: Sequence[ArmedLayer] | None = None  # what the daemon has, of the words in _buffer
        self._lock = threading.Lock()
        self._open: list[ArmedStep] = []  # those that the daemon has not let go of, in order

    def prepare(self, how: Arming, timeout: float | None) -> _Words:
        """Wait until another step can be armed, and return the words for it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                count = len(self._open)
                first = self._open[0] if count else None
            if first is None or (count < _MAX_ARMED and first.failure is None):
                break
            if not first.over and first.failure is None:
                raise FailedPrecondition(
                    f"{count} steps of the cache are armed; run the first before the next is armed",
                    field="step.armed",
                )
            if not first.let_go.wait(None if deadline is None else max(deadline - time.monotonic(), 0)):
                raise DeadlineExceeded(f"the daemon has not let go of the step before after {timeout} s")
        layers = len(how.layers)
        size = (2 + 2 * layers) * WORD_BYTES
        if self._buffer is None or self._buffer.size < size:
            self.close(timeout)
            self._buffer = self._cache.session.new_buffer(max(size, 4096), Access.READ_WRITE, timeout)
        return _Words(self._buffer, layers)

    def fill(self, message: step_pb2.Step, lease: Lease, how: Arming, words: _Words) -> ArmedStep:
        """Say in a step's message how it is armed: as before, if the daemon knows."""
        message.armed.wait_timeout_ms = int(how.wait_timeout * 1000)
        message.armed.layer_results = how.results
        if self._known == how.layers:
            message.armed.as_before = True
        else:
            words.describe(message.armed, how.layers)
        step = ArmedStep(self._cache, self, lease, message.step_id, words, how.wait_timeout)
        lease.expect(step)
        with self._lock:
            self._open.append(step)
        self._known = how.layers
        return step

    def refused(self, step: ArmedStep, error: Error) -> None:
        """Book that a step was not armed."""
        self._known = None
        if step._lease.forget(step):
            step.end((), error)

    def forget(self) -> None:
        """Forget what the daemon has: the lease is another."""
        self._known = None

    def close(self, timeout: float | None) -> None:
        """Take the words back."""
        self._known = None
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.close(timeout)

    def remove(self, step: ArmedStep) -> None:
        """Forget a step that the daemon has let go of."""
        with self._lock:
            if step in self._open:
                self._open.remove(step)

    def open_from(self, step: ArmedStep) -> list[ArmedStep]:
        """Return a step and those armed behind it."""
        with self._lock:
            return self._open[self._open.index(step) :] if step in self._open else [step]

    def runs_before(self, step: ArmedStep) -> bool:
        """Tell whether another step must be over before this one begins."""
        with self._lock:
            for other in self._open:
                if other is step:
                    return False
                if not other.over:
                    return True
        return False
