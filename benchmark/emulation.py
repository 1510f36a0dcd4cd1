"""What a daemon computes, once more: plainly, in torch, for many queries at once.

A test oracle. It shares no code with the daemon and follows its documents: candidates per row (Quest,
Double Sparsity, StreamingLLM or all), logits estimated from equalised low-bit keys, top-p per query head,
the union over the query heads of a KV head, attention over that. It knows the methods and keys that are
compared with it and refuses all others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tally import Tally

CHUNK = 16
TRAIN_LEVELS = (16, 64, 256, 1024, 4096)
SCALE_RANGE = 16
BLOCK = 64


class Emulation:
    """Attention of one lease: call it for the layers of a decode step, or of many at once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        stages = ("compressor", "selector", "weight_estimator", "weight_pruner")
        known = {*stages, "skip_first_two_layers", "use_estimated_weights_in_attn", "audit"}
        none = {"type": "none"}
        compressor, self.selector, self.estimator, self.pruner = (config.get(s, none) for s in stages)
        self.skip = 2 if config.get("skip_first_two_layers", True) else 0
        self.tally = Tally()
        for stage, value, types in (
            ("compressor", compressor, ("none",)),
            ("selector", self.selector, ("none", "quest", "ds", "streaming")),
            ("weight_estimator", self.estimator, ("none", "min_max_quant")),
            ("weight_pruner", self.pruner, ("none", "top_p")),
        ):
            if value["type"] not in types:
                raise ValueError(f"{stage}.type is {value['type']!r}, expected one of {types} to be emulated")
        unknown = set(config) - known
        if config.get("use_estimated_weights_in_attn"):
            unknown.add("use_estimated_weights_in_attn")
        if unknown:
            raise ValueError(f"keys {sorted(unknown)} are not emulated: leave them out")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attends causally from the last S of N positions.

        query is [Hq, S, D], key and value [Hkv, N, D], all float32; the answer is [Hq, S, D].
        """
        groups = query.unflatten(0, (key.shape[0], -1))  # [Hkv, G, S, D]
        total, new = key.shape[1], query.shape[1]
        output = torch.empty_like(groups)
        for head, queries in enumerate(groups):
            for start in range(0, new, BLOCK):
                block = slice(start, min(start + BLOCK, new))
                lengths = total - new + 1 + torch.arange(block.start, block.stop)
                output[head, :, block] = self._rows(
                    layer, head, queries[:, block] * scale, key[head], value[head], lengths
                )
        return output.flatten(0, 1)

    def _rows(self, layer: int, head: int, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        """query is [G, Q, D], key and value [N, D], lengths [Q]: row i sees the first lengths[i] tokens."""
        logits = query @ key.T
        valid = torch.arange(len(key)) < lengths[:, None]
        if layer < self.skip:
            return softmax(logits, valid) @ value
        candidates = self._candidates(layer, head, query, key, lengths) & valid
        kept = candidates
        if self.pruner["type"] == "top_p":
            estimates = self._estimate(query, key, lengths) if self.estimator["type"] != "none" else logits
            kept = top_p(softmax(estimates, candidates), self.pruner["threshold"]).any(0)
        weights = softmax(logits, valid) * kept
        mass = weights.sum(-1, keepdim=True)
        self.tally.add(layer, candidates.sum(-1), kept.sum(-1), mass)
        return weights @ value / mass

    def _candidates(self, layer: int, head: int, query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        """Returns [Q, N]; what lies past a row's length does not matter."""
        selector, at = self.selector, torch.arange(len(key))
        if selector["type"] == "none":
            return torch.ones(len(lengths), len(key), dtype=torch.bool)
        if selector["type"] == "streaming":
            sinks, recent = selector.get("num_sinks", 4), selector.get("token_budget", 2000)
            return (at < sinks) | (at >= lengths[:, None] - recent)
        budget = torch.full_like(lengths, selector.get("token_budget", 8192))
        if (rate := selector.get("sparsity_rate", -1)) > 0:
            budget = torch.tensor([math.ceil(rate * n) for n in lengths.tolist()])
        if selector["type"] == "ds":
            channels = selector["channels"][str(layer)][head][: selector.get("r", 64)]
            labels = quantize(key[:, channels], selector.get("quant_bit", 2))
            scores = query.sum(0)[:, channels] @ labels.T
            return best(scores, budget, lengths, 1)
        size = selector.get("chunk_size", CHUNK)
        chunks = -(-len(key) // size)
        padded = key.new_full((chunks * size, key.shape[1]), float("nan"))
        padded[: len(key)] = key
        padded = padded.view(chunks, size, -1)
        high = outwards(padded.nan_to_num(-torch.inf).amax(1), torch.inf)
        low = outwards(padded.nan_to_num(torch.inf).amin(1), -torch.inf)
        # The row's own chunk may hold tokens that it does not see; but that one is pinned.
        bounds = query.clamp(min=0) @ high.T + query.clamp(max=0) @ low.T
        return best(bounds.sum(0), -(-budget // size), lengths, size).repeat_interleave(size, 1)[:, : len(key)]

    def _estimate(self, query: Tensor, key: Tensor, lengths: Tensor) -> Tensor:
        """Returns logits [G, Q, N] estimated from quantised keys."""
        bits = self.estimator.get("quant_bit", 4)
        if not self.estimator.get("equalize", True):
            return query @ quantize(key, bits).T
        levels = torch.tensor([max((t for t in TRAIN_LEVELS if t <= n), default=0) for n in lengths.tolist()])
        estimates = query.new_empty(*query.shape[:2], len(key))
        for level in levels.unique().tolist():
            rows = levels == level
            mean, spread = equalisation(key[:level]) if level else (0.0, torch.ones(key.shape[1]))
            smooth = quantize((key - mean) / spread, bits)
            constant = (query[:, rows] * mean).sum(-1, keepdim=True)
            estimates[:, rows] = (query[:, rows] * spread) @ smooth.T + constant
        return estimates


def best(scores: Tensor, keep: Tensor, lengths: Tensor, unit: int) -> Tensor:
    """Marks each row's keep best units, [Q, units], ties by lower unit. Those of the first and the last
    chunk of CHUNK tokens come first, and count."""
    at = torch.arange(scores.shape[1]) * unit
    last = (lengths[:, None] - 1) // CHUNK * CHUNK
    pinned = (at < CHUNK) | (at + unit > last)
    seen = at < lengths[:, None]
    scores = scores.masked_fill(pinned, torch.inf).masked_fill(~seen, -torch.inf)
    keep = torch.maximum(keep, (pinned & seen).sum(1))
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = torch.arange(scores.shape[1]) < keep[:, None]
    return torch.zeros_like(ranked).scatter(1, order, ranked)


def outwards(x: Tensor, towards: float) -> Tensor:
    """Rounds to fp16, where that is not exact in one direction."""
    half = x.numpy().astype(np.float16)
    inwards = half < x.numpy() if towards > 0 else half > x.numpy()
    return torch.from_numpy(np.where(inwards, np.nextafter(half, np.float16(towards)), half)).float()


def equalisation(key: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each channel's mean and the root of its standard deviation, none of these less than
    1/SCALE_RANGE of the largest."""
    mean = key.mean(0)
    spread = key.std(0, correction=0).sqrt()
    return mean, spread.clamp(min=spread.max().item() / SCALE_RANGE)


def quantize(vectors: Tensor, bits: int) -> Tensor:
    """Rounds vectors to codes of so many bits, each by its own least and largest element, kept in fp16."""
    top = 2**bits - 1
    low, high = vectors.aminmax(dim=-1, keepdim=True)
    scale, zero = ((high - low) / top).half().float(), low.half().float()
    codes = ((vectors - zero) / scale + 0.5).floor().clamp(0, top)
    return torch.where(scale > 0, codes * scale, 0) + zero


def softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension, of what the mask leaves."""
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


def top_p(weights: Tensor, p: float) -> Tensor:
    """Marks the smallest set of weights, the largest first, that sums to p, with all that equal its last."""
    ordered = torch.from_numpy(np.sort(weights.numpy())).flip(-1)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    last = (before < p).sum(-1, keepdim=True) - 1
    return (weights >= ordered.gather(-1, last)) & (weights > 0)
