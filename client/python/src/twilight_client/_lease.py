"""One stream and what OpenLease said of it. It lives until the stream breaks, once."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

import grpc

from ._proto import lease_pb2, step_pb2, twilight_pb2
from .errors import (
    Closed,
    DeadlineExceeded,
    Draining,
    Error,
    LeaseLost,
    NotFound,
    ResourceExhausted,
    from_proto,
    from_rpc,
)

if TYPE_CHECKING:
    from .armed import ArmedStep
    from .session import Client

_SERVICE = "/twilight.v1.TwilightService/"
_TOKEN_KEY = "twilight-lease-bin"  # noqa: S105 - the metadata key of a token
_CLOSE_GRACE = 10.0  # seconds that a closed lease waits for the daemon to release what it lent

Settle = Callable[[Error | None], None]


class Lease:
    """A live stream. Its methods may be called by any thread."""

    def __init__(self, client: Client, request: twilight_pb2.OpenLeaseRequest, timeout: float | None) -> None:
        open_lease = client.channel.unary_unary(
            _SERVICE + "OpenLease",
            request_serializer=twilight_pb2.OpenLeaseRequest.SerializeToString,
            response_deserializer=twilight_pb2.OpenLeaseResponse.FromString,
        )
        try:
            self.opened: twilight_pb2.OpenLeaseResponse = open_lease(request, timeout=timeout)
        except grpc.RpcError as e:
            raise from_rpc(e) from e
        self._own_channel: grpc.Channel | None = None
        channel, target = client.channel, client.target
        if self.opened.endpoint:
            target = self.opened.endpoint
            channel = self._own_channel = client.connect(target)
        self.fd_path = _beside(target, self.opened.fd_endpoint)
        self.done = threading.Event()
        self.error: Error = LeaseLost("the lease is live")
        self.draining: Draining | None = None
        self._watcher: threading.Event | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._last_id = 0
        self._calls: dict[int, tuple[Future[lease_pb2.LeaseResponse], Settle | None]] | None = {}
        self._armed: dict[tuple[int, int], ArmedStep] = {}
        self._outbox: queue.SimpleQueue[lease_pb2.LeaseRequest | None] = queue.SimpleQueue()
        stream = channel.stream_stream(
            _SERVICE + "Lease",
            request_serializer=lease_pb2.LeaseRequest.SerializeToString,
            response_deserializer=lease_pb2.LeaseResponse.FromString,
        )
        self._stream = stream(iter(self._outbox.get, None), metadata=((_TOKEN_KEY, self.opened.token),))
        self._receiver = threading.Thread(
            target=self._receive, args=(self._stream,), name="twilight-lease", daemon=True
        )
        self._receiver.start()

    def watch(self, watcher: threading.Event) -> None:
        """Set ``watcher`` whenever ``done`` or ``draining`` changes, and now."""
        self._watcher = watcher
        watcher.set()

    def start(self, request: lease_pb2.LeaseRequest, settle: Settle | None = None) -> Future[lease_pb2.LeaseResponse]:
        """Send a request, whose id it sets.

        ``settle``, if given, sees the outcome (None or an error) before anybody who waits, and also if nobody
        does. An exception means that nothing was sent and ``settle`` is never called.
        """
        most = self.opened.limits.max_message_bytes
        size = request.ByteSize()
        if 0 < most < size:
            raise ResourceExhausted(
                f"the request takes {size} bytes of at most {most}; split the batch, or lend its tensors in a buffer",
                requested=size,
                available=most,
            )
        future: Future[lease_pb2.LeaseResponse] = Future()
        with self._lock:
            if self._calls is None:
                raise self.error.with_traceback(None)
            self._last_id += 1
            request.request_id = self._last_id
            self._calls[self._last_id] = future, settle
            self._outbox.put(request)
        return future

    def call(
        self,
        request: lease_pb2.LeaseRequest,
        timeout: float | None = None,
        undo: lease_pb2.LeaseRequest | None = None,
    ) -> lease_pb2.LeaseResponse:
        """Send a request and wait for its answer. If it does not come in time, ``undo`` takes it back."""
        future = self.start(request)
        try:
            return wait(future, timeout)
        except DeadlineExceeded:
            if undo is not None:
                self.post(undo)
            raise

    def post(self, request: lease_pb2.LeaseRequest) -> None:
        """Send a request whose answer nobody waits for."""
        with self._lock:
            if self._calls is not None:
                self._last_id += 1
                request.request_id = self._last_id
                self._outbox.put(request)

    def give_back(self, release: lease_pb2.LeaseRequest, timeout: float | None) -> None:
        """Send a release, which may have been sent before by a call that was given up."""
        with contextlib.suppress(LeaseLost, NotFound):
            self.call(release, timeout)

    def expect(self, step: ArmedStep) -> None:
        """Tell an armed step of its end, from now on."""
        with self._lock:
            if self._calls is None:
                raise self.error.with_traceback(None)
            self._armed[step.key] = step

    def forget(self, step: ArmedStep) -> bool:
        """Tell an armed step nothing any more, and return whether it had not been told."""
        with self._lock:
            return self._armed.pop(step.key, None) is not None

    def close(self) -> None:
        """End the lease. The daemon has then let go of all that was lent on it, unless that took too long."""
        with self._lock:
            self._closed = True
        self._outbox.put(None)
        self.done.wait(_CLOSE_GRACE)
        self.release()
        self.done.wait()
        self._receiver.join()

    def release(self) -> None:
        """Break the stream."""
        self._stream.cancel()

    def _receive(self, answers: Iterator[lease_pb2.LeaseResponse]) -> None:
        cause: BaseException | str = "the daemon ended it"
        try:
            for answer in answers:
                self._take(answer)
        except grpc.RpcError as e:
            cause = from_rpc(e)
        except Exception as e:  # a bug of ours must not leave callers waiting
            cause = e
        self._fail(cause)

    def _take(self, answer: lease_pb2.LeaseResponse) -> None:
        kind = answer.WhichOneof("response")
        if kind == "draining":
            self.draining = Draining(
                f"the daemon is draining ({answer.draining.reason}) and ends the lease within "
                f"{answer.draining.grace_ms} ms"
            )
            self._notify()
            return
        if kind == "armed_step_done":
            self._armed_done(answer.armed_step_done)
            return
        with self._lock:
            call = self._calls.pop(answer.request_id, None) if self._calls is not None else None
        if call is not None:
            _settle(*call, from_proto(answer.error) if kind == "error" else answer)

    def _armed_done(self, done: step_pb2.ArmedStepDone) -> None:
        with self._lock:
            step = self._armed.pop((done.cache_id, done.step_id), None)
        if step is not None:
            step.end(done.layers, from_proto(done.error) if done.HasField("error") else None)

    def _fail(self, cause: BaseException | str) -> None:
        with self._lock:
            if self._closed:
                self.error = Closed("the session is closed")
            else:
                self.error = lease_lost(cause)
            calls, self._calls = self._calls or {}, None
            armed, self._armed = self._armed, {}
        self._outbox.put(None)  # ends the thread that sends
        if self._own_channel is not None:
            self._own_channel.close()
        for step in armed.values():
            step.end((), self.error)
        for call in calls.values():
            _settle(*call, self.error)
        self.done.set()
        self._notify()

    def _notify(self) -> None:
        if self._watcher is not None:
            self._watcher.set()


def _settle(
    future: Future[lease_pb2.LeaseResponse], settle: Settle | None, outcome: lease_pb2.LeaseResponse | Error
) -> None:
    failed = isinstance(outcome, Error)
    if settle is not None:
        settle(outcome if failed else None)
    if failed:
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def lease_lost(cause: BaseException | str) -> LeaseLost:
    """Make the error of a stream that broke."""
    return LeaseLost(
        f"the lease's stream broke ({cause}); start anew with a step once the session is live",
        cause=cause if isinstance(cause, BaseException) else None,
    )


def wait(future: Future[lease_pb2.LeaseResponse], timeout: float | None) -> lease_pb2.LeaseResponse:
    """Return the outcome of a request."""
    try:
        return future.result(timeout)
    except FutureTimeoutError as e:
        if isinstance(e, Error):  # the daemon's own
            raise
        raise DeadlineExceeded(f"the daemon did not answer within {timeout} s") from None


def _beside(target: str, named: str) -> str:
    """Find the socket that the daemon names.

    A daemon in another container may know its folder by another path; then the socket of that name beside the
    one that was dialled is meant.
    """
    if not target.startswith("unix:") or not named:
        return named
    dialled = target.removeprefix("unix:").removeprefix("//")
    path = os.path.join(os.path.dirname(dialled), os.path.basename(named))
    return path if os.path.exists(path) else named
