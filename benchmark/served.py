"""Decoding through a daemon, by the adapter that users of transformers have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import twilight_client as tw
from torch import Tensor
from twilight_client import hf

from .model import ROOM, Decoder, Model, Prefix
from .tally import Tally


def looks_at_prefill(config: Mapping[str, Any]) -> bool:
    """Tells whether a config's methods want to see the prefill."""
    stages = {stage: config.get(stage, {}).get("type", "none").lower() for stage in ("compressor", "selector")}
    return stages["compressor"] != "none" or stages["selector"] == "h2o"


@contextmanager
def served(model: Model, prefix: Prefix, config: Mapping[str, Any], client: tw.Client) -> Iterator[Decoder]:
    """Opens a lease, puts a prefix into the memory lent by it, and decodes there, by armed steps where the daemon's
    device offers them.

    Methods that look at the prefill see it: for them it is run again.
    """
    name = f"benchmark {model.name}"
    with hf.enable(model.model, client, dict(config), fallback="raise", engine_name=name) as twilight:
        cache = twilight.new_cache(len(prefix.tokens) + ROOM)
        if looks_at_prefill(config):
            model.forward(prefix.tokens, cache)
        else:
            for layer, (keys, values) in enumerate(prefix.layers):
                cache.update(keys, values, layer)
        yield _Served(model, twilight, cache)


class _Served:
    def __init__(self, model: Model, twilight: hf.Twilight, cache: Any) -> None:
        self._model = model
        self._twilight = twilight
        self._cache = cache

    def feed(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([self._model.forward([token], self._cache) for token in tokens])

    @property
    def tally(self) -> Tally:
        """What the daemon said of all its steps."""
        budgets = self._twilight.budgets()
        tally = Tally()
        for i, layer in enumerate(budgets.layers):
            mass = budgets.true_mass[:, i]
            dense = int((budgets.paths[:, i] != tw.PATH_SPARSE).sum())
            tally.add(layer, budgets.candidates[:, i], budgets.kept[:, i], mass[~np.isnan(mass)], dense)
        return tally
