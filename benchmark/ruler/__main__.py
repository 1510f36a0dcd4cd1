"""RULER: 13 tasks at any length, made here but for their outside texts."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from .. import run
from ..examples import Question
from ..model import Model
from .tasks import Made, score, tasks

QUESTION = 100
"""Characters at a prompt's end that are decoded."""


def examples(model: Model, args: argparse.Namespace) -> Iterator[Question]:
    """Makes prompts that leave room for the answer."""
    for tokens in args.tokens:
        known = tasks(args.data, tokens)
        for name in args.tasks:
            task = known[name]
            for index in range(args.samples):

                def make(size: int, task=task, name=name, index=index) -> Made:
                    draw = random.Random(f"{args.seed} {name} {index}")
                    return task.make(draw, size, index)

                room = tokens - task.answer_tokens
                size = run.fit(lambda n: len(model.encode(make(n).prompt)), room, task.smallest, 2 * tokens)
                made = make(size)
                yield Question(
                    id=str(index),
                    task=f"{name}_{tokens}",
                    prompt=made.prompt,
                    question=QUESTION,
                    answer_tokens=task.answer_tokens,
                    answers=made.answers,
                    score=lambda answer, made=made, task=task: score(answer, made.answers, task.any_answer),
                )


def main() -> None:
    """Runs the benchmark."""
    names = list(tasks(Path(), 0))
    parser = argparse.ArgumentParser(prog="benchmark.ruler", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=names, choices=names, metavar="TASK", help="which")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384], help="of prompt and answer together")
    parser.add_argument("--samples", type=int, default=50, help="prompts of each task and length")
    parser.add_argument(
        "--data", type=Path, default=Path("ruler"), help="folder with essays.txt, squad.json and hotpotqa.json"
    )
    parser.add_argument("--seed", type=int, default=42, help="of all that is drawn")
    run.main("ruler", parser, examples, settings=["seed"])


if __name__ == "__main__":
    main()
