from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmark import perplexity, run
from benchmark.efficiency import tpot
from benchmark.model import Model


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


def test_time_per_token(
    text: Path, config: Path, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--text", text, "--tokens", 100, 200, "--steps", 3, "--configs", config,
            "--twilightd", program)  # fmt: skip
    tpot.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[f"| {n}", m] for n in (100, 200) for m in ("dense", "quest")]
    for dense, quest in (rows[:2], rows[2:]):
        assert float(quest[4]) == pytest.approx(float(dense[2]) / float(quest[2]), abs=0.02)
