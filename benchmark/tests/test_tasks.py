import json
import random
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from benchmark import passkey, run
from benchmark.longbench import __main__ as longbench
from benchmark.model import Model
from benchmark.ruler.tasks import score, tasks


def test_fit() -> None:
    for most in range(3, 60):
        assert run.fit(lambda n: 3 * n, most, 1, 15) == min(15, most // 3)
    with pytest.raises(ValueError, match="too short"):
        run.fit(lambda n: 3 * n, 2, 1, 15)


def test_passkey(model: Model) -> None:
    made = list(passkey.examples(model, 500, 5, 60, seed=1))
    assert [x.prompt for x in made] == [x.prompt for x in passkey.examples(model, 500, 5, 60, seed=1)]
    assert [x.prompt for x in made] != [x.prompt for x in passkey.examples(model, 500, 5, 60, seed=2)]
    assert len({x.answers[0] for x in made}) == len({x.prompt for x in made}) == 5
    for example in made:
        key = example.answers[0]
        assert example.prompt.count(key) == 2
        assert 495 <= len(model.encode(example.prompt)) <= 500
        assert example.prompt[: -example.question].count(key) == 2  # is prefilled
        assert example.score(f" {key}. Remember") == 1
        assert example.score(f" 0{int(key) + 1} {key}") == 0
        assert example.score("none") == 0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    draw = random.Random(1)
    sentences = (f"Word{draw.randint(0, 99)} follows word{draw.randint(0, 99)}." for _ in range(4000))
    (tmp_path / "essays.txt").write_text(" ".join(sentences))
    paragraphs = [
        {
            "context": f"The answer of question {i} is answer{i}. " * 3,
            "qas": [
                {"question": f"What is {i}?", "answers": [{"text": f"answer{i}"}], "is_impossible": i % 2 == 1},
            ],
        }
        for i in range(40)
    ]
    articles = [{"paragraphs": paragraphs[i : i + 4]} for i in range(0, 40, 4)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    rows = [
        {"question": f"Who is {i}?", "answer": f"answer{i}", "context": [[f"Title {i}", [f"It is answer{i}."]]]}
        for i in range(40)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize("name", list(tasks(Path(), 0)))
def test_ruler(name: str, texts: Path, model: Model) -> None:
    tokens = 2000
    task = tasks(texts, tokens)[name]

    def prompt(size: int, index: int = 0) -> str:
        return task.make(random.Random(index), size, index).prompt

    size = run.fit(lambda n: len(model.encode(prompt(n))), tokens, task.smallest, 2 * tokens)
    made = task.make(random.Random(0), size, 0)
    assert made == task.make(random.Random(0), size, 0)
    assert made.prompt != prompt(size, 1)
    assert 0.8 * tokens <= len(model.encode(made.prompt)) <= tokens or (name.startswith("qa") and size >= 40)

    assert made.answers
    assert all(answer in made.prompt for answer in made.answers)
    assert len(set(made.answers)) == {
        "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3,
    }.get(name, 1)  # fmt: skip
    assert score(" ".join(made.answers).upper(), made.answers, task.any_answer) == 1
    assert score("", made.answers, task.any_answer) == 0
    assert score(made.answers[0], made.answers, task.any_answer) == pytest.approx(
        1 if task.any_answer else sum(a in made.answers[0] for a in made.answers) / len(made.answers)
    )


def test_ruler_answers_are_right(texts: Path) -> None:
    known = tasks(texts, 4096)
    made = known["cwe"].make(random.Random(3), 60, 0)
    listed = made.prompt.rsplit("ones that appear most often.\n", 1)[1].split("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (\S+)", listed))
    assert {word for word, _ in counts.most_common(10)} == set(made.answers)

    made = known["fwe"].make(random.Random(3), 2000, 0)
    coded = made.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
    counts = Counter(word for word in coded.split() if word != "...")
    assert [word for word, _ in counts.most_common(3)] == made.answers

    made = known["vt"].make(random.Random(3), 20, 0)
    chain = made.prompt.rsplit("Memorize", 1)[1]
    assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", chain))
    asked = re.search(r"assigned the value (\d+)", chain)
    assert asked is not None
    for name in made.answers:
        while name in assigned:
            name = assigned[name]
        assert name == asked[1]

    made = known["niah_multikey_3"].make(random.Random(3), 50, 0)
    key = made.prompt.split("for ")[-1].split(" mentioned")[0]
    assert f"uuids for {key} is: {made.answers[0]}." in made.prompt


@pytest.mark.parametrize("name", ["niah_single_2", "qa_1", "qa_2"])
def test_ruler_names_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing: put .* there.* or leave the task out by --tasks"):
        tasks(tmp_path, 1000)[name].make(random.Random(0), 100, 0)


def test_longbench(tmp_path: Path, model: Model) -> None:
    row = {"input": "Who?", "context": "Ann. " * 50, "answers": ["Ann"], "all_classes": None, "_id": "7"}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "_id": "8"}) + "\n")
    arguments = Namespace(tasks=["qasper"], data=tmp_path, most=1, chat=False, max_tokens=40)
    (example,) = longbench.examples(model, arguments)
    assert example.id == "7"
    assert example.answer_tokens == 128
    assert example.prompt.endswith("Question: Who?\n\nAnswer:")
    assert example.score("ann!") == 1
    tokens, cut = example.tokens(model)
    whole = model.encode(example.prompt)
    assert tokens == whole[:20] + whole[-20:]
    assert 0 < len(tokens) - cut <= longbench.QUESTION
    arguments.tasks = ["lcc"]
    with pytest.raises(FileNotFoundError, match="--data names the folder"):
        list(longbench.examples(model, arguments))
