"""The real model of examples/smollm2.py: run by ``make python-test PYTEST='-m slow'``."""

from typing import Any

import pytest
import smollm2
import torch

import twilight_client as tw
from twilight_client import hf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOKENS = 64


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return smollm2.load()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("context", [512, 2048, 6144])
def test_greedy_tokens_are_the_models(context: int, batch: int, model: tuple[Any, Any], client: tw.Client) -> None:
    """A difference counts only where the model's own logits tell the two tokens apart by more than rounding."""
    tokenizer, lm = model
    ids = tokenizer(smollm2.documentation(), return_tensors="pt")["input_ids"][0]
    rows = torch.stack([ids[i * context : (i + 1) * context] for i in range(batch)])
    mask = torch.ones_like(rows)
    for row in range(1, batch):
        mask[row, : 11 * row] = 0
    inputs = {"input_ids": rows, "attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False}
    own = lm.generate(**inputs, return_dict_in_generate=True, output_logits=True)
    with hf.enable(lm, client, {"selector": {"type": "none"}, "weight_pruner": {"type": "none"}}, fallback="raise"):
        served = lm.generate(**inputs)[:, context:]
    want = own.sequences[:, context:]
    for row in range(batch):
        differ = (served[row] != want[row]).nonzero()
        if len(differ):
            at = int(differ[0])
            logits = own.logits[at][row]
            gap = float(logits[want[row, at]] - logits[served[row, at]])
            assert gap < 1e-3, f"row {row}: token {at} differs though the logits are {gap} apart"
    print(f"context {context}, batch {batch}: {int((served == want).sum())} of {want.numel()} tokens equal")
