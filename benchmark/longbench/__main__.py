"""LongBench, the tasks of Twilight's script by default."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import run
from ..examples import Question
from ..model import Model
from .metrics import FIRST_LINE, METRICS, score

TASKS = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "triviaqa",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
]
"""Those that Twilight runs."""

QUESTION = 100
"""Characters at a prompt's end that are decoded, as in Twilight."""

PLAIN = FIRST_LINE | {"lcc", "repobench-p"}
"""Tasks that no chat template is put around: they go on with what they show."""

DATASET = "THUDM/LongBench"

_PROMPTS = Path(__file__).parents[2] / "third_party" / "longbench"


def load(task: str, folder: Path | None) -> Iterable[Mapping[str, Any]]:
    """Reads a task's examples from <task>.jsonl in a folder, else by the datasets library."""
    if folder is not None:
        file = folder / f"{task}.jsonl"
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: --data names the folder data/ of LongBench's data.zip, with a file for each task"
            )
        return [json.loads(line) for line in file.read_text().splitlines()]
    try:
        datasets: Any = import_module("datasets")
    except ImportError as e:
        raise ImportError("install datasets, or name a folder with LongBench's files by --data") from e
    return datasets.load_dataset(DATASET, task, split="test")


def examples(model: Model, args: argparse.Namespace) -> Iterator[Question]:
    """Makes the prompts of the tasks that were asked for."""
    prompts = json.loads((_PROMPTS / "dataset2prompt.json").read_text())
    lengths = json.loads((_PROMPTS / "dataset2maxlen.json").read_text())
    for task in args.tasks:
        for index, row in enumerate(load(task, args.data)):
            if index == args.most:
                break
            prompt = prompts[task].format(context=row["context"], input=row["input"])
            classes = row.get("all_classes") or ()
            yield Question(
                id=str(row.get("_id", index)),
                task=task,
                prompt=model.chat(prompt) if args.chat and task not in PLAIN else prompt,
                question=QUESTION,
                answer_tokens=lengths[task],
                answers=row["answers"],
                score=lambda answer, task=task, row=row, classes=classes: score(task, answer, row["answers"], classes),
                stop="\n" if task == "samsum" else "",
                most_tokens=args.max_tokens,
            )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.longbench", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=sorted(METRICS), metavar="TASK", help="which")
    parser.add_argument("--data", type=Path, help="folder with <task>.jsonl; else the datasets library is asked")
    parser.add_argument("--max-tokens", type=int, default=31500, help="longer prompts lose their middle")
    parser.add_argument("--most", type=int, default=-1, help="examples of each task; -1 for all")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template where LongBench does")
    run.main("longbench", parser, examples, settings=["max_tokens", "chat"])


if __name__ == "__main__":
    main()
