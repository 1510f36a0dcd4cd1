"""Where results lie: result_<benchmark>/<model>/<method>/<task>.jsonl, a line for each example."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """The results of one model on one benchmark. A run that was interrupted goes on where it ended."""

    def __init__(self, root: Path, benchmark: str, model: str) -> None:
        self.folder = root / f"result_{benchmark}" / model

    def begin(self, method: str, settings: Mapping[str, Any]) -> None:
        """Notes what a method runs with. Refuses to go on with results of other settings."""
        file = self.folder / method / "settings.json"
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if file.exists() and file.read_text() != text:
            raise ValueError(
                f"{file} is of a run with other settings, whose results cannot be joined: "
                f"move {file.parent} away, or give the same settings"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def done(self, method: str, task: str) -> set[str]:
        """Returns the ids of the examples that have a result. Cuts off a line that was not finished."""
        file = self._file(method, task)
        if not file.exists():
            return set()
        text = file.read_text()
        whole, _, rest = text.rpartition("\n")
        if rest:
            file.write_text(whole + "\n" if whole else "")
        return {json.loads(line)["id"] for line in whole.splitlines()}

    def append(self, method: str, task: str, row: Mapping[str, Any]) -> None:
        """Adds the result of an example."""
        file = self._file(method, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _file(self, method: str, task: str) -> Path:
        return self.folder / method / f"{task}.jsonl"


def read(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Returns rows by method and task of a folder result_<benchmark>/<model>."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*/*.jsonl")):
        lines = file.read_text().splitlines()
        rows.setdefault(file.parent.name, {})[file.stem] = [json.loads(line) for line in lines]
    if not rows:
        raise FileNotFoundError(f"{folder} has no results: run a benchmark first, or name its folder result_*/<model>")
    return rows
