from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import twilight_client as tw

from benchmark import configs
from benchmark.emulation import Emulation, best, quantize, top_p
from benchmark.examples import Question, Span
from benchmark.model import Model
from benchmark.served import served
from benchmark.tests.conftest import Words

TEXT = torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(2)).tolist()
ESTIMATOR = {"type": "min_max_quant", "quant_bit": 4}
P85 = {"weight_estimator": ESTIMATOR, "weight_pruner": {"type": "top_p", "threshold": 0.85}}
CHANNELS = {str(layer): [[0, 5, 3, 12, 9, 1, 7, 15], [2, 5, 3, 12, 9, 1, 7, 14]] for layer in range(4)}
DS = {"type": "ds", "sparsity_rate": 0.25, "r": 8, "quant_bit": 2, "channels": CHANNELS}
CONFIGS: dict[str, dict[str, Any]] = {
    "full": {},
    "full_twi": P85,
    "exact": {**P85, "weight_estimator": {"type": "none"}},
    "not_equalised": {**P85, "weight_estimator": {**ESTIMATOR, "equalize": False}},
    "quest": {"selector": {"type": "quest", "token_budget": 100}},
    "quest_twi": {"selector": {"type": "quest", "sparsity_rate": 0.25}, **P85},
    "quest_32": {"selector": {"type": "quest", "sparsity_rate": 0.25, "chunk_size": 32}, **P85},
    "ds": {"selector": DS},
    "ds_twi": {"selector": DS, **P85, "skip_first_two_layers": False},
    "streaming": {"selector": {"type": "streaming", "token_budget": 60, "num_sinks": 4}},
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_daemon_agrees(name: str, model: Model, client: tw.Client) -> None:
    """Behind a prefix that ends before, and decodes past, a length where the estimator trains anew."""
    start, end = (250, 262) if name == "full_twi" else (650, 700)
    prefix = model.prefill(TEXT[:start])
    config = {**CONFIGS[name], "audit": 1.0}
    with torch.inference_mode():
        with model.emulated(prefix, config) as emulated:
            expected = emulated.feed(TEXT[start:end]).log_softmax(-1)
        with served(model, prefix, config, client) as decoder:
            logits = decoder.feed(TEXT[start:end]).log_softmax(-1)
            theirs = decoder.tally
        with model.dense(prefix) as dense:
            difference = (dense.feed(TEXT[start:end]).log_softmax(-1) - expected).abs().mean()
    assert (logits - expected).abs().mean() < 0.02 * difference + 1e-5
    mine = emulated.tally
    assert (mine.rows, mine.heads) == (theirs.rows, theirs.heads)
    assert theirs.candidates == pytest.approx(mine.candidates, rel=1e-3)
    assert theirs.kept == pytest.approx(mine.kept, rel=0.01)
    assert theirs.mass == pytest.approx(mine.mass, rel=0.01)
    if name == "full":
        assert difference < 1e-5
        assert theirs.dense == theirs.rows
    else:
        assert difference > 1e-3  # it prunes
        assert theirs.dense == 0


@pytest.mark.parametrize(
    "config",
    [
        {"compressor": {"type": "snap_kv", "window_size": 16, "max_capacity_prompt": 64}},
        {"selector": {"type": "h2o", "token_budget": 64}},
    ],
)
def test_methods_that_look_at_the_prefill(config: dict[str, Any], model: Model, client: tw.Client) -> None:
    prefix = model.prefill(TEXT[:300])
    with torch.inference_mode(), served(model, prefix, config, client) as decoder:
        decoder.feed(TEXT[300:303])
        summary = decoder.tally.summary()
    assert summary["dense_rows"] == 0
    assert 60 <= summary["kept"] <= 70


def test_refuses_what_it_does_not_know() -> None:
    for config in ({"selector": {"type": "sparq"}}, {"coverage": 0.97}, {"use_estimated_weights_in_attn": True}):
        with pytest.raises(ValueError, match="emulated"):
            Emulation(config)


def test_top_p() -> None:
    weights = torch.tensor([[0.1, 0.5, 0.0, 0.4]])
    for p, kept in {0.3: [1], 0.5: [1], 0.55: [1, 3], 0.9: [1, 3], 0.95: [0, 1, 3], 1.0: [0, 1, 3]}.items():
        assert top_p(weights, p).nonzero()[:, 1].tolist() == kept


def test_best() -> None:
    scores = torch.tensor([[0.0, 3.0, 3.0, 9.0, 0.0, 7.0]])
    picked = best(scores, torch.tensor([3]), torch.tensor([80]), 16)
    assert picked.nonzero()[:, 1].tolist() == [0, 3, 4]  # the first and the last come before chunk 3
    assert best(scores, torch.tensor([1]), torch.tensor([80]), 16).sum() == 2
    assert best(scores, torch.tensor([4]), torch.tensor([80]), 16).nonzero()[:, 1].tolist() == [0, 1, 3, 4]


def test_quantize() -> None:
    vectors = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        step = (vectors.amax(1) - vectors.amin(1)) / (2**bits - 1)
        assert ((quantize(vectors, bits) - vectors).abs() <= 0.51 * step[:, None] + 2e-3).all()
    assert torch.equal(quantize(torch.full((1, 4), 2.5), 4), torch.full((1, 4), 2.5))


def test_dense_decoding_is_the_model(model: Model) -> None:
    whole = model.model(torch.tensor([TEXT[:300]])).logits[0, 280:]
    with model.dense(model.prefill(TEXT[:280])) as decoder:
        steps = torch.cat([decoder.feed(TEXT[280:290]), decoder.feed(TEXT[290:300])])
    assert torch.allclose(whole, steps, atol=1e-4)


def test_span(model: Model) -> None:
    text = " ".join(f"w{i}" for i in TEXT[:200])
    span = Span("x", "x", text, 150, 200)
    tokens = model.encode(text)
    with model.dense(model.prefill(span.prefix(model))) as decoder:
        row = span.run(model, decoder)
    logits = model.model(torch.tensor([tokens])).logits[0, 149:199]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[150:])).detach()
    assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert row["score"] == pytest.approx(float(loss.exp()), rel=1e-4)
    with pytest.raises(ValueError, match="out of range"):
        Span("x", "x", text, 150, 201).prefix(model)


