"""RULER's tasks, written anew from its description; prompts and sizes are RULER's.

Each task makes a text of a given size, whatever that counts, for a prompt that fits a number of tokens. Words
are those of the package wonderwords, as in RULER. Sentences of essays are split at their marks, not by a
trained model.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import pi
from pathlib import Path
from typing import Any, Protocol

_PROMPTS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "third_party" / "ruler" / "prompts.json").read_text()
)

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Made:
    """A prompt up to where the answer begins, and all that the answer must name, or may (qa)."""

    prompt: str
    answers: list[str]


class Task(Protocol):
    """Makes prompts."""

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer."""
        ...

    @property
    def smallest(self) -> int:
        """The smallest size."""
        ...

    @property
    def any_answer(self) -> bool:
        """Whether one answer is enough."""
        ...

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        """Makes prompt number index. The same draws and index make the same prompt."""
        ...


@cache
def words(*kinds: str) -> list[str]:
    """Returns the words of a kind: noun, adjective, verb."""
    try:
        folder = files("wonderwords") / "assets"
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("RULER's words are in the package wonderwords: install it") from e
    found: set[str] = set()
    for kind in kinds:
        found.update((folder / f"{kind}list.txt").read_text().split())
    return sorted(found)


def value(draw: random.Random, kind: str) -> str:
    """Draws a needle's key or value."""
    if kind == "numbers":
        return str(draw.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(words('adjective'))}-{draw.choice(words('noun'))}"


def spread(draw: random.Random, sentences: Sequence[str], needles: Sequence[str]) -> list[str]:
    """Puts needles between sentences, in their order, at different of 40 evenly spread depths."""
    depths = sorted(draw.sample([round(100 * i / 39) for i in range(40)], len(needles)))
    result: list[str] = []
    last = 0
    for depth, needle in zip(depths, needles, strict=True):
        place = len(sentences) * depth // 100
        result += [*sentences[last:place], needle]
        last = place
    return [*result, *sentences[last:]]


def insert(draw: random.Random, lines: list[str], needles: Sequence[str]) -> list[str]:
    """Puts needles before different lines, in their order."""
    places = sorted(draw.sample(range(len(lines)), len(needles)))
    for shift, (place, needle) in enumerate(zip(places, needles, strict=True)):
        lines.insert(place + shift, needle)
    return lines


