"""LongBench's scores (Bai et al., arXiv 2308.14508, section 4), as its evaluation computes them.

Every score takes a prediction, one true answer and the classes of the task, and lies in [0, 1].
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from rouge import Rouge

Score = Callable[[str, str, Sequence[str]], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> list[str]:
    """Returns the words of a text without case, punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, as in SQuAD."""
    predicted, true = normalize(prediction), normalize(answer)
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L's F over sentences, by the package that LongBench uses; 0 where it finds no words."""
    if not prediction.replace(".", "").strip() or not answer.replace(".", "").strip():
        return 0.0
    scores: Any = Rouge(["rouge-l"]).get_scores(prediction, answer)
    return scores[0]["rouge-l"]["f"]


def _share_of_numbers(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are the answer."""
    return _share_of_numbers(prediction, answer)


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that name the paragraph of "Paragraph N"."""
    paragraph = re.search(r"Paragraph (\d+)", answer)
    if paragraph is None:
        raise ValueError(f'answer is {answer!r}, expected "Paragraph N"')
    return _share_of_numbers(prediction, paragraph[1])


def edit_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Likeness of the first line that is code, in hundredths."""
    for line in prediction.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            break
    else:
        return 0.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def accuracy(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the classes that the prediction names, if the answer is among them. Names that are part of
    the answer's do not count."""
    named = [c for c in classes if c in prediction and (c == answer or c not in answer)]
    return 1 / len(named) if answer in named else 0.0


METRICS: dict[str, Score] = {
    "narrativeqa": f1,
    "qasper": f1,
    "multifieldqa_en": f1,
    "hotpotqa": f1,
    "2wikimqa": f1,
    "musique": f1,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "trec": accuracy,
    "triviaqa": f1,
    "samsum": rouge_l,
    "passage_count": count,
    "passage_retrieval_en": retrieval,
    "lcc": edit_similarity,
    "repobench-p": edit_similarity,
}
"""The English tasks of LongBench."""

FIRST_LINE = {"trec", "triviaqa", "samsum"}
"""Tasks with examples in the prompt: what follows the first line of an answer is the next example."""


def score(task: str, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Scores a prediction by the answer that it is most like."""
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[task](prediction, answer, classes) for answer in answers), default=0.0)
