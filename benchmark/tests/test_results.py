from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmark import run, summarize
from benchmark.results import Results, read
from benchmark.tally import Tally


@dataclass
class Fake:
    """An example that scores the length of its id, and a model that counts prefills."""

    id: str
    task: str = "t"
    fails: bool = False

    def prefix(self, model: Any) -> list[int]:
        return [1]

    def run(self, model: Any, decoder: Any) -> dict[str, Any]:
        if self.fails:
            raise KeyboardInterrupt
        return {"score": len(self.id)}


@dataclass
class FakeModel:
    prefills: int = 0
    decoded: list[str] = field(default_factory=list[str])

    def prefill(self, tokens: Sequence[int]) -> None:
        self.prefills += 1


@dataclass(frozen=True)
class FakeMethod(run.Method):
    def decoder(self, model: Any, prefix: Any, client: Any) -> AbstractContextManager[Any]:
        model.decoded.append(self.name)
        tally = Tally()
        if self.name != run.DENSE:
            tally.add(2, [100, 200], [10, 20], [0.9, 0.8, 1.0, 0.7], dense=1)
            tally.add(1, [9999], [9999], [0.0])
        return nullcontext(type("Decoder", (), {"tally": tally})())


WAYS = [FakeMethod("dense", None), FakeMethod("a", {}), FakeMethod("b", {})]


def go(folder: Path, examples: Sequence[Fake], ways: Sequence[run.Method] = WAYS) -> FakeModel:
    model = FakeModel()
    run.run(model, examples, ways, Results(folder, "test", "m"), None)  # type: ignore[arg-type]
    return model


def test_resumes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, [Fake("x"), Fake("yy", fails=True)])
    broken = tmp_path / "result_test/m/a/t.jsonl"
    broken.write_text(broken.read_text() + '{"id": "yy", "sco')  # cut off while it was written
    again = go(tmp_path, [Fake("x"), Fake("yy"), Fake("zzz")])
    assert again.prefills == 2  # x is done
    assert go(tmp_path, [Fake("x"), Fake("yy"), Fake("zzz")]).prefills == 0
    more = go(tmp_path, [Fake("x")], [*WAYS, FakeMethod("c", {})])
    assert more.decoded == ["c"]

    rows = read(tmp_path / "result_test/m")
    assert {name: [row["id"] for row in tasks["t"]] for name, tasks in rows.items()} == {
        "dense": ["x", "yy", "zzz"], "a": ["x", "yy", "zzz"], "b": ["x", "yy", "zzz"], "c": ["x"],
    }  # fmt: skip


def test_refuses_other_settings(tmp_path: Path) -> None:
    results = Results(tmp_path, "test", "m")
    results.begin("a", {"p": 0.85})
    results.begin("a", {"p": 0.85})
    with pytest.raises(ValueError, match=r"move .* away"):
        results.begin("a", {"p": 0.95})


def test_summary(tmp_path: Path) -> None:
    go(tmp_path, [Fake("x"), Fake("yyy")])
    folder = tmp_path / "result_test/m"
    dense, a, _ = summarize.lines([folder])
    assert (dense.method, dense.examples, dense.score, dense.kept, dense.mass) == ("dense", 2, 2, None, None)
    assert (a.candidates, a.kept, a.dense_rows) == (150, 15, 2)
    assert a.mass == pytest.approx(0.85)
    assert summarize.table([folder]).splitlines()[2:4] == [
        "| test | m | t | dense | 2 | 2.000 |  |  |  |  |",
        "| test | m | t | a | 2 | 2.000 | 150 | 15.0 | 0.850 | 2 |",
    ]
    picture = tmp_path / "scores.svg"
    summarize.plot([folder], picture)
    drawn = picture.read_text()
    assert "mean tokens kept" in drawn
    summarize.plot([folder], picture)
    assert picture.read_text() == drawn
    with pytest.raises(FileNotFoundError, match="run a benchmark first"):
        summarize.table([tmp_path])
