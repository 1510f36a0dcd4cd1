"""Python SDK of Twilight: lends an engine's KV cache to twilightd and runs decode attention there.

A small engine::

    import twilight_client as tw

    with tw.dial("unix:///run/twilight/twilightd.sock") as client, client.open(geometry, config) as session:
        # Lend memory: made here, by its descriptor, or a torch tensor on a GPU.
        kv = session.new_buffer(nbytes, tw.Access.READ_ONLY)
        keys = kv.numpy(np.float32, (layers, pages, kv_heads, 16, dim))
        ...
        cache = session.register_tensors(list(keys), list(values))

        while decoding:
            # One step, then each layer once the token's K and V are in place.
            step = cache.step(tw.Batch([tw.Sequence(id=1, length=n, table=pages)], ended=finished))
            for layer in range(layers):
                result = step.layer(layer, query)  # result.output, and what each head kept

Or :meth:`Cache.arm` arms all layers of a step by one message: they then meet the daemon at words in shared memory,
a ring and a wait a layer, without messages.

A refused request raises an :class:`Error` that names the field, the value and the remedy; it changes nothing, and the
session goes on. When the stream breaks, because the daemon was restarted say, calls in flight raise
:class:`LeaseLost`. The engine attends by itself meanwhile; the session opens a fresh lease, with growing pauses, and
lends and registers everything again. The engine then goes on with a step as if nothing had happened.

:mod:`twilight_client.hf` does all this for models of Hugging Face's transformers.
"""

from .armed import ArmedLayer, ArmedStep, Arming
from .buffer import Access, Buffer, FileBuffer, Location, Probe, SharedBuffer
from .cache import Cache, CacheLayer, CacheSpec, ShadowSize, Strides
from .daemon import Daemon
from .errors import (
    AlreadyExists,
    Cancelled,
    Closed,
    DataLoss,
    DeadlineExceeded,
    Draining,
    Error,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    LeaseLost,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    StaleGeneration,
    Unreachable,
    Unsupported,
)
from .geometry import DType, Geometry
from .session import Client, Session, State, dial
from .step import (
    PATH_DENSE,
    PATH_SPARSE,
    PATH_VOID,
    Batch,
    IndexStats,
    LayerResult,
    ListBuffer,
    Observation,
    Sequence,
    Step,
    Tensor,
    Timing,
    Trace,
)

__all__ = [
    "PATH_DENSE",
    "PATH_SPARSE",
    "PATH_VOID",
    "Access",
    "AlreadyExists",
    "ArmedLayer",
    "ArmedStep",
    "Arming",
    "Batch",
    "Buffer",
    "Cache",
    "CacheLayer",
    "CacheSpec",
    "Cancelled",
    "Client",
    "Closed",
    "DType",
    "Daemon",
    "DataLoss",
    "DeadlineExceeded",
    "Draining",
    "Error",
    "FailedPrecondition",
    "FileBuffer",
    "Geometry",
    "IndexStats",
    "InternalError",
    "InvalidArgument",
    "LayerResult",
    "LeaseLost",
    "ListBuffer",
    "Location",
    "NotFound",
    "Observation",
    "OutOfRange",
    "PermissionDenied",
    "Probe",
    "ResourceExhausted",
    "Sequence",
    "Session",
    "ShadowSize",
    "SharedBuffer",
    "StaleGeneration",
    "State",
    "Step",
    "Strides",
    "Tensor",
    "Timing",
    "Trace",
    "Unreachable",
    "Unsupported",
    "dial",
]
