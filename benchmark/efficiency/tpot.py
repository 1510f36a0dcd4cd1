"""Time per output token of a model, end to end: by its own attention, and by configs through a daemon.

All in one run, on one machine, with real keys: the text is prefilled. The model's own attention reads a cache
that grows in place. A figure is the median of the steps, beside their quartiles.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch
import twilight_client as tw
from tqdm import tqdm

from .. import run
from ..model import Model, Prefix

WARM = 4
"""Steps before those that are timed."""


@dataclass(frozen=True)
class Timed:
    """Milliseconds per token: first quartile, median, third."""

    method: str
    tokens: int
    quartiles: tuple[float, float, float]
    kept: float | None


def measure(model: Model, prefix: Prefix, after: list[int], method: run.Method, client: tw.Client | None) -> Timed:
    """Times the decoding of tokens behind a prefix, the first WARM left out."""
    times: list[float] = []
    with method.decoder(model, prefix, client) as decoder:
        for token in after:
            start = time.perf_counter()
            decoder.feed([token])  # returns logits on the CPU: the device is done
            times.append(1000 * (time.perf_counter() - start))
        kept = decoder.tally.summary()["kept"]
    low, median, high = quantiles(times[WARM:], n=4)
    return Timed(method.name, len(prefix.tokens), (low, median, high), kept)


def table(timed: list[Timed]) -> str:
    """Returns a Markdown table: the ratio is to dense at the same length."""
    dense = {x.tokens: x.quartiles[1] for x in timed if x.method == run.DENSE}
    rows = ["| context | method | ms per token | quartiles | dense / method | kept |", "|---:|---|---:|---:|---:|---:|"]
    for x in timed:
        low, median, high = x.quartiles
        kept = "" if x.kept is None else f"{x.kept:.0f}"
        rows.append(
            f"| {x.tokens} | {x.method} | {median:.2f} | {low:.2f} - {high:.2f} | "
            f"{dense[x.tokens] / median:.2f} | {kept} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark.efficiency.tpot",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="file that is read; it is repeated if it is short")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="lengths of the context")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are timed")
    run.add_arguments(parser)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}, expected at least 2")

    ways = run.methods(args.configs, args.channels, 0, emulate=False)
    model = run.load(args)
    text = model.encode(args.text.read_text())
    timed: list[Timed] = []
    with ExitStack() as stack, torch.inference_mode():
        client = stack.enter_context(run.connect(args)) if args.configs else None
        with tqdm(total=len(args.tokens) * len(ways), unit="method") as bar:
            for length in args.tokens:
                needed = length + WARM + args.steps
                tokens = (text * (needed // len(text) + 1))[:needed]
                prefix = model.prefill(tokens[:length])
                for method in ways:
                    bar.set_postfix_str(f"{length} {method.name}")
                    timed.append(measure(model, prefix, tokens[length:], method, client))
                    bar.update()
    print(table(timed))


if __name__ == "__main__":
    main()
