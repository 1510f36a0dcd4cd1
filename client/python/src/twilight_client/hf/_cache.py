"""A cache for transformers whose decode steps go through the daemon."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..armed import ArmedStep
from ..errors import Cancelled, DeadlineExceeded, Draining, Error, LeaseLost, Unsupported
from ..step import Batch, LayerResult, Observation, Sequence, Step, Trace
from ._memory import PAGE, Slab
from .budgets import Recorder

if TYPE_CHECKING:
    from ._model import Twilight

_TIMEOUT = 60.0  # seconds for the daemon to answer

NO_BEAMS = (
    "the daemon knows rows by their place, and beam search moves them; use num_beams=1, or twilight_client.hf.disable"
)

AWAY = (LeaseLost, Draining, DeadlineExceeded, Cancelled)
"""Errors that say nothing against the request: the daemon is away, or gave up."""


class SidecarCache(Cache):
    """Keys and values of a batch, in lent memory where the daemon serves a layer.

    The first update tells the batch. It holds its memory until :meth:`release`, or its end.
    """

    def __init__(self, twilight: Twilight, layers: list[Any], max_length: int) -> None:
        served = {layer: slot for slot, layer in enumerate(twilight.layers)}
        super().__init__(
            layers=[SidecarLayer(self, served[i]) if i in served else layer for i, layer in enumerate(layers)]
        )
        self.twilight = twilight
        self._max_length = max_length
        self._batch = 0
        self._pages = 0  # of a row
        self._slab: Slab | None = None
        self._finalizer: weakref.finalize | None = None
        self._ids: list[int] = []
        self._first: list[int] = []
        self._truncate_to: int | None = None
        self._step: Step | ArmedStep | None = None
        self._length = -1  # of the current step
        self._results: list[LayerResult] = []
        self.recorder = Recorder(twilight.layers, twilight.session.geometry.query_heads)

    def rows(self, slot: int, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for ``length`` tokens of a layer: keys and values, [batch, kv_heads, tokens, dim]."""
        if self._slab is None:
            self._batch = batch
            self._take(max(length, self._max_length))
        elif batch != self._batch:
            raise Unsupported(f"the batch changed from {self._batch} to {batch} sequences; use a cache for each")
        elif length > self._pages * PAGE:
            self._grow(2 * length)
        assert self._slab is not None  # noqa: S101 - just taken
        return self._slab.rows(slot, batch, self._pages)

    def attend(self, layer: SidecarLayer, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Attend from one position of each row, [B, Hq, 1, dim], to all; None leaves it to the model.

        Returns [B, 1, Hq, dim].
        """
        output = None
        try:
            if self._length != layer.length and not self.twilight.alone:
                self._begin(layer.length, mask)
            if self._step is not None:
                with self._on_device():
                    output = self._run(self._step, layer.slot, query)
                self.twilight.present()
        except AWAY as e:
            self._step = None
            self.twilight.away(e)
        self.twilight.fallbacks += output is None
        return output

    def settled(self) -> bool:
        """Wait until the forward's step is over, where a stream runs it; False if its outputs must not be used."""
        step = self._step
        if isinstance(step, ArmedStep) and step.over:
            try:
                with self._on_device():
                    step.finish()
            except AWAY as e:
                self._step = None
                self.twilight.away(e)
                return False
        return True

    def roll_back(self, length: int) -> None:
        """Book that tokens from ``length`` on are gone."""
        self.flush()
        if self._slab is not None and self._slab.started.issuperset(self._ids):
            self._truncate_to = length if self._truncate_to is None else min(length, self._truncate_to)

    def release(self) -> None:
        """Give the memory back. What the cache held is gone."""
        self.flush()
        for layer in self.layers:
            if isinstance(layer, SidecarLayer):
                layer.forget()
        if self._finalizer is not None:
            self._finalizer()
        self._slab = self._finalizer = None

    def _take(self, length: int) -> None:
        self._pages = -(-length // PAGE)
        self._slab = slab = self.twilight.take(self._batch * self._pages)
        self._ids = [self.twilight.new_id() for _ in range(self._batch)]
        self._finalizer = weakref.finalize(self, self.twilight.give_back, slab, self._ids)
        self._truncate_to = None

    def _grow(self, length: int) -> None:
        """Move to larger memory, where the sequences start anew."""
        self.flush()
        old, pages, give_back = self._slab, self._pages, self._finalizer
        self._take(length)
        for layer in self.layers:
            if isinstance(layer, SidecarLayer) and layer.length > 0 and old is not None and self._slab is not None:
                moved = self._slab.rows(layer.slot, self._batch, self._pages)
                for new, was in zip(moved, old.rows(layer.slot, self._batch, pages), strict=True):
                    new[:, :, : layer.length] = was[:, :, : layer.length]
                layer.show(moved, layer.length)
        if give_back is not None:
            give_back()

    def _begin(self, length: int, mask: torch.Tensor | None) -> None:
        """Start the step in which each row has ``length`` tokens; without one, the model attends by itself."""
        self.flush()
        twilight, slab = self.twilight, self._slab
        assert slab is not None  # noqa: S101 - a layer was updated
        self._length, self._step = length, None
        first = _first_valid(mask, self._batch, length)
        if first is None:
            twilight.leave("the attention mask is not one of left padding alone; pad on the left")
            return
        self._first = first
        slab.prepare(self._batch)
        if all(layer.prefill is not None for layer in self._served()):
            step = slab.cache.step(self._rows(length - 1), _TIMEOUT)
            self._accepted()
            for layer in self._served():
                seen, layer.prefill = layer.prefill, None
                if seen is not None:
                    step.layer(
                        twilight.layers[layer.slot], observation=Observation(seen.queries, seen.mass), timeout=_TIMEOUT
                    )
        batch = self._rows(length)
        if twilight.armed and slab.arming is not None:
            self._step = slab.cache.arm(batch, slab.arming, _TIMEOUT)
        else:
            self._step = slab.cache.step(batch, _TIMEOUT)
        self._accepted()

    def _run(self, step: Step | ArmedStep, slot: int, query: torch.Tensor) -> torch.Tensor:
        slab = self._slab
        assert slab is not None  # noqa: S101 - a step began
        slab.queries.copy_(query[:, :, 0])
        if isinstance(step, ArmedStep):
            step.ready(slot)
            step.wait(slot)
        else:
            layer = self.twilight.layers[slot]
            self._results.append(step.layer(layer, slab.queries, output=slab.outputs, timeout=_TIMEOUT))
        return slab.outputs.clone().unsqueeze(1)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the model's GPU torch's current one: armed steps ring and wait in its stream."""
        slab = self._slab
        assert slab is not None  # noqa: S101 - a step began
        return torch.cuda.device(slab.device) if slab.device.type == "cuda" else contextlib.nullcontext()

    def _rows(self, length: int) -> Batch:
        slab = self._slab
        assert slab is not None  # noqa: S101 - a layer was updated
        pages = -(-length // PAGE)
        return Batch(
            [
                Sequence(
                    name,
                    length,
                    np.arange(i * self._pages, i * self._pages + pages),
                    first=self._first[i],
                    truncate_to=self._truncate_to,
                )
                for i, name in enumerate(self._ids)
            ],
            ended=slab.ended,
            trace=Trace.current(),
        )

    def _accepted(self) -> None:
        assert self._slab is not None  # noqa: S101 - a step was accepted
        self._slab.started.update(self._ids)
        self._slab.ended.clear()
        self._truncate_to = None

    def flush(self) -> None:
        """Book the current step, if there is one."""
        step, self._step = self._step, None
        results, self._results = self._results, []
        length, self._length = self._length, -1
        if isinstance(step, ArmedStep):
            if not step.over:
                step.cancel()
                with contextlib.suppress(Error), self._on_device():
                    step.finish()
                return
            try:
                results = step.results(_TIMEOUT)
            except Error:
                return
        if step is not None:
            self.recorder.add([length - first for first in self._first], results)

    def _served(self) -> list[SidecarLayer]:
        return [layer for layer in self.layers if isinstance(layer, SidecarLayer)]


class SidecarLayer(DynamicLayer):
    """One layer's keys and values, in memory of the whole cache."""

    def __init__(self, cache: SidecarCache, slot: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.slot = slot
        self.prefill: Prefill | None = None
        """What the prefill saw, where the config's methods want to know."""

    @property
    def length(self) -> int:
        """Tokens of each row."""
        return self.get_seq_length()

    @property
    def cache(self) -> SidecarCache:
        """The cache of the layer."""
        cache = self._cache()
        assert cache is not None  # noqa: S101 - it owns the layer
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, kv_heads, new, dim]; return all."""
        start = self.length
        end = start + key_states.shape[-2]
        memory = self.cache.rows(self.slot, key_states.shape[0], end)
        for whole, new in zip(memory, (key_states, value_states), strict=True):
            if new.shape[-1] != whole.shape[-1] or new.shape[1] != whole.shape[1] or new.dtype != whole.dtype:
                raise Unsupported(
                    f"keys or values are {new.dtype} [{new.shape[1]} heads, {new.shape[-1]}], expected {whole.dtype} "
                    f"[{whole.shape[1]} heads, {whole.shape[-1]}]; enable the model again after changing it"
                )
            whole[:, :, start:end] = new
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.show(memory, end)
        return self.keys, self.values  # type: ignore[return-value]

    def show(self, memory: tuple[torch.Tensor, torch.Tensor], length: int) -> None:
        """Let keys and values be the first tokens of the memory."""
        self.keys, self.values = (whole[:, :, :length] for whole in memory)
        self.keys.sidecar_layer = self  # type: ignore[attr-defined] # by which attention finds back

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back the last tokens, as in assisted decoding."""
        super().crop(*args, **kwargs)
        self.prefill = None
        self.cache.roll_back(self.length)

    def reset(self) -> None:
        """Forget everything."""
        self.cache.release()

    def forget(self) -> None:
        """Forget the tensors."""
        self.keys = self.values = self.prefill = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse beam search."""
        raise Unsupported(NO_BEAMS)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse what copies rows."""
        raise Unsupported(NO_BEAMS)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse what moves rows."""
        raise Unsupported(NO_BEAMS)


@dataclass
class Prefill:
    """What the queries of a prefill saw, for methods that start from it."""

    queries: torch.Tensor | None
    """[B, window, Hq, dim], the last positions'."""
    mass: torch.Tensor | None
    """float32 [B, Hq, tokens]: the softmax weight that each position got from all of them."""


def _first_valid(mask: torch.Tensor | None, batch: int, length: int) -> list[int] | None:
    """Return the first position of each row that its last one may attend to; None unless it may to all that follow."""
    if mask is None:
        return [0] * batch
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            return None
        mask = mask[:, 0, -1]
    allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, :length].expand(batch, -1)
    if mask.dtype != torch.bool and (mask[:, :length][~allowed[: len(mask)]] > -1e4).any():
        return None  # a bias
    first = allowed.int().argmax(-1)
    if not torch.equal(allowed.sum(-1), length - first):
        return None
    return first.tolist()
