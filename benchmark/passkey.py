"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): a number hidden in repeated text."""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator

from . import run
from .examples import Question
from .model import Model

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the pass key? The pass key is"


def prompt(filler: int, depth: float, key: int) -> str:
    """Hides a key among so many characters of filler, at a share of their number."""
    text = FILLER * (filler // len(FILLER) + 1)
    before = int(filler * depth)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return "\n".join([TASK, text[:before], needle, text[: filler - before], QUESTION])


def examples(model: Model, tokens: int, number: int, question: int, seed: int) -> Iterator[Question]:
    """Makes prompts of at most so many tokens, with keys and depths drawn anew for each."""
    draw = random.Random(f"{seed} {tokens}")
    for i in range(number):
        key, depth = draw.randint(1, 50000), draw.random()
        filler = run.fit(lambda n: len(model.encode(prompt(n, depth, key))), tokens, 0, 8 * tokens)  # noqa: B023
        yield Question(
            id=str(i),
            task=str(tokens),
            prompt=prompt(filler, depth, key),
            question=question,
            answer_tokens=10,
            answers=[str(key)],
            score=lambda answer, key=key: score(answer, key),
        )


def score(answer: str, key: int) -> float:
    """1 if the first number of an answer is the key."""
    number = re.search(r"\d+", answer)
    return float(number is not None and int(number[0]) == key)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.passkey", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[13000], help="lengths of the prompts")
    parser.add_argument("--iterations", type=int, default=100, help="prompts of each length")
    parser.add_argument("--question", type=int, default=400, help="characters at the end that are decoded")
    parser.add_argument("--seed", type=int, default=0, help="of keys and depths")
    run.main(
        "passkey",
        parser,
        lambda model, args: (
            example
            for tokens in args.tokens
            for example in examples(model, tokens, args.iterations, args.question, args.seed)
        ),
        settings=["question", "seed"],
    )


if __name__ == "__main__":
    main()
