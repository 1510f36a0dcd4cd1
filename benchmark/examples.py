"""What a benchmark asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Protocol

import torch

from .model import Decoder, Model

BLOCK = 512
"""Tokens of a span whose logits are there at a time."""


class Example(Protocol):
    """A text that is read densely up to some place and decoded from there."""

    @property
    def id(self) -> str:
        """Its name within the task."""
        ...

    @property
    def task(self) -> str:
        """What it is averaged with."""
        ...

    def prefix(self, model: Model) -> list[int]:
        """The tokens of the dense prefill."""
        ...

    def run(self, model: Model, decoder: Decoder) -> dict[str, Any]:
        """Decodes the rest. The answer has the key score."""
        ...


@dataclass(frozen=True)
class Question:
    """A prompt whose end, the question, is decoded, and greedily the answer after it."""

    id: str
    task: str
    prompt: str
    question: int
    """Characters at the prompt's end that are not prefilled, but decoded."""
    answer_tokens: int
    """Most tokens of the answer."""
    answers: Sequence[str]
    score: Callable[[str], float]
    stop: str = ""
    """Ends the answer, if not empty."""
    most_tokens: int = 0
    """Longer prompts lose their middle; 0 for no limit."""

    def tokens(self, model: Model) -> tuple[list[int], int]:
        """Returns the prompt's tokens, and where those of the question begin."""
        tokens = model.encode(self.prompt)
        if 0 < self.most_tokens < len(tokens):
            half = self.most_tokens // 2
            tokens = tokens[:half] + tokens[-half:]
        question = model.tail(self.prompt[len(self.prompt) - self.question :])
        return tokens, max(1, len(tokens) - max(1, question))

    def prefix(self, model: Model) -> list[int]:
        tokens, cut = self.tokens(model)
        return tokens[:cut]

    def run(self, model: Model, decoder: Decoder) -> dict[str, Any]:
        tokens, cut = self.tokens(model)
        logits = decoder.feed(tokens[cut:])
        answer: list[int] = []
        while True:
            token = int(logits[-1].argmax())
            answer.append(token)
            text = model.decode(answer)
            ended = token in model.ends or bool(self.stop and self.stop in text)
            if ended or len(answer) == self.answer_tokens:
                break
            logits = decoder.feed([token])
        if self.stop:
            text = text.split(self.stop)[0]
        return {"score": self.score(text), "prediction": text, "answers": list(self.answers), "tokens": len(tokens)}


@dataclass(frozen=True)
class Span:
    """Tokens start..end of a text, whose perplexity is the score."""

    id: str
    task: str
    text: str
    start: int
    end: int

    def tokens(self, model: Model) -> list[int]:
        """Returns the text's tokens up to end."""
        tokens = model.encode(self.text)
        if not 2 <= self.start < self.end <= len(tokens):
            raise ValueError(
                f"span {self.start}:{self.end} of {self.id} is empty or out of range: it has {len(tokens)} tokens"
            )
        return tokens[: self.end]

    def prefix(self, model: Model) -> list[int]:
        return self.tokens(model)[: self.start - 1]

    def run(self, model: Model, decoder: Decoder) -> dict[str, Any]:
        tokens = self.tokens(model)
        total = 0.0
        for start in range(self.start, self.end, BLOCK):
            end = min(start + BLOCK, self.end)
            logits = decoder.feed(tokens[start - 1 : end - 1]).double()
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[start:end]), reduction="sum"))
        loss = total / (self.end - self.start)
        return {"score": exp(loss), "loss": loss, "tokens": len(tokens)}
