"""Perplexity of a span of a long text, decoded token by token after a dense prefill of what precedes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import run
from .examples import Span


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.perplexity", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files")
    parser.add_argument("--span", default="4096:4608", help="the tokens to predict, START:END (%(default)s)")

    def examples(_: object, args: argparse.Namespace) -> list[Span]:
        start, end = (int(x) for x in args.span.split(":"))
        return [Span(f"{path.name} {args.span}", path.stem, path.read_text(), start, end) for path in args.text]

    run.main("perplexity", parser, examples)


if __name__ == "__main__":
    main()
