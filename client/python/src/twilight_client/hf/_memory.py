"""Keys and values of a model in memory that is lent once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._arrays import torch_dtype
from ..armed import ArmedLayer, Arming
from ..buffer import Access, Buffer
from ..session import Session
from ..step import Tensor

PAGE = 16  # tokens: a chunk of the daemon's shadow


@dataclass(frozen=True)
class Lent:
    """Memory on the model's device that the daemon sees."""

    buffer: Buffer
    bytes: torch.Tensor
    """uint8 [size]."""

    @classmethod
    def make(cls, session: Session, size: int, access: Access, device: torch.device) -> Lent:
        """Make and lend memory."""
        if device.type == "cpu":
            shared = session.new_buffer(size, access)
            return cls(shared, shared.tensor(torch.uint8))
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        return cls(session.share_tensor(own, access), own)


class Slab:
    """Pages of all layers, registered as one cache, and the queries and outputs of decode steps.

    Tokens lie one behind another, so that a sequence whose pages do is also a plain tensor to the model.
    """

    def __init__(self, session: Session, layers: Sequence[int], pages: int, device: torch.device) -> None:
        g = session.geometry
        self._session = session
        self._layers = layers
        self.device = device
        self.pages = pages
        dtype = torch_dtype(g.query)
        tokens = pages * PAGE
        self._memory = Lent.make(
            session, len(layers) * 2 * tokens * g.kv_heads * g.k_dim * dtype.itemsize, Access.READ_ONLY, device
        )
        self._kv = self._memory.bytes.view(dtype).view(len(layers), 2, tokens, g.kv_heads, g.k_dim)
        paged = self._kv.view(len(layers), 2, pages, PAGE, g.kv_heads, g.k_dim).transpose(3, 4)
        try:
            self.cache = session.register_tensors(list(paged[:, 0]), list(paged[:, 1]), layers=layers)
        except BaseException:
            self._memory.buffer.close()
            raise
        self._io: tuple[Lent, Lent] | None = None
        self.queries = self.outputs = torch.empty(0)
        self.arming: Arming | None = None
        self.started: set[int] = set()
        """Sequences that the daemon was told of."""
        self.ended: list[int] = []
        """Those of them that are over, which the next step tells."""

    def rows(self, slot: int, batch: int, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a layer's first rows of ``pages`` each: [batch, kv_heads, tokens, dim]."""
        _, _, _, heads, dim = self._kv.shape
        both = self._kv[slot, :, : batch * pages * PAGE].view(2, batch, pages * PAGE, heads, dim).transpose(2, 3)
        return both[0], both[1]

    def prepare(self, batch: int) -> None:
        """Make ``queries`` and ``outputs``, [batch, query_heads, dim], and how steps of that batch are armed."""
        if self.queries.shape[0] == batch:
            return
        g = self._session.geometry
        dtype = torch_dtype(g.query)
        size = batch * g.query_heads * g.k_dim * dtype.itemsize
        if self._io is None or self._io[0].buffer.size < size:
            self._close_io()
            self._io = (
                Lent.make(self._session, size, Access.READ_ONLY, self.device),
                Lent.make(self._session, size, Access.READ_WRITE, self.device),
            )
        self.queries, self.outputs = (
            lent.bytes[:size].view(dtype).view(batch, g.query_heads, g.k_dim) for lent in self._io
        )
        query, output = Tensor.of(self._session, self.queries), Tensor.of(self._session, self.outputs)
        self.arming = Arming(
            [ArmedLayer(layer, query, output) for layer in self._layers],
            wait_timeout=30.0,
            results=True,
            stream=self.device.type == "cuda",
        )

    def close(self) -> None:
        """Take everything back."""
        self.cache.close()
        self._memory.buffer.close()
        self._close_io()

    def _close_io(self) -> None:
        for lent in self._io or ():
            lent.buffer.close()
        self._io = None
