"""Armed steps: the layers of a step meet the daemon at words in lent memory, without messages.

On a CPU the thread that runs the step rings and waits, on a GPU a stream does (:mod:`twilight_client.cuda`).
proto/twilight/v1/ARMED.md is the protocol.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
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
    code_of,
    of_code,
)
from .step import LayerResult, ListBuffer, Tensor

if TYPE_CHECKING:
    from ._lease import Lease
    from .cache import Cache
    from .cuda import Mapped, StepGraph

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
    stream: bool = False
    """Ring and wait in torch's current CUDA stream; see :mod:`twilight_client.cuda`."""
    graph: StepGraph | None = None
    """The graph that the step is replayed by, which arms it."""

    def check(self) -> None:
        """Refuse what cannot be armed."""
        if not 0 < self.wait_timeout <= _MAX_TIMEOUT:
            raise OutOfRange(f"is {self.wait_timeout} s; at most {_MAX_TIMEOUT}", field="step.armed.wait_timeout_ms")
        if not self.layers:
            raise InvalidArgument("is empty; name the layers that the step runs", field="step.armed.layers")


class Words:
    """A cache's: status, ready and done of each layer, then step; and a word of the engine's own."""

    def __init__(self, buffer: SharedBuffer, layers: int) -> None:
        self.buffer = buffer
        self.layers = layers
        self.spare = 2 + 2 * layers
        memory = buffer.memory
        self._words = [Word(memory, i * WORD_BYTES) for i in range(self.spare + 1)]

    @staticmethod
    def size(layers: int) -> int:
        """Bytes that the words of so many layers take."""
        return (3 + 2 * layers) * WORD_BYTES

    @property
    def status(self) -> Word:
        """0 while all is well, else an ErrorCode."""
        return self._words[0]

    @property
    def taken(self) -> Word:
        """The status as the engine took it."""
        return self._words[self.spare]

    def done(self, i: int) -> Word:
        """1 once the output of layer ``i`` is in place."""
        return self._words[1 + self.layers + i]

    def begin(self, step_id: int) -> None:
        """Zero all words, then ring the step's."""
        for word in self._words[: 1 + 2 * self.layers]:
            word.store(0)
        self._words[1 + 2 * self.layers].ring(step_id)

    def ring(self, i: int) -> None:
        """Ring for layer ``i``."""
        self._words[1 + i].ring(1)

    def wait(self, i: int, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Wait until layer ``i`` is done; False if time passed or ``stopped`` said so."""
        if not self.done(i).wait(1, timeout, stopped):
            return False
        self.taken.store(self.status.load())
        return True

    captured = False
    """Whether rings and waits are in a graph."""

    def failed(self) -> int:
        """Return the status that was last taken."""
        return self.taken.load()

    def end(self) -> None:
        """Say that the engine goes no further in the step."""

    def settle(self, timeout: float, stopped: Callable[[], bool]) -> bool:
        """Wait until the engine is through the step."""
        return True

    def release(self, code: int) -> threading.Thread | None:
        """End the engine's waits."""
        for i in range(self.layers):
            self.done(i).stop()
        return None

    def describe(self, message: step_pb2.Armed, layers: Sequence[ArmedLayer]) -> None:
        """Say in a message where the words lie."""
        at = [self.buffer.at(i * WORD_BYTES) for i in range(self.spare)]
        message.status.CopyFrom(at[0].proto())
        message.step.CopyFrom(at[-1].proto())
        message.layers.extend(layer.proto(at[1 + i], at[1 + self.layers + i]) for i, layer in enumerate(layers))


class ArmedStep:
    """A step that is armed. One thread at a time runs it; :meth:`cancel` and :meth:`results` any may call."""

    def __init__(self, cache: Cache, armer: Armer, lease: Lease, step_id: int, words: Words, timeout: float) -> None:
        self.key = (cache.id, step_id)
        self.over = False
        """Whether all layers were waited for."""
        self.failure: Error | None = None
        """Why the step must not be used."""
        self.let_go = threading.Event()
        """Set once the daemon has let go of the step."""
        self.lease = lease
        self._armer = armer
        self._words = words
        self._timeout = timeout
        self._next = 0  # the layer to wait for
        self._begun = False
        self._results: list[LayerResult] = []

    def begin(self) -> None:
        """Begin the step, whose tables and lengths then hold; the first layer's :meth:`ready` does it, too.

        The step armed before it must be over.
        """
        if self._begin() and self._words.captured:  # the layers' rings and waits are the graph's
            self.over = True

    def ready(self, i: int) -> None:
        """Tell the daemon that the query of layer ``i`` of Arming.layers, and its tokens' K and V, are in place."""
        if self._begin():  # else wait tells
            self._words.ring(i)

    def wait(self, i: int) -> None:
        """Wait until the output of layer ``i`` is in place. Layers are waited for in order.

        An error says that the step failed and none of its outputs may be used: the engine attends by itself, and
        arms anew. It ends without the daemon's help: when the lease is lost, and at the latest after
        Arming.wait_timeout, by :class:`~twilight_client.errors.DeadlineExceeded`.

        With Arming.stream the stream waits, this call does not: :meth:`finish` tells whether the step may be used.
        """
        if i != self._next:
            self.fail(FailedPrecondition(f"layer {i} of the step is waited for, layer {self._next} is next"), tell=True)
        if self._begin() and not self._words.wait(i, self._timeout, self._stopped):
            self._late(f"layer {i} of the step was")
        self._check()
        self._next += 1
        if self._next == self._words.layers:
            self.over = True
            self._words.end()

    def finish(self) -> None:
        """Wait until the engine is through the step and raise if it failed.

        With Arming.stream, before its outputs are used or anything else waits for the stream; it ends at the latest
        after Arming.wait_timeout, or some longer where the stream has other work.
        """
        if not self._words.settle(self._timeout, self._stopped):
            self._late("the step was")
        self._check()

    def cancel(self) -> None:
        """Give the step up, and with it what is armed behind it. It does not wait.

        With Arming.stream, the thread that runs a step which has begun then calls :meth:`finish`, which raises: only it
        knows that nothing more is given to the stream.
        """
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
            if step._begun:
                self._armer.release(step._words, code_of(error))
            if tell:
                cache_id, step_id = step.key
                cancel = step_pb2.CancelStep(cache_id=cache_id, step_id=step_id)
                step.lease.post(lease_pb2.LeaseRequest(cancel_step=cancel))

    def _stopped(self) -> bool:
        return self.failure is not None

    def _late(self, what: str) -> None:
        if self.failure is None:
            self.fail(DeadlineExceeded(f"{what} not done within {self._timeout} s"), tell=True)

    def _check(self) -> None:
        """Raise if the step failed."""
        if self.failure is None and (status := self._words.failed()) != 0:
            self.let_go.wait(_REASON_GRACE)  # the daemon's reason follows the word
            self.fail(of_code(status, "the step failed"), tell=True)
        if self.failure is not None:
            self._words.end()
            raise self.failure.with_traceback(None)

    def _begin(self) -> bool:
        """Begin the step unless it has begun, and tell whether it may go on."""
        if self.failure is not None:
            return False
        if self._begun:
            return True
        if self._armer.runs_before(self):
            self.fail(
                FailedPrecondition("the step was begun before the one that was armed before it is over"), tell=True
            )
            return False
        self._words.taken.store(0)
        self._words.begin(self.key[1] & 0xFFFFFFFF)
        self._begun = True
        failure = self.failure
        if failure is not None:  # meanwhile, by who may not have seen that it began
            self._armer.release(self._words, code_of(failure))
        return failure is None


class Armer:
    """What a cache keeps from armed step to armed step. Whoever steps the cache has it."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._buffer: SharedBuffer | None = None
        self._mapped: Mapped | None = None  # for the GPU
        self._known: Sequence[ArmedLayer] | None = None  # what the daemon has, of the words in _buffer
        self._lock = threading.Lock()
        self._open: list[ArmedStep] = []  # those that the daemon has not let go of, in order
        self._releases: list[threading.Thread] = []  # that end the waits of failed steps

    def prepare(self, how: Arming, timeout: float | None) -> Words:
        """Wait until another step can be armed, and return the words for it."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if deadline is None else max(deadline - time.monotonic(), 0)

        late = f"what was armed before is not over after {timeout} s"
        while True:
            with self._lock:
                count = len(self._open)
                first = self._open[0] if count else None
            if first is None or (count < _MAX_ARMED and first.failure is None):
                break
            if not first.over and first.failure is None:
                raise FailedPrecondition(
                    f"{count} steps of the cache are armed; run the first before the next is armed", field="step.armed"
                )
            if not first.let_go.wait(left()):
                raise DeadlineExceeded(late)
        with self._lock:
            releases, self._releases = self._releases, []
        for thread in releases:
            thread.join(left())
            if thread.is_alive():
                with self._lock:
                    self._releases.append(thread)
                raise DeadlineExceeded(late)
        return self.words(how, timeout)

    def words(self, how: Arming, timeout: float | None) -> Words:
        """Return the cache's words, made when first needed and when more are."""
        layers = len(how.layers)
        size = Words.size(layers)
        if self._buffer is None or self._buffer.size < size:
            self.close(timeout)
            self._buffer = self._cache.session.new_buffer(max(size, 4096), Access.READ_WRITE, timeout)
        if not how.stream:
            return Words(self._buffer, layers)
        from .cuda import Mapped, StreamWords

        if self._mapped is None:
            self._mapped = Mapped(self._buffer)
        return StreamWords(self._mapped, layers, how.graph)

    def fill(self, message: step_pb2.Step, lease: Lease, how: Arming, words: Words) -> ArmedStep:
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
        if step.lease.forget(step):
            step.end((), error)

    def release(self, words: Words, code: int) -> None:
        """End the engine's waits of a step that failed."""
        thread = words.release(code)
        if thread is not None:
            with self._lock:
                self._releases.append(thread)

    def forget(self) -> None:
        """Forget what the daemon has: the lease is another."""
        self._known = None

    def close(self, timeout: float | None) -> None:
        """Take the words back."""
        self._known = None
        buffer, self._buffer = self._buffer, None
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()
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
