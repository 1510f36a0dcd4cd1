"""What every head kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..step import PATH_SPARSE, LayerResult


@dataclass(frozen=True)
class Budgets:
    """Budgets of the decode steps of one sequence batch; S steps, L layers, B sequences.

    H is the KV heads under group mode "union", the query heads under "per_query_head"; Hq the query heads. Steps that
    the model attended by itself, in part or in whole, are not among them.
    """

    layers: list[int]
    """The model's layer indices [L]: those that the daemon served."""
    lengths: np.ndarray
    """int32 [S, B]: tokens of each sequence, its padding excluded."""
    candidates: np.ndarray
    """uint32 [S, L, B, H]: tokens that the selector kept."""
    kept: np.ndarray
    """uint32 [S, L, B, H]: tokens that the pruner kept. A row computed densely keeps all."""
    paths: np.ndarray
    """int32 [S, L, B, H]: PATH_SPARSE or PATH_DENSE."""
    estimated_mass: np.ndarray
    """float32 [S, L, B, Hq]: the share of attention that the kept tokens hold, as the daemon estimates it; NaN where
    it cannot tell."""
    true_mass: np.ndarray
    """float32 [S, L, B, Hq]: the share that they do hold, where the config's "audit" looked; NaN elsewhere."""

    @property
    def steps(self) -> int:
        """S."""
        return len(self.lengths)

    def per_head(self) -> np.ndarray:
        """Return the mean number of tokens kept, float64 [L, H]."""
        return self.kept.mean(axis=(0, 2)) if self.steps else np.full((len(self.layers), 0), np.nan)

    def mean(self, skip: int = 2) -> float:
        """Return the mean number of tokens kept, over the layers from ``skip`` on: the first two are often dense."""
        chosen = self.kept[:, [layer >= skip for layer in self.layers]]
        return float(chosen.mean()) if chosen.size else float("nan")

    def mean_mass(self, skip: int = 2) -> float:
        """Return the mean true mass where it was audited, over the layers from ``skip`` on."""
        chosen = self.true_mass[:, [layer >= skip for layer in self.layers]]
        return float(np.nanmean(chosen)) if np.isfinite(chosen).any() else float("nan")

    def __str__(self) -> str:
        """Return a table: tokens kept by every head of each layer, the mean over steps and sequences."""
        if not self.steps:
            return "no decode step went through the daemon"
        context = self.lengths.mean()
        head = f"tokens kept of {context:.0f}, mean of {self.steps} steps"
        rows = [f"{head}\nlayer  candidates   kept by each head"]
        for i, (layer, kept) in enumerate(zip(self.layers, self.per_head(), strict=True)):
            path = "" if (self.paths[:, i] == PATH_SPARSE).any() else "  dense"
            heads = " ".join(f"{x:7.1f}" for x in kept)
            rows.append(f"{layer:5d}  {self.candidates[:, i].mean():10.1f}  {heads}{path}")
        rows.append(f"mean of layers >= 2: {self.mean():.1f}")
        return "\n".join(rows)


@dataclass
class Recorder:
    """Collects the results of decode steps."""

    layers: list[int]
    query_heads: int
    steps: list[tuple[list[int], list[LayerResult]]] = field(default_factory=list)

    def add(self, lengths: Sequence[int], results: list[LayerResult]) -> None:
        """Book a step, unless a layer of it is missing."""
        if len(results) == len(self.layers):
            self.steps.append((list(lengths), results))

    def budgets(self) -> Budgets:
        """Return what was booked."""
        batch = len(self.steps[0][0]) if self.steps else 0

        def column(name: str, dtype: type) -> np.ndarray:
            rows = [[getattr(r, name) for r in results] for _, results in self.steps]
            return np.array(rows, dtype).reshape(len(rows), len(self.layers), batch, -1 if rows else 0)

        return Budgets(
            layers=self.layers,
            lengths=np.array([lengths for lengths, _ in self.steps], np.int32).reshape(len(self.steps), batch),
            candidates=column("candidates", np.uint32),
            kept=column("kept", np.uint32),
            paths=column("paths", np.int32),
            estimated_mass=self._mass(batch, lambda r: (np.arange(len(r.estimated_mass)), r.estimated_mass)),
            true_mass=self._mass(batch, lambda r: (r.audited, r.true_mass)),
        )

    def _mass(self, batch: int, of: Callable[[LayerResult], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        mass = np.full((len(self.steps), len(self.layers), batch * self.query_heads), np.nan, np.float32)
        for s, (_, results) in enumerate(self.steps):
            for i, result in enumerate(results):
                at, values = of(result)
                mass[s, i, at] = values
        return mass.reshape(len(self.steps), len(self.layers), batch, self.query_heads)
