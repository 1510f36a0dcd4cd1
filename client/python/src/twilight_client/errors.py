"""Why a request failed.

Every error is an :class:`Error`; the subclass is its code. After a refusal by the daemon the session goes
on, and the daemon's state is as if the request had not been sent.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, empty_pb2, unknown_fields

from ._proto import error_pb2


class Error(Exception):
    """A failed request."""

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        requested: int = 0,
        available: int = 0,
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        """The value at fault and the remedy, one sentence."""
        self.field = field
        """Path of the field at fault within the request, as in ``step.lengths[3]``; empty if none is."""
        self.requested = requested
        """For :class:`ResourceExhausted`: how much was asked for, in the unit that the message names."""
        self.available = available
        """For :class:`ResourceExhausted`: how much there is."""
        self.__cause__ = cause


class InvalidArgument(Error):
    """A field has a value that no lease could accept."""


class NotFound(Error):
    """A buffer, cache, step or sequence that the lease does not have."""


class AlreadyExists(Error):
    """An id that is taken."""


class StaleGeneration(Error):
    """The memory was replaced by newer."""


class FailedPrecondition(Error):
    """Right, but not now."""


class OutOfRange(Error):
    """An offset, page, slot or position outside of what was registered."""


class Unsupported(Error):
    """The device does not declare this dtype, head size, method or kind."""


class ResourceExhausted(Error):
    """A limit; ``requested`` and ``available`` are set."""


class PermissionDenied(Error):
    """A write to memory lent read-only, or a lease of another peer."""


class DataLoss(Error):
    """The lent memory is gone or is not what the engine meant."""


class Draining(Error):
    """The daemon is draining, or still testing itself: it takes no new work."""


class Cancelled(Error):
    """Given up by the engine, or with an armed step before it."""


class DeadlineExceeded(Error, TimeoutError):
    """A bound on waiting ran out."""


class InternalError(Error):
    """A bug of ours; the message is for its report."""


class LeaseLost(Error):
    """The stream broke under the request, or is broken.

    The session opens a fresh lease by itself. Until it is live again, attend without Twilight; then start
    anew with a step.
    """


class Closed(Error):
    """The client, session, cache or buffer was closed."""


class Unreachable(Error, ConnectionError):
    """No daemon answers at the target."""


# Numbered as proto ErrorCode.
_BY_CODE: dict[int, type[Error]] = {
    1: InvalidArgument,
    2: NotFound,
    3: AlreadyExists,
    4: StaleGeneration,
    5: FailedPrecondition,
    6: OutOfRange,
    7: Unsupported,
    8: ResourceExhausted,
    9: PermissionDenied,
    10: DataLoss,
    11: Draining,
    12: Cancelled,
    13: DeadlineExceeded,
    14: InternalError,
}

_BY_STATUS: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def of_code(code: int, message: str) -> Error:
    """Make the error of a proto ErrorCode."""
    return _BY_CODE.get(code, InternalError)(message)


def code_of(error: Error) -> int:
    """Return the proto ErrorCode of an error; INTERNAL for those that no daemon answers."""
    return next((code for code, kind in _BY_CODE.items() if isinstance(error, kind)), 14)


def from_proto(e: error_pb2.Error) -> Error:
    """Make an error of the daemon's answer."""
    return _BY_CODE.get(e.code, InternalError)(e.message, field=e.field, requested=e.requested, available=e.available)


def from_rpc(e: grpc.RpcError) -> Error:
    """Make an error of a failed call: of the twilight.v1.Error in its details, if it has one."""
    if not isinstance(e, grpc.Call):
        return InternalError(str(e), cause=e)
    metadata: Any = e.trailing_metadata() or ()
    for key, value in metadata:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in _details(value):
                answer = error_pb2.Error()
                if detail.Unpack(answer):
                    return from_proto(answer)
    kind = _BY_STATUS.get(e.code(), InternalError)
    return kind(e.details() or str(e.code()), cause=e)


def _details(status: bytes) -> list[any_pb2.Any]:
    """Read google.rpc.Status.details, field 3, without that message's package."""
    fields = unknown_fields.UnknownFieldSet(empty_pb2.Empty.FromString(status))
    return [any_pb2.Any.FromString(f.data) for f in fields if f.field_number == 3]
