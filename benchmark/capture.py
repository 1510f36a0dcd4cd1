"""Records a model's attention on a text: what `twilight calibrate`, `compare` and `replay` read.

A safetensors file with, for each layer l, layer.{l}.k and layer.{l}.v, [Hkv, N+S, D], and layer.{l}.q,
[S, Hq, D], all float16 and after RoPE: the queries of the text's last S tokens, each of which attends to
itself and what precedes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AttentionInterface

from .model import SMOLLM2, Model


def capture(model: Model, tokens: list[int], steps: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a file."""
    tensors: dict[str, Tensor] = {}
    sdpa = AttentionInterface()["sdpa"]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        for name, tensor in {"k": key[0], "v": value[0], "q": query[0, :, -steps:].transpose(0, 1)}.items():
            tensors[f"layer.{module.layer_idx}.{name}"] = tensor.half().cpu().contiguous()
        return sdpa(module, query, key, value, *args, **options)

    AttentionInterface.register("twilight_capture", attend)
    with model.attention("twilight_capture"):
        model.prefill(tokens)
    layers = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".q"))
    return tensors, {
        "model": model.name,
        "layers": str(layers),
        "n": str(len(tokens) - steps),
        "steps": str(steps),
        "scale": str(model.scale),
    }


def main() -> None:
    """Writes a file."""
    parser = argparse.ArgumentParser(
        prog="benchmark.capture", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files, one behind another")
    parser.add_argument("--tokens", type=int, default=1088, help="of the text's beginning")
    parser.add_argument("--steps", type=int, default=64, help="of these, the last, whose queries are recorded")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()

    model = Model(args.model, args.device, args.dtype)
    tokens = model.encode("\n".join(path.read_text() for path in args.text))
    if not 0 < args.steps < args.tokens <= len(tokens):
        parser.error(f"--tokens is {args.tokens}, expected more than --steps and at most the text's {len(tokens)}")
    tensors, metadata = capture(model, tokens[: args.tokens], args.steps)
    source = {"text_source": ", ".join(path.name for path in args.text)}
    save_file(tensors, args.out, metadata={**metadata, **source})


if __name__ == "__main__":
    main()
