"""Runs examples through a model by several methods, a dense baseline always among them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import twilight_client as tw
from tqdm import tqdm

from . import configs
from .examples import Example
from .model import SMOLLM2, Decoder, Model, Prefix
from .results import Results
from .served import served
from .summarize import table

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """A way to decode, by the name of its config's file."""

    name: str
    config: Mapping[str, Any] | None
    """None for the model's own attention."""
    emulate: bool = False
    attention: str | None = None
    """Of transformers, in place of the model's own."""

    def decoder(self, model: Model, prefix: Prefix, client: tw.Client | None) -> AbstractContextManager[Decoder]:
        """Begins a sequence behind a prefix."""
        if self.config is None:
            return model.dense(prefix, self.attention)
        if self.emulate:
            return model.emulated(prefix, self.config)
        if client is None:
            raise ValueError(f"{self.name} takes a daemon, and there is none")
        return served(model, prefix, self.config, client)


def methods(paths: Sequence[Path], channels: Path | None, audit: float, emulate: bool) -> list[Method]:
    """Returns dense, the configs, and after each, if asked for, its emulation."""
    found = [Method(DENSE, None)]
    for path in paths:
        config = configs.load(path, channels)
        found.append(Method(path.stem, {**config, "audit": audit}))
        if emulate:
            found.append(Method(path.stem + "_emulated", config, emulate=True))
    names = [method.name for method in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two configs have one name: {names}")
    return found


def run(
    model: Model, examples: Iterable[Example], ways: Sequence[Method], results: Results, client: tw.Client | None
) -> None:
    """Runs what has no result yet. Each example is prefilled once for all methods."""
    done: dict[tuple[str, str], set[str]] = {}
    with tqdm(list(tqdm(examples, unit="prompt")), unit="example") as bar:
        for example in bar:
            missing: list[Method] = []
            for method in ways:
                key = method.name, example.task
                if key not in done:
                    done[key] = results.done(*key)
                if example.id not in done[key]:
                    missing.append(method)
            if not missing:
                continue
            bar.set_postfix_str(f"{example.task} prefill")
            prefix = model.prefill(example.prefix(model))
            for method in missing:
                bar.set_postfix_str(f"{example.task} {method.name}")
                with method.decoder(model, prefix, client) as decoder:
                    row = example.run(model, decoder)
                    results.append(method.name, example.task, {"id": example.id, **row, **decoder.tally.summary()})
                done[method.name, example.task].add(example.id)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what all benchmarks take: a model, a daemon and configs."""
    parser.add_argument("--model", default=SMOLLM2, help=f"a model of transformers, by folder or name, or {SMOLLM2}")
    parser.add_argument("--device", default="cpu", help="of the model")
    parser.add_argument("--dtype", default="float32", help="of the model and its KV cache")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU; 0 for its own choice")
    parser.add_argument("--configs", type=Path, nargs="*", default=[], help="Twilight configs to compare with dense")
    parser.add_argument("--channels", type=Path, help="channel file of Double Sparsity, for the configs' config_path")
    parser.add_argument("--target", help="a running daemon, unix:///PATH; else one is started")
    parser.add_argument("--twilightd", default="twilightd", help="the daemon to start")


def load(args: argparse.Namespace) -> Model:
    """Loads the model that the arguments name."""
    return Model(args.model, args.device, args.dtype, args.threads)


@contextmanager
def connect(args: argparse.Namespace) -> Iterator[tw.Client]:
    """Connects to the daemon that the arguments name, or to one that runs meanwhile."""
    with ExitStack() as stack:
        target = args.target
        if target is None:
            flags = ("--backend=cuda", "--spares=0") if args.device.startswith("cuda") else ()
            target = stack.enter_context(tw.Daemon("--log-level=warn", *flags, program=args.twilightd)).target
        yield stack.enter_context(tw.dial(target))


def main(
    benchmark: str,
    parser: argparse.ArgumentParser,
    examples: Callable[[Model, argparse.Namespace], Iterable[Example]],
    settings: Sequence[str] = (),
) -> None:
    """Runs a benchmark as its parser's arguments say, and prints its table. Runs with other values of the
    arguments in settings cannot share a folder."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add_arguments(parser)
    parser.add_argument("--audit", type=float, default=0.1, help="share of rows whose true mass is measured")
    parser.add_argument("--emulate", action="store_true", help="run a plain emulation of each config, too")
    parser.add_argument("--out", type=Path, default=Path(), help="where result_<benchmark>/<model>/ goes")
    args = parser.parse_args()

    ways = methods(args.configs, args.channels, args.audit, args.emulate)
    chosen = {name: getattr(args, name) for name in ("model", "dtype", *settings)}
    model = load(args)
    results = Results(args.out, benchmark, model.name)
    for method in ways:
        results.begin(method.name, {**chosen, "config": method.config})
    with ExitStack() as stack:
        client = stack.enter_context(connect(args)) if args.configs else None
        run(model, examples(model, args), ways, results, client)
    print(table([results.folder]))


def fit(tokens: Callable[[int], int], most: int, low: int, high: int) -> int:
    """Returns the largest size in low..high whose text has at most so many tokens. More size is taken to be
    more tokens."""
    if tokens(low) > most:
        raise ValueError(f"a prompt of {most} tokens is too short for this task: it takes {tokens(low)}")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= most else (low, middle - 1)
    return low
