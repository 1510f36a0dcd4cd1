"""The shape of the attention that a session serves, and its element types."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ._proto import memory_pb2, twilight_pb2


class DType(enum.IntEnum):
    """An element type."""

    F32 = memory_pb2.DATA_TYPE_F32
    F16 = memory_pb2.DATA_TYPE_F16
    BF16 = memory_pb2.DATA_TYPE_BF16
    F8_E4M3 = memory_pb2.DATA_TYPE_F8_E4M3
    """Finite only: 0x7f and 0xff are NaN."""

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return {DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.F8_E4M3: 1}[self]

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype; for BF16 and F8_E4M3, which numpy lacks, that of their bits."""
        return np.dtype({DType.F32: "<f4", DType.F16: "<f2", DType.BF16: "<u2", DType.F8_E4M3: "u1"}[self])


@dataclass(frozen=True)
class Geometry:
    """The shape of the model's attention.

    An engine with several kinds of attention layers opens a session for each.
    """

    layers: int
    """Layers in the session's caches, not necessarily all of the model's."""
    query_heads: int
    """Hq, a multiple of ``kv_heads``."""
    kv_heads: int
    """Hkv."""
    k_dim: int
    """Elements of a key or query head."""
    v_dim: int = 0
    """Elements of a value or output head; 0 means ``k_dim``."""
    scale: float = 0.0
    """Logits are scale * (q . k); 0 means 1/sqrt(k_dim)."""
    softcap: float = 0.0
    """If > 0, logits become softcap * tanh(logit / softcap)."""
    sinks: Sequence[float] = ()
    """Empty, or a logit per query head that joins the softmax's denominator and carries no value."""
    query: DType = DType.F32
    query_scale: float = 1.0
    """Real query = stored * query_scale; values other than 1 need an F8_E4M3 query."""
    output: DType | None = None
    """None means ``query``."""

    def filled(self) -> Geometry:
        """Return the geometry with its defaults filled in."""
        return replace(
            self,
            v_dim=self.v_dim or self.k_dim,
            scale=self.scale or (1 / math.sqrt(self.k_dim) if self.k_dim > 0 else 0.0),
            output=self.query if self.output is None else self.output,
        )

    def proto(self) -> twilight_pb2.Geometry:
        """Return the message."""
        g = self.filled()
        return twilight_pb2.Geometry(
            num_layers=g.layers,
            query_heads=g.query_heads,
            kv_heads=g.kv_heads,
            k_dim=g.k_dim,
            v_dim=g.v_dim,
            softmax_scale=g.scale,
            logit_softcap=g.softcap,
            sinks=g.sinks,
            query_dtype=int(g.query),  # type: ignore[arg-type]
            query_scale=g.query_scale,
            output_dtype=int(g.output or g.query),  # type: ignore[arg-type]
        )
