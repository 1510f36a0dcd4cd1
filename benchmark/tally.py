"""What decoding kept, summed as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FIRST_LAYER = 2
"""Of those that count: Twilight's averages leave out the two that are dense."""


@dataclass
class Tally:
    """Sums over steps, heads and the layers from FIRST_LAYER on."""

    rows: int = 0
    candidates: int = 0
    kept: int = 0
    dense: int = 0
    """Rows that were computed densely."""
    heads: int = 0
    """Query heads whose true mass was measured."""
    mass: float = 0.0

    def add(self, layer: int, candidates: ArrayLike, kept: ArrayLike, mass: ArrayLike, dense: int = 0) -> None:
        """Adds rows of a layer: tokens of their lists, and the true mass of query heads."""
        if layer < FIRST_LAYER:
            return
        self.rows += np.asarray(kept).size
        self.candidates += int(np.asarray(candidates).sum())
        self.kept += int(np.asarray(kept).sum())
        self.dense += dense
        self.heads += np.asarray(mass).size
        self.mass += float(np.asarray(mass).sum(dtype=np.float64))

    def summary(self) -> dict[str, Any]:
        """The means that are stored beside a score; None where there is nothing to average."""
        return {
            "candidates": self.candidates / self.rows if self.rows else None,
            "kept": self.kept / self.rows if self.rows else None,
            "mass": self.mass / self.heads if self.heads else None,
            "dense_rows": self.dense,
        }
