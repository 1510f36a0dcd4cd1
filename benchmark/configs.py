"""Twilight configs as a daemon takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LIST = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(q|k|qk)_proj$")


def load(path: Path, channel_file: Path | None = None) -> dict[str, Any]:
    """Reads a config. A channel file of Double Sparsity that it names, found from the config's folder, or the
    one given, is put in its place: a daemon opens no file for an engine."""
    config = json.loads(path.read_text())
    selector = config.get("selector", {})
    if selector.get("type") == "ds" and "config_path" in selector:
        named = path.parent / selector.pop("config_path")
        file = named if channel_file is None else channel_file
        selector["channels"] = channels(
            json.loads(file.read_text()), selector.get("selected_channel", "q"), selector.get("r", 64)
        )
    return config


def channels(file: Mapping[str, list[list[int]]], kind: str, r: int) -> dict[str, list[list[int]]]:
    """Returns, for each layer, each KV head's first r channels, of a channel file's lists of a kind. Those of
    query heads that share a KV head become one, by the sum of a channel's ranks."""
    lists = {(m[1], m[2]): heads for name, heads in file.items() if (m := _LIST.search(name))}
    chosen: dict[str, list[list[int]]] = {}
    for (layer, of), heads in lists.items():
        if of == kind:
            group = len(heads) // len(lists.get((layer, "k"), heads))
            chosen[layer] = [_merge(heads[i : i + group])[:r] for i in range(0, len(heads), group)]
    if not chosen:
        raise ValueError(f"the channel file has no lists of {kind}_proj, which selected_channel asks for")
    return chosen


def _merge(lists: list[list[int]]) -> list[int]:
    ranks = {channel: sum(order.index(channel) for order in lists) for channel in lists[0]}
    return sorted(ranks, key=lambda channel: (ranks[channel], channel))
