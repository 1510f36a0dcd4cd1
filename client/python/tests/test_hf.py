import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, make, prompts
from transformers import PreTrainedModel

import twilight_client as tw
from twilight_client import hf

DENSE = {"skip_first_two_layers": False}
SPARSE = {
    "selector": {"type": "quest", "token_budget": 64},
    "weight_estimator": {"type": "min_max_quant"},
    "weight_pruner": {"type": "top_p", "threshold": 0.9},
    "skip_first_two_layers": False,
}


def greedy(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 24, **more: object) -> torch.Tensor:
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **more)  # type: ignore[operator]
    return out[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("armed", [True, False], ids=["armed", "messages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models(family: str, armed: bool, client: tw.Client) -> None:
    model = make(family)
    want = {batch: greedy(model, prompts(batch, 70)) for batch in (1, 3)}
    with hf.enable(model, client, DENSE, fallback="raise", armed=armed) as twilight:
        for batch, tokens in want.items():
            assert torch.equal(greedy(model, prompts(batch, 70)), tokens)
            budgets = twilight.budgets()
            assert budgets.layers == ([1, 2] if family == "gemma3" else [0, 1, 2])
            # The first token is the prefill's.
            assert budgets.kept.shape[:3] == (23, len(budgets.layers), batch)
            assert (budgets.kept == budgets.lengths[:, None, :, None]).all()
            assert budgets.lengths[0].tolist() == [71 - 7 * row for row in range(batch)]
    assert not hasattr(model, "twilight")
    assert torch.equal(greedy(model, prompts(3, 70)), want[3])


def test_eager_attention_is_served(client: tw.Client) -> None:
    model = make("llama", "eager")
    want = greedy(model, prompts(3, 40))
    with hf.enable(model, client, DENSE, fallback="raise"):
        assert torch.equal(greedy(model, prompts(3, 40)), want)
    assert model.config._attn_implementation == "eager"


def test_budgets_tell_what_was_kept(client: tw.Client) -> None:
    model = make("llama")
    with hf.enable(model, client, {**SPARSE, "audit": 1.0}, fallback="raise") as twilight:
        assert "no decode step" in str(twilight.budgets())
        greedy(model, prompts(2, 400), 9)
        budgets = twilight.budgets()
        assert budgets.kept.shape == (8, 3, 2, 2)
        assert (budgets.kept <= budgets.candidates).all()
        assert (budgets.candidates < 100).all()
        assert set(budgets.paths.flat) == {tw.PATH_SPARSE}
        assert budgets.true_mass.shape == (8, 3, 2, 4)
        assert ((budgets.true_mass > 0) & (budgets.true_mass <= 1.0001)).all()
        np.testing.assert_allclose(budgets.mean(), budgets.kept[:, 2].mean())
        assert len(str(budgets).splitlines()) == 2 + 3 + 1  # a head, the layers, the mean


@pytest.mark.parametrize(
    "config",
    [
        {"compressor": {"type": "snap_kv", "window_size": 8, "max_capacity_prompt": 48}},
        {"selector": {"type": "h2o", "token_budget": 48}},
    ],
    ids=["snap_kv", "h2o"],
)
def test_methods_are_told_of_the_prefill(config: dict, client: tw.Client) -> None:
    model = make("llama")
    inputs = prompts(2, 100)
    own = greedy(model, inputs, 1)
    with hf.enable(model, client, {**config, "skip_first_two_layers": False}, fallback="raise") as twilight:
        assert torch.equal(greedy(model, inputs, 12)[:, :1], own)
        assert (twilight.budgets().kept < 80).all()


def test_the_forward_alone_can_use_a_cache(client: tw.Client) -> None:
    model = make("qwen3")
    ids = prompts(1, 90)["input_ids"]
    with torch.no_grad():
        want = model(ids).logits
        with hf.enable(model, client, DENSE, fallback="raise") as twilight:
            cache = twilight.new_cache(max_length=40)  # less than it comes to
            logits = [model(ids[:, :50], cache=cache).logits]
            logits += [model(ids[:, i : i + 1], cache=cache).logits for i in range(50, 70)]
            cache.crop(-6)  # as in assisted decoding
            logits = [torch.cat(logits, 1)[:, :64]]
            logits += [model(ids[:, 64:80], cache=cache).logits]
            logits += [model(ids[:, i : i + 1], cache=cache).logits for i in range(80, 90)]
            torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-3, atol=1e-3)
            assert twilight.budgets().steps == 30
            other = twilight.new_cache()
            model(ids[:, :20], cache=other)
            cache.release()
            model(ids[:, 20:21], cache=other)
            assert twilight.budgets().lengths.tolist() == [[21]]


def test_memory_is_lent_once(client: tw.Client) -> None:
    model = make("llama")
    with hf.enable(model, client, DENSE, fallback="raise", max_tokens=4096) as twilight:
        for batch, length in ((1, 30), (3, 200), (2, 64)):
            greedy(model, prompts(batch, length), 4)
        assert len(twilight.session.caches) == 1
        greedy(model, prompts(4, 1200), 4)  # more than there is
        assert len(twilight.session.caches) == 1


def test_sampling_takes_any_way(client: tw.Client) -> None:
    model = make("llama")
    inputs = prompts(2, 50)

    def sample() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=12, do_sample=True, top_k=20, temperature=1.3, num_return_sequences=2
        )

    want = sample()
    with hf.enable(model, client, DENSE, fallback="raise"):
        assert torch.equal(sample(), want)


def test_what_cannot_be_served_is_refused(client: tw.Client, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    with hf.enable(model, client, DENSE, fallback="raise"):
        with pytest.raises(tw.Unsupported, match="num_beams"):
            greedy(model, prompts(1, 20), num_beams=2)
        with pytest.raises(tw.InvalidArgument, match="disable"):
            hf.enable(model, client)
        inputs = prompts(2, 40)
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # padding on the right
        with caplog.at_level(logging.WARNING, "twilight_client"):
            greedy(model, inputs, 4)
        assert sum("pad on the left" in r.message for r in caplog.records) == 1
    hf.disable(model)  # without effect
    windows = make("mistral")
    windows.config.sliding_window = 16
    windows.config.layer_types = None
    with pytest.raises(tw.Unsupported, match="full attention"):
        hf.enable(windows, client)
    with pytest.raises(tw.InvalidArgument):
        hf.enable(model, client, {"selektor": {}})
    assert not hasattr(model, "twilight")


@pytest.mark.parametrize("armed", [True, False], ids=["armed", "messages"])
def test_the_daemon_dies_and_comes_back(armed: bool, program: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    inputs = prompts(2, 60)
    want = greedy(model, inputs, 40)

    class Murder:
        """A streamer, which generate tells of every token."""

        def __init__(self, daemon: tw.Daemon, session: tw.Session) -> None:
            self.daemon, self.session, self.tokens = daemon, session, 0

        def put(self, _: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 8:
                self.daemon.kill()
            if self.tokens == 20:
                self.daemon.start()
                self.session.wait_live(30)

        def end(self) -> None:
            pass

    with tw.Daemon("--log-level", "error", program=program) as daemon:
        with hf.enable(model, daemon.target, DENSE, armed=armed) as twilight:
            with caplog.at_level(logging.WARNING, "twilight_client"):
                # A streamer takes one sequence.
                one = {name: x[:1] for name, x in inputs.items()}
                assert torch.equal(greedy(model, one, 40, streamer=Murder(daemon, twilight.session)), want[:1])
            said = [r.message for r in caplog.records]
            assert len(said) == 2
            assert "away" in said[0]
            assert "back" in said[1]
            steps = twilight.budgets().steps
            assert 20 < steps < 35  # of 39
            assert twilight.fallbacks > 0
        with hf.enable(model, daemon.target, DENSE, armed=armed, fallback="raise"):
            greedy(model, inputs, 4)
            daemon.kill()
            with pytest.raises(tw.LeaseLost):
                greedy(model, inputs, 4)
