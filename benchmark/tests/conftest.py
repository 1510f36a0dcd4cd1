from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import twilight_client as tw
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark.model import Model

ROOT = Path(__file__).resolve().parents[2]


class Words:
    """A tokenizer whose tokens are words, punctuation and line breaks, numbered as they come."""

    def __init__(self, bos_token: str | None = None) -> None:
        self.bos_token = bos_token
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> Words:
        found = re.findall(r"<s>|\w+|[^\w\s]|\n", text)
        if self.bos_token and add_special_tokens:
            found.insert(0, self.bos_token)
        self.input_ids = [self.known.setdefault(token, len(self.known)) for token in found]
        return self

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        words = dict(enumerate(self.known))
        return " ".join(words.get(token, f"<{token}>") for token in tokens)


def tiny(layers: int = 4) -> LlamaForCausalLM:
    """A model of random weights whose attention is sharp enough to be pruned."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    ).float()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20  # type: ignore[operator]
        layer.self_attn.k_proj.weight.data *= 20  # type: ignore[operator]
    return model.eval()


@pytest.fixture(scope="session")
def model() -> Model:
    return Model.of("tiny", tiny(), Words())


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon, built of this tree."""
    path = tmp_path_factory.mktemp("bin") / "twilightd"
    subprocess.run(
        ["go", "build", "-o", path, "./cmd/twilightd"],
        cwd=ROOT,
        env={**os.environ, "CGO_ENABLED": "0"},
        check=True,
    )
    return path


@pytest.fixture(scope="session")
def client(program: Path) -> Iterator[tw.Client]:
    with tw.Daemon("--log-level=error", program=program) as daemon, tw.dial(daemon.target) as c:
        yield c