def test_a_text_begins_once(model: Model) -> None:
    tokenized = Model.of("begins", model.model, Words("<s>"))
    assert tokenized.encode("a b") == tokenized.encode("<s> a b") == [0, 1, 2]


def test_question_is_greedy(model: Model) -> None:
    prompt = " ".join(f"w{i}" for i in TEXT[:100])
    question = Question("x", "x", prompt, 9, 5, ["y"], lambda text: float(len(text.split())))
    tokens, cut = question.tokens(model)
    assert tokens[:cut] == question.prefix(model)
    assert 2 <= len(tokens) - cut <= 3
    with model.dense(model.prefill(question.prefix(model))) as decoder:
        row = question.run(model, decoder)
    expected = model.model.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False)[0, len(tokens) :]
    assert row["prediction"] == model.decode(expected.tolist())
    assert row["score"] == 5


def test_channels(tmp_path: Path) -> None:
    lists = {"q": [[0, 1, 2], [0, 2, 1], [2, 1, 0], [2, 0, 1]], "k": [[1, 0, 2], [2, 1, 0]]}
    file = tmp_path / "channels.json"
    file.write_text(json.dumps({f"model.layers.5.self_attn.{k}_proj": v for k, v in lists.items()}))
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"selector": {"type": "ds", "config_path": "channels.json", "r": 2}}))
    # ranks of query heads 0 and 1: 0+0, 1+2, 2+1; of 2 and 3: 2+1, 1+2, 0+0
    assert configs.load(config)["selector"]["channels"] == {"5": [[0, 1], [2, 0]]}
    with pytest.raises(ValueError, match="no lists of qk_proj"):
        configs.channels(json.loads(file.read_text()), "qk", 2)