@dataclass(frozen=True)
class Needles:
    """Needles in a haystack of lines of filler, of other needles, or of essays. Size counts lines, or words
    of the essays."""

    haystack: str
    """noise, needle or essay."""
    essays: Callable[[], list[str]]
    """Returns their words."""
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"
    answer_tokens: int = _PROMPTS["niah"]["tokens_to_generate"]
    any_answer: bool = False

    @property
    def smallest(self) -> int:
        return 100 if self.haystack == "essay" else max(self.keys, self.queries) * self.values

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        def needle(key: str, hidden: str) -> str:
            return f"One of the special magic {self.value_kind} for {key} is: {hidden}."

        hidden = {
            value(draw, self.key_kind): [value(draw, self.value_kind) for _ in range(self.values)]
            for _ in range(max(self.keys, self.queries))
        }
        needles = [needle(key, one) for key, some in hidden.items() for one in some]
        draw.shuffle(needles)
        if self.haystack == "essay":
            essays = self.essays()
            text = " ".join((essays * (size // len(essays) + 1))[:size])
            context = " ".join(spread(draw, re.split(r"(?<=[.!?])\s+", text), needles))
        elif self.haystack == "noise":
            context = "\n".join(insert(draw, [FILLER] * size, needles))
        else:
            lines = [needle(value(draw, self.key_kind), value(draw, self.value_kind)) for _ in range(size)]
            context = "\n".join(insert(draw, lines, needles))

        asked = draw.sample(list(hidden), self.queries)
        template, kind = _template("niah"), self.value_kind
        if self.queries * self.values == 1:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind[:-1]
        query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
        prompt = template.format(type_needle_v=kind, context=context, query=query)
        return Made(prompt, [one for key in asked for one in hidden[key]])


@dataclass(frozen=True)
class Variables:
    """A chain of assignments among filler, after an example of one. Size counts lines of filler."""

    hops: int = 4
    example_lines: int = 5
    answer_tokens: int = _PROMPTS["variable_tracking"]["tokens_to_generate"]
    any_answer: bool = False

    @property
    def smallest(self) -> int:
        return self.hops + 1

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        example, names = self._chain(draw, self.example_lines, 3)
        prompt, answers = self._chain(draw, size, 5)
        return Made(f"{example} {' '.join(names)}\n\n{prompt}", answers)

    def _chain(self, draw: random.Random, lines: int, letters: int) -> tuple[str, list[str]]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(draw.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        start = str(draw.randint(10_000, 99_999))
        chain = [f"VAR {names[0]} = {start}"]
        chain += [f"VAR {later} = VAR {before} " for before, later in pairwise(names)]
        context = "\n".join(insert(draw, [FILLER] * lines, chain)).replace(". \n", ".\n")
        template = _template("variable_tracking")
        return template.format(context=context, query=start, num_v=len(names)), names


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come more often than the others, after an example. Size counts
    different words."""

    often: int = 30
    seldom: int = 3
    common: int = 10
    answer_tokens: int = _PROMPTS["common_words_extraction"]["tokens_to_generate"]
    smallest: int = 11
    any_answer: bool = False

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        example, words_of_example = self._list(draw, 40, 10, 3)
        prompt, answers = self._list(draw, size, self.often, self.seldom)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(words_of_example, 1))
        return Made(f"{example} {numbered}\n{prompt}", answers)

    def _list(self, draw: random.Random, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        known = words("noun", "adjective", "verb")
        if size > len(known):  # longer lists repeat the seldom words
            seldom = -(-seldom * size // len(known))
        chosen = draw.sample(known, min(size, len(known)))
        common, others = chosen[: self.common], chosen[self.common :]
        listed = common * often + others * seldom
        draw.shuffle(listed)
        context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        return _template("common_words_extraction").format(context=context), common


@dataclass(frozen=True)
class FrequentWords:
    """Made-up words whose frequencies follow a zeta distribution; the most frequent is dots, which do not
    count. Size counts words."""

    vocabulary: int
    letters: int = 6
    answer_tokens: int = _PROMPTS["freq_words_extraction"]["tokens_to_generate"]
    smallest: int = 100
    any_answer: bool = False

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        made: set[str] = set()
        while len(made) < self.vocabulary:
            made.add("".join(draw.choices(string.ascii_lowercase, k=self.letters)))
        ranked = sorted(made)
        draw.shuffle(ranked)
        ranked[0] = "..."
        zeta = pi**2 / 6  # of 2
        coded = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size / rank**2 / zeta))]
        draw.shuffle(coded)
        return Made(_template("freq_words_extraction").format(context=" ".join(coded)), ranked[1:4])


@dataclass(frozen=True)
class Reading:
    """A question about one of many documents. Size counts documents."""

    documents: Callable[[], Documents]
    answer_tokens: int = _PROMPTS["qa"]["tokens_to_generate"]
    smallest: int = 1
    any_answer: bool = True

    def make(self, draw: random.Random, size: int, index: int) -> Made:
        all_documents = self.documents()
        question = all_documents.questions[index % len(all_documents.questions)]
        shown = list(question.documents)
        others = [d for d in question.near if d not in shown]
        taken = set(shown) | set(others)
        rest = [d for d in range(len(all_documents.texts)) if d not in taken]
        draw.shuffle(others)
        draw.shuffle(rest)
        shown += (others + rest)[: max(0, size - len(shown))]
        draw.shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{all_documents.texts[d]}" for i, d in enumerate(shown, 1))
        return Made(_template("qa").format(context=context, query=question.text), list(question.answers))


@dataclass(frozen=True)
class Asked:
    """A question, and the documents, by index, that answer it or are of the same article."""

    text: str
    answers: Sequence[str]
    documents: Sequence[int]
    near: Sequence[int] = ()


@dataclass(frozen=True)
class Documents:
    """Texts and questions about them."""

    texts: list[str]
    questions: list[Asked]


def squad(file: Path) -> Documents:
    """Reads SQuAD 2.0's dev-v2.0.json; questions without an answer are left out."""
    articles = _read(file, "dev-v2.0.json of SQuAD 2.0")["data"]
    texts = sorted({p["context"] for a in articles for p in a["paragraphs"]})
    at = {text: i for i, text in enumerate(texts)}
    questions = [
        Asked(
            q["question"],
            [answer["text"] for answer in q["answers"]],
            [at[p["context"]]],
            [at[other["context"]] for other in a["paragraphs"]],
        )
        for a in articles
        for p in a["paragraphs"]
        for q in p["qas"]
        if not q.get("is_impossible", False)
    ]
    return Documents(texts, questions)


def hotpotqa(file: Path) -> Documents:
    """Reads HotpotQA's hotpot_dev_distractor_v1.json."""
    rows = _read(file, "hotpot_dev_distractor_v1.json of HotpotQA")
    contexts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in rows]
    texts = sorted({text for context in contexts for text in context})
    at = {text: i for i, text in enumerate(texts)}
    questions = [
        Asked(row["question"], [row["answer"]], [at[text] for text in context])
        for row, context in zip(rows, contexts, strict=True)
    ]
    return Documents(texts, questions)


def _read(file: Path, what: str) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: put {what} there, or leave the task out by --tasks")
    return json.loads(file.read_text())


def _template(name: str) -> str:
    return _PROMPTS[name]["template"] + _PROMPTS[name]["answer_prefix"]


def tasks(folder: Path, tokens: int) -> dict[str, Task]:
    """Returns the 13 tasks at a length. folder has what is not made here: essays.txt, squad.json and
    hotpotqa.json; it is read when a task needs it."""

    @cache
    def essays() -> list[str]:
        file = folder / "essays.txt"
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: put essays to hide needles in there, as text, or leave the task out by --tasks"
            )
        return file.read_text().split()

    @cache
    def read_squad() -> Documents:
        return squad(folder / "squad.json")

    @cache
    def read_hotpotqa() -> Documents:
        return hotpotqa(folder / "hotpotqa.json")

    short = tokens < 4096
    return {
        "niah_single_1": Needles("noise", essays),
        "niah_single_2": Needles("essay", essays),
        "niah_single_3": Needles("essay", essays, value_kind="uuids"),
        "niah_multikey_1": Needles("essay", essays, keys=4),
        "niah_multikey_2": Needles("needle", essays),
        "niah_multikey_3": Needles("needle", essays, key_kind="uuids", value_kind="uuids"),
        "niah_multivalue": Needles("essay", essays, values=4),
        "niah_multiquery": Needles("essay", essays, queries=4),
        "vt": Variables(),
        "cwe": CommonWords(often=6, seldom=1) if short else CommonWords(),
        "fwe": FrequentWords(vocabulary=max(10, tokens // 50)),
        "qa_1": Reading(read_squad),
        "qa_2": Reading(read_hotpotqa),
    }


def score(answer: str, answers: Sequence[str], any_answer: bool) -> float:
    """The share of the answers that are named, or whether any is."""
    named = [one.lower() in answer.lower() for one in answers]
    return float(any(named)) if any_answer else sum(named) / len(named)
