"""Time per output token of a model, end to end: by its own attention, and by configs through a daemon.

All in one run, on one machine: beside the model's own attention, FlashAttention where it is installed, and by armed
steps through a daemon whose device offers them. A cache of transformers' is made to grow in place. With --text a
context is a text's, prefilled; with --shape the model is of random weights and the context made (made.py says of
what). A figure is the median of the steps, beside the 10th and 90th percentiles. What does not fit or is not installed
is left out, and said so.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch
import transformers
import twilight_client as tw
from tqdm import tqdm

from .. import run
from ..model import Model, Prefix
from ..served import looks_at_prefill
from . import made
from .mps import under

WARM = 4
"""Steps before those that are timed."""

ROW = "| context | method | ms per token | p10 - p90 | dense / method | kept |"


@dataclass(frozen=True)
class Timed:
    """Milliseconds per token: 10th percentile, median, 90th."""

    method: str
    tokens: int
    percentiles: tuple[float, float, float]
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
    tenths = quantiles(times[WARM:], n=10, method="inclusive")
    return Timed(method.name, len(prefix.tokens), (tenths[0], tenths[4], tenths[8]), kept)


def table(timed: list[Timed]) -> str:
    """Returns a Markdown table: the ratio is to dense at the same length, where that fitted."""
    dense = {x.tokens: x.percentiles[1] for x in timed if x.method == run.DENSE}
    rows = [ROW, "|---:|---|---:|---:|---:|---:|"]
    for x in timed:
        low, median, high = x.percentiles
        kept = "" if x.kept is None else f"{x.kept:.0f}"
        ratio = f"{dense[x.tokens] / median:.2f}" if x.tokens in dense else ""
        rows.append(f"| {x.tokens} | {x.method} | {median:.2f} | {low:.2f} - {high:.2f} | {ratio} | {kept} |")
    return "\n".join(rows)


def flash_attention(device: str) -> tuple[list[run.Method], list[str]]:
    """Returns the versions of FlashAttention that are there, and why others are left out."""
    found, absent = [], []
    for version in (2, 3):
        name = f"flash_attention_{version}"
        if not device.startswith("cuda"):
            absent.append(f"{name} is left out: the model is on {device}, not on a GPU")
        elif getattr(transformers.utils, f"is_flash_attn_{version}_available")():
            found.append(run.Method(name, None, attention=name))
        else:
            absent.append(f"{name} is left out: it is not installed")
    return found, absent


def about(args: argparse.Namespace, client: tw.Client | None) -> str:
    """Tells on what the figures are taken."""
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    said = f"{args.shape or args.model} in {args.dtype} on {device}; batch 1, {args.steps} tokens; "
    said += f"torch {torch.__version__}, transformers {transformers.__version__}"
    if client is not None:
        armed = all(device.armed_steps for device in client.capabilities().devices)
        said += f"; through the daemon by {'armed steps' if armed else 'messages'}"
    if args.device.startswith("cuda"):
        said += f", {'under' if under() else 'without'} MPS"
    return said


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark.efficiency.tpot",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    context = parser.add_mutually_exclusive_group(required=True)
    context.add_argument("--text", type=Path, help="file that is read; it is repeated if it is short")
    context.add_argument("--shape", choices=list(made.SHAPES), help="of a model of random weights, in place of --model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="lengths of the context")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are timed")
    run.add_arguments(parser)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps is {args.steps}, expected at least 2")

    dense, *served = run.methods(args.configs, args.channels, 0, emulate=False)
    for method in served:
        if args.shape and method.config and looks_at_prefill(method.config):
            parser.error(f"--configs: {method.name} looks at the prefill, which --shape has none of; use --text")
    flash, absent = flash_attention(args.device)
    timed: list[Timed] = []
    with ExitStack() as stack, torch.inference_mode():
        client = stack.enter_context(run.connect(args)) if args.configs else None
        model = made.make(args.shape, args.device, args.dtype) if args.shape else run.load(args)
        text = model.encode(args.text.read_text()) if args.text else list(range(model.model.config.vocab_size))
        ways = [dense, *flash, *served]
        with tqdm(total=len(args.tokens) * len(ways), unit="method") as bar:
            for length in args.tokens:
                needed = length + WARM + args.steps
                tokens = (text * (needed // len(text) + 1))[:needed]
                prefix = None
                for method in ways:
                    bar.set_postfix_str(f"{length} {method.name}")
                    try:
                        if prefix is None:
                            prefix = made.context(model, length) if args.shape else model.prefill(tokens[:length])
                        timed.append(measure(model, prefix, tokens[length:], method, client))
                    except (torch.OutOfMemoryError, tw.ResourceExhausted) as e:
                        absent.append(f"{method.name} at {length} tokens is left out: {e}")
                    bar.update()
                    gc.collect()
                    if args.device.startswith("cuda"):
                        torch.cuda.empty_cache()  # the daemon and the next one need the memory
        print(about(args, client))
    for why in absent:
        print(why)
    print()
    print(table(timed))


if __name__ == "__main__":
    main()
