"""One table, and one plot of score against mean kept, of results in folders result_<benchmark>/<model>."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import read


@dataclass(frozen=True)
class Line:
    """Means of a method over the examples of a task; of whatever decoded sparsely, None if nothing did."""

    benchmark: str
    model: str
    task: str
    method: str
    examples: int
    score: float
    candidates: float | None
    kept: float | None
    mass: float | None
    dense_rows: int


def lines(folders: Iterable[Path]) -> list[Line]:
    """Returns a line for each task and method, in the order of their names, dense first."""
    found: list[Line] = []
    for folder in folders:
        benchmark = folder.resolve().parent.name.removeprefix("result_")
        for method, tasks in read(folder).items():
            for task, rows in tasks.items():
                found.append(
                    Line(
                        benchmark,
                        folder.resolve().name,
                        task,
                        method,
                        len(rows),
                        sum(row["score"] for row in rows) / len(rows),
                        _mean(rows, "candidates"),
                        _mean(rows, "kept"),
                        _mean(rows, "mass"),
                        sum(row["dense_rows"] for row in rows),
                    )
                )
    return sorted(found, key=lambda x: (x.benchmark, x.model, x.task, x.method != "dense", x.method))


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def table(folders: Iterable[Path]) -> str:
    """Returns a Markdown table. Rows of a task that have not the same number of examples cannot be compared,
    which shows in the column."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    head = ["benchmark", "model", "task", "method", "examples", "score", "candidates", "kept", "mass", "dense rows"]
    rows = [head, ["---"] * 4 + ["---:"] * 6]
    for x in lines(folders):
        rows.append(
            [
                x.benchmark,
                x.model,
                x.task,
                x.method,
                str(x.examples),
                number(x.score, 3),
                number(x.candidates, 0),
                number(x.kept, 1),
                number(x.mass, 3),
                "" if x.kept is None else str(x.dense_rows),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(folders: Iterable[Path], file: Path) -> None:
    """Draws score against mean kept, a panel for each task, dense as a line."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "twilight"})  # the same file each time
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str, str], list[Line]] = {}
    for x in lines(folders):
        panels.setdefault((x.benchmark, x.model, x.task), []).append(x)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for axis, ((benchmark, model, task), found) in zip(axes.flat, panels.items(), strict=False):
        for x in found:
            if x.kept is None:
                axis.axhline(x.score, color="grey", linewidth=1)
                place = (0.01, x.score)
                axis.annotate(x.method, place, xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
            else:
                axis.plot(x.kept, x.score, "o")
                axis.annotate(x.method, (x.kept, x.score), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.set_xscale("log")
        axis.set_title(f"{benchmark} {task}, {model}", fontsize=9)
        axis.set_xlabel("mean tokens kept, layers from 2 on")
        axis.set_ylabel("perplexity" if benchmark == "perplexity" else "score")
        axis.margins(0.15)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmark.summarize", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="result_<benchmark>/<model>")
    parser.add_argument("--plot", type=Path, help="file to draw, as in scores.svg")
    args = parser.parse_args()
    print(table(args.folders))
    if args.plot:
        plot(args.folders, args.plot)


if __name__ == "__main__":
    main()
