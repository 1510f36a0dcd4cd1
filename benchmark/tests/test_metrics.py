import random

import pytest

from benchmark.longbench.metrics import METRICS, accuracy, edit_similarity, f1, retrieval, rouge_l, score


def test_f1() -> None:
    assert f1("The cat sat.", "a cat, SAT") == 1
    assert f1("cat", "dog") == 0
    assert f1("", "dog") == 0
    # common: big, cat; 2 of 3 predicted and of 2 true words
    assert f1("a big black cat", "big cat") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    # a word counts as often as it comes in both
    assert f1("no no no", "no no yes") == pytest.approx(2 / 3)


def test_rouge_l() -> None:
    assert rouge_l("the police killed the gunman", "police killed the gunman") == pytest.approx(1, abs=1e-6)
    assert rouge_l("", "x") == rouge_l("...", "x") == rouge_l("x", "") == 0
    # longest common subsequence: police the gunman, of 4 and 4 words
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4, abs=1e-6)


def test_numbers() -> None:
    assert METRICS["passage_count"]("17", "17", ()) == 1
    assert METRICS["passage_count"]("17 or 18", "17", ()) == 0.5
    assert METRICS["passage_count"]("many", "17", ()) == 0
    assert retrieval("Paragraph 3", "Paragraph 3") == 1
    assert retrieval("Paragraph 30, not 3", "Paragraph 3") == 0.5
    with pytest.raises(ValueError, match="Paragraph N"):
        retrieval("3", "3")


def test_edit_similarity() -> None:
    assert edit_similarity("\n# a comment\n```python\nx = 1\ny = 2", "x = 1") == 1
    assert edit_similarity("// only\n# comments", "x") == 0
    # 4 of 5 + 5 characters match
    assert edit_similarity("x = 2", "x = 1") == 0.8


def test_accuracy() -> None:
    classes = ["Date", "Food", "Dog food"]
    assert accuracy("It is Food.", "Food", classes) == 1
    assert accuracy("Date or Food", "Food", classes) == 0.5
    assert accuracy("Date", "Food", classes) == 0
    assert accuracy("Dog food and Date", "Dog food", classes) == 0.5  # food is no part of Food


def test_score_takes_the_best_answer_and_the_first_line() -> None:
    assert score("qasper", "yes", ["no", "yes"]) == 1
    assert score("triviaqa", "\nParis\nQuestion: next", ["Paris"]) == 1
    assert score("qasper", "Paris\nQuestion", ["Paris"]) < 1


@pytest.mark.parametrize("task", sorted(METRICS))
def test_scores_are_shares(task: str) -> None:
    draw = random.Random(task)
    words = ["Paragraph 1", "Paragraph 2", "2", "the", "cat", "sat", ".", "x = 1", "#", "\n"]
    for _ in range(200):
        prediction = " ".join(draw.choices(words, k=draw.randint(0, 12)))
        answer = "Paragraph 2" if task == "passage_retrieval_en" else " ".join(draw.choices(words[:6], k=3))
        assert 0 <= score(task, prediction, [answer], ["the", "cat"]) <= 1
    if METRICS[task] is not accuracy:
        perfect = "Paragraph 2" if task == "passage_retrieval_en" else "2" if task == "passage_count" else "cat sat"
        assert score(task, perfect, [perfect]) == pytest.approx(1, abs=1e-6)
