from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from benchmark import perplexity, run
from benchmark.efficiency import made, tpot
from benchmark.model import Model, Prefix


@pytest.fixture
def text(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text of a model that every benchmark now loads."""
    monkeypatch.setattr(run, "load", lambda _: model)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{i * i % 61}" for i in range(400)))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "quest.json"
    file.write_text(json.dumps({"selector": {"type": "quest", "token_budget": 64}}))
    return file


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])


def test_perplexity(
    text: Path,
    config: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(monkeypatch, "--text", text, "--span", "300:310", "--configs", config, "--emulate", "--audit", 1,
            "--twilightd", program, "--out", tmp_path)  # fmt: skip
    perplexity.main()
    table = capsys.readouterr().out
    scores = {m[1]: float(m[2]) for m in re.finditer(r"\| text \| (\w+) \| 1 \| ([\d.]+)", table)}
    assert list(scores) == ["dense", "quest", "quest_emulated"]
    assert scores["quest"] == pytest.approx(scores["quest_emulated"], rel=5e-3)
    row = json.loads((tmp_path / "result_perplexity/tiny/quest/text.jsonl").read_text())
    assert row["kept"] < 64 < row["tokens"]
    assert 0 < row["mass"] < 1

    perplexity.main()  # has nothing left to do
    assert capsys.readouterr().out == table
    command(monkeypatch, "--text", text, "--configs", config, "--dtype", "float16", "--out", tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        perplexity.main()


def rows(output: str) -> list[list[str]]:
    """The cells of the table that ends an output."""
    return [line.strip("| ").split(" | ") for line in output.split(tpot.ROW)[1].splitlines()[2:]]


def check_times(output: str, lengths: tuple[int, ...]) -> None:
    table = rows(output)
    assert [row[:2] for row in table] == [[str(n), m] for n in lengths for m in ("dense", "quest")]
    for dense, quest in zip(table[::2], table[1::2], strict=True):
        assert float(quest[4]) == pytest.approx(float(dense[2]) / float(quest[2]), abs=0.02)
        for _, _, median, spread, *_ in (dense, quest):
            low, high = map(float, spread.split(" - "))
            assert low <= float(median) <= high
        assert 0 < float(quest[5]) <= 64


def test_time_per_token(
    text: Path, config: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--text", text, "--tokens", 100, 200, "--steps", 3, "--configs", config,
            "--twilightd", program)  # fmt: skip
    tpot.main()
    check_times(capsys.readouterr().out, (100, 200))


def test_time_per_token_of_a_shape(
    config: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--shape", "tiny", "--tokens", 500, 2000, "--steps", 3, "--configs", config,
            "--twilightd", program)  # fmt: skip
    tpot.main()
    output = capsys.readouterr().out
    check_times(output, (500, 2000))
    assert "tiny in float32 on cpu" in output
    assert "by armed steps" in output
    assert "flash_attention_2 is left out: the model is on cpu" in output


def test_what_does_not_fit_is_left_out(
    config: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = made.context

    def small(model: Model, tokens: int) -> Prefix:
        if tokens > 300:
            raise torch.OutOfMemoryError("no room")
        return context(model, tokens)

    monkeypatch.setattr(made, "context", small)
    command(monkeypatch, "--shape", "tiny", "--tokens", 300, 400, "--steps", 2, "--configs", config,
            "--twilightd", program)  # fmt: skip
    tpot.main()
    output = capsys.readouterr().out
    check_times(output, (300,))
    for method in ("dense", "quest"):
        assert f"{method} at 400 tokens is left out: no room" in output


def test_methods_that_look_at_a_prefill_need_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "h2o.json"
    file.write_text(json.dumps({"selector": {"type": "h2o"}}))
    command(monkeypatch, "--shape", "tiny", "--configs", file)
    with pytest.raises(SystemExit):
        tpot.main()
    assert "h2o looks at the prefill" in capsys.readouterr().err


def test_made_statistics() -> None:
    """Logits and keys are as stated, and so are a decoded token's keys."""
    model, tokens = made.make("tiny", "cpu", "float32"), 8192
    prefix = made.context(model, tokens)
    seen: dict[int, torch.Tensor] = {}

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        seen[module.layer_idx] = query[0, :, 0]
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("test_made", attend)
    with model.dense(prefix, "test_made") as decoder:
        queries = []
        for token in range(200):
            decoder.feed([token])
            queries.append(seen[1])
    drawn = torch.stack(queries, 1).view(2, 3, 200, 16)  # KV heads, group, tokens, dim
    keys = prefix.layers[1][0][0]
    logits = torch.einsum("hgqd,htd->hgqt", drawn, keys) / 4
    torch.testing.assert_close(logits.std(-1).mean(-1).flatten(), torch.linspace(*made.SPREADS, 6), rtol=0.1, atol=0)
    unit = drawn / drawn.std((-1, -2), keepdim=True)
    assert float((unit[:, 0] * unit[:, 1]).mean()) == pytest.approx(made.CORRELATION, abs=0.1)
    assert float(keys.var()) == pytest.approx(1, abs=0.02)
    pages = keys.view(2, -1, made.PAGE, 16)
    assert float((pages[:, :, 0] * pages[:, :, 1]).mean()) == pytest.approx(made.SHARED, abs=0.05)
