"""Suite `ruler`: the 13 tasks of RULER (arXiv 2404.06654), made from the user's own text.

Parameters and scoring follow the paper; the wording of the prompts is our own. A task is a function that makes a
sample of a given size from a seeded generator. `fill` finds the size for which prompt, answer prefix and generation
budget together have the asked length in the model's own tokenizer and do not exceed it.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

from ...errors import UserError
from ...results.statistics import Metric
from ...results.store import Record
from ..model import Directory, Question, Subject, Tick, digest
from .ahead import made_ahead
from .haystack import KEPT, NOISE, Prose, fill, noise, sentences
from .items import read_items
from .ppl import check_length
from .suite import Done, Item, left
from .words import ADJECTIVES, NOUNS, compound, compounds

SEED = 42
DEPTHS = tuple(100 * i / 39 for i in range(40))  # per cent, the possible places of needles in an essay
EXAMPLE_TOKENS = 500  # the largest number of tokens of the solved example of variable tracking
EXAMPLE_ROUNDS = 3  # most repetitions of the filler in that example
HOPS = 4
COMMON = 10  # common words
SHORT = 4096  # tokens; prompts below this length have smaller lists of common words
NEAR = 0.98  # a prompt must have this share of the asked length


@dataclass(frozen=True)
class Sample:
    """A prompt that ends with the beginning of its answer, and the right answers."""

    text: str
    answer_prefix: str
    outputs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.text + self.answer_prefix


@dataclass(frozen=True)
class Source:
    """The material of a task's samples: prose and, for question answering, documents and questions."""

    prose: Prose
    length: int
    index: int
    qa: QuestionSet | None = None
    count: Callable[[str], int] = len  # tokens of a text


Task = Callable[[random.Random, int, Source], Sample]  # (generator, size, source)


# ---------------------------------------------------------------------------------------------------
# Needles in a haystack


@dataclass(frozen=True)
class Niah:
    """The kinds of haystack, keys and values, and how many are hidden and asked for."""

    haystack: str  # noise, essay or needles
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, rng: random.Random, size: int, source: Source) -> Sample:
        keys = _distinct(lambda: _token(self.key, rng), max(self.keys, self.queries))
        hidden = {key: _distinct(lambda: _token(self.value, rng), self.values) for key in keys}
        needles = [self._needle(key, value) for key, values in hidden.items() for value in values]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        context = self._hide(rng, needles, size, source, {*keys, *itertools.chain(*hidden.values())})
        outputs = tuple(value for key in asked for value in hidden[key])
        return self._ask(context, _listed(asked), outputs)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value}s for {key} is: {value}."

    def _hide(self, rng: random.Random, needles: list[str], size: int, source: Source, used: set[str]) -> str:
        if self.haystack == "essay":
            hay = sentences(source.prose.take(size, rng.randrange(source.prose.words)))
            depths = sorted(rng.sample(DEPTHS, len(needles)))
            return " ".join(insert(hay, needles, [round(len(hay) * depth / 100) for depth in depths]))
        if self.haystack == "noise":
            hay = noise(size).split("\n")
        else:
            # A line counts as many noise words of the same length; noise fills the rest of the last line.
            lines, rest = divmod(size, max(1, source.count(needles[0]) * len(NOISE.split()) // source.count(NOISE)))
            hay = [self._distractor(rng, used) for _ in range(lines)] + ([noise(rest)] if rest else [])
        return "\n".join(insert(hay, needles, sorted(rng.randint(0, len(hay)) for _ in needles)))

    def _distractor(self, rng: random.Random, used: set[str]) -> str:
        key = _unused(lambda: _token(self.key, rng), used)
        return self._needle(key, _unused(lambda: _token(self.value, rng), used))

    def _ask(self, context: str, asked: str, outputs: tuple[str, ...]) -> Sample:
        kind = f"{self.value}s"
        if len(outputs) == 1:
            return Sample(
                f"A special magic {self.value} is hidden in the text below. Memorise it: there will be a question "
                f"about it.\n{context}\nWhich special magic {self.value} does the text above give for {asked}?",
                f" The special magic {self.value} that the text above gives for {asked} is",
                outputs,
            )
        return Sample(
            f"Special magic {kind} are hidden in the text below. Memorise them: there will be a question about "
            f"them.\n{context}\nWhich are all the special magic {kind} that the text above gives for {asked}?",
            f" All the special magic {kind} that the text above gives for {asked} are",
            outputs,
        )


def insert(hay: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """`hay` with needles[i] inserted before hay[places[i]]; places ascend."""
    result: list[str] = []
    start = 0
    for needle, place in zip(needles, places, strict=True):
        result += [*hay[start:place], needle]
        start = place
    return [*result, *hay[start:]]


def _token(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4)) if kind == "uuid" else compound(rng)


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def _unused(draw: Callable[[], str], used: Iterable[str] | str) -> str:
    """The first draw that is not in `used`."""
    while (drawn := draw()) in used:
        pass
    return drawn


def _listed(names: Sequence[str]) -> str:
    """'a', 'a and b', or 'a, b, c, and d'."""
    if len(names) < 3:
        return " and ".join(names)
    return ", ".join(names[:-1]) + f", and {names[-1]}"


# ---------------------------------------------------------------------------------------------------
# Variables, common and frequent words


def variable_tracking(rng: random.Random, size: int, source: Source) -> Sample:
    """One chain of assignments in noise of `size` words, after a solved example with other names."""
    seed = rng.random()

    def example(words: int) -> str:
        shown = _chain(random.Random(seed), words)
        return f"{shown.prompt} {' '.join(shown.outputs)}\n\n"

    most = EXAMPLE_ROUNDS * len(NOISE.split())
    before = example(fill(example, source.count, EXAMPLE_TOKENS, "the example of vt", most=most))
    asked = _chain(rng, size, before)
    return Sample(before + asked.text, asked.answer_prefix, asked.outputs)


def _chain(rng: random.Random, words: int, before: str = "") -> Sample:
    """A chain in noise; the text `before` contains neither its value nor its names."""
    value = _unused(lambda: str(rng.randint(10_000, 99_999)), before)
    names = _distinct(lambda: _unused(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), before), HOPS + 1)
    right_sides = [value, *(f"VAR {name}" for name in names)]
    needles = [f"VAR {name} = {right}" for name, right in zip(names, right_sides, strict=False)]
    hay = noise(words).split("\n") if words else []
    lines = insert(hay, needles, sorted(rng.randint(0, len(hay)) for _ in needles))
    text = "\n".join(lines)
    return Sample(
        f"Variables are assigned in the text below. Keep track of them.\n{text}\n"
        f"Question: which variables have the value {value}?",
        f" Answer: the {len(names)} variables with the value {value} are",
        tuple(names),
    )


def common_words(rng: random.Random, size: int, source: Source) -> Sample:
    """A numbered list in which ten words appear more often than `size` others, after a solved example.

    None of the ten is a part of another word of the list, because that word would count as a right answer.
    """
    short = source.length < SHORT
    words = _list_words(rng, source)
    total, often, seldom = (20, 3, 1) if short else (40, 10, 3)
    shown = _word_list(rng, words[:10], words[10:total], often, seldom)
    common = list(itertools.islice(_apart(words[total:]), COMMON))
    others = (word for word in words[total:] if not any(one in word for one in common))
    asked = _word_list(rng, common, list(itertools.islice(others, size)), *((6, 1) if short else (30, 3)))
    before = f"{shown.prompt} {_numbered(shown.outputs)}\n\n"
    return Sample(before + asked.text, asked.answer_prefix, asked.outputs)


def _apart(words: Iterable[str]) -> Iterator[str]:
    """The words that neither contain an earlier one nor are a part of it."""
    earlier: list[str] = []
    for word in words:
        if not any(word in other or other in word for other in earlier):
            earlier.append(word)
            yield word


def _list_words(rng: random.Random, source: Source) -> list[str]:
    """The text's own words in random order, then adjective-noun words in case they are too few."""
    own = list(source.prose.vocabulary)
    rng.shuffle(own)
    return [*own, *compounds(rng)]


def _word_list(rng: random.Random, common: list[str], others: list[str], often: int, seldom: int) -> Sample:
    entries = common * often + others * seldom
    rng.shuffle(entries)
    return Sample(
        f"Below is a numbered list of words, some of which appear more often than others. Memorise those that "
        f"appear most often.\n{_numbered(entries)}\nQuestion: which 10 words appear most often in the list?",
        " Answer: the 10 words that appear most often are:",
        tuple(common),
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(rng: random.Random, size: int, source: Source) -> Sample:
    """Coded words; the word of rank k appears floor(N k^-2 / zeta(2)) times. Rank 1 is dots; 2 to 4 are the answer.

    N is an eighth of the size; further dots, which mean nothing, fill the rest. In a short text ranks 4 and 5 would
    appear equally often, so all ranks after 4 are made less frequent.
    """
    count = max(5, (source.length - 50) // 50)
    words = ["...", *_distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), count - 1)]
    times = [int(size // 8 * k**-2 / (math.pi**2 / 6)) for k in range(1, count + 1)]
    times[0] += size % 8
    times[4:] = [min(n, max(0, times[3] - 1)) for n in times[4:]]
    text = [word for word, n in zip(words, times, strict=True) for _ in range(n)]
    rng.shuffle(text)
    return Sample(
        "Read the coded text below and count how often each coded word appears. The dots '...' mean nothing: "
        f"leave them out.\n{' '.join(text)}\nQuestion: which three coded words appear most often in the text above?",
        " Answer: the three coded words that appear most often in the text above are",
        tuple(words[1:4]),
    )


# ---------------------------------------------------------------------------------------------------
# Questions on documents


@dataclass(frozen=True)
class QuestionSet:
    """Documents by number, and questions with the numbers of the documents that hold their answer."""

    documents: Mapping[Any, Mapping[str, Any]]
    questions: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, questions: str | Path, documents: str | Path) -> QuestionSet:
        """From JSONL: documents {doc, text, title (optional)}, questions {query, outputs, doc or docs}."""
        texts: dict[Any, Mapping[str, Any]] = {}
        for place, item in read_items(documents):
            if not isinstance(item.get("text"), str) or not isinstance(item.get("doc"), int | str):
                raise UserError(f"{place} needs `doc`, its number, and `text`")
            texts[item["doc"]] = item
        return cls(texts, [_question(item, place, texts) for place, item in read_items(questions)])

    def ordered(self, question: Mapping[str, Any], rng: random.Random) -> tuple[list[Any], int]:
        """(documents in the order of their use, how many of them are the question's own).

        The question's own come first, then those of the same title, then all others in random order.
        """
        own = question["docs"]
        titles = {self.documents[doc].get("title") for doc in own} - {None}
        others = [doc for doc in self.documents if doc not in set(own)]
        rng.shuffle(others)
        others.sort(key=lambda doc: self.documents[doc].get("title") not in titles)
        return [*own, *others], len(own)


def _question(item: Mapping[str, Any], place: str, documents: Mapping[Any, Any]) -> dict[str, Any]:
    outputs = item.get("outputs")
    if not isinstance(item.get("query"), str):
        raise UserError(f"{place} has no `query` that is text")
    if not isinstance(outputs, list) or not outputs or not all(isinstance(o, str) and o for o in outputs):
        raise UserError(f"{place} has no `outputs`: the list of right answers is needed")
    docs = item.get("docs", [item["doc"]] if "doc" in item else None)
    if not isinstance(docs, list) or not docs or not all(isinstance(doc, int | str) for doc in docs):
        raise UserError(f"{place} has no `doc` or `docs`: the numbers of the documents that hold the answer")
    if missing := [doc for doc in docs if doc not in documents]:
        raise UserError(f"{place} names document {missing[0]!r}, which is not among the documents")
    return {"query": item["query"], "outputs": outputs, "docs": docs}


def question_answering(rng: random.Random, size: int, source: Source) -> Sample:
    """Question number `index` on its documents and `size` words of others; the last document is cut."""
    assert source.qa is not None
    question = source.qa.questions[source.index]
    order, own = source.qa.ordered(question, rng)
    texts = [source.qa.documents[doc]["text"] for doc in order[:own]]
    for doc in order[own:]:
        words = source.qa.documents[doc]["text"].split(" ")
        if size < 1:
            break
        texts.append(" ".join(words[:size]))
        size -= len(words)
    rng.shuffle(texts)
    blocks = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
    ask = "Answer the question from the documents, and give only the answer."
    return Sample(
        f"{ask} The documents are below.\n\n{blocks}\n\n{ask} The documents are above.\n\n"
        f"Question: {question['query']}",
        " Answer:",
        tuple(question["outputs"]),
    )


def _question_number(source: Source, budget: int, what: str) -> int:
    """The number of the `index`-th question that can be asked in `budget` tokens; after the last comes the first.

    A question cannot be asked if its own documents do not fit, or do not contain an answer (such as yes or no).
    """
    fitting: list[int] = []
    assert source.qa is not None
    for number in range(len(source.qa.questions)):
        if _answerable(source.qa, number):
            alone = question_answering(random.Random(0), 0, replace(source, index=number))
            fitting += [number] if source.count(alone.prompt) <= budget else []
        if len(fitting) > source.index:
            return fitting[-1]
    if not fitting:
        raise UserError(f"{what}: no question's own documents hold its answer and fit; give longer --lengths")
    return fitting[source.index % len(fitting)]


def _answerable(qa: QuestionSet, number: int) -> bool:
    question = qa.questions[number]
    text = "\n".join(qa.documents[doc]["text"] for doc in question["docs"]).lower()
    return any(output.lower() in text for output in question["outputs"])


# ---------------------------------------------------------------------------------------------------
# The table of tasks, scoring, the suite

# task -> (maker, tokens of the answer)
TASKS: dict[str, tuple[Task, int]] = {
    "niah_single_1": (Niah("noise"), 128),
    "niah_single_2": (Niah("essay"), 128),
    "niah_single_3": (Niah("essay", value="uuid"), 128),
    "niah_multikey_1": (Niah("essay", keys=4), 128),
    "niah_multikey_2": (Niah("needles"), 128),
    "niah_multikey_3": (Niah("needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": (Niah("essay", values=4), 128),
    "niah_multiquery": (Niah("essay", queries=4), 128),
    "vt": (variable_tracking, 30),
    "cwe": (common_words, 120),
    "fwe": (frequent_words, 50),
    "qa_1": (question_answering, 32),
    "qa_2": (question_answering, 32),
}
QA_TASKS = tuple(name for name in TASKS if name.startswith("qa_"))


def score(task: str, prediction: str, outputs: Sequence[str]) -> float:
    """The share of right answers in a prediction (NIAH, vt, cwe, fwe), or 1 if it has any (qa). Case is ignored."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    present = [output.lower() in text for output in outputs]
    return float(any(present)) if task in QA_TASKS else sum(present) / len(present)


def _right(task: str, outputs: Sequence[str], prediction: str) -> bool:
    return score(task, prediction, outputs) == 1


@dataclass(frozen=True)
class Ruler:
    """`samples` prompts per task and length, answered greedily. Metrics, in per cent: `TASK@LENGTH`, `average@LENGTH`.

    prose: the text of essay haystacks and of common words. qa: question sets by task name; a question-answering task
    in `tasks` must have one.
    """

    prose: Prose
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    qa: Mapping[str, QuestionSet] = field(default_factory=dict)
    samples: int = 10
    seed: int = SEED
    name: str = "ruler"
    parts: ClassVar[tuple[str, ...]] = ("lengths", "tasks", "samples")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "tasks": list(self.tasks),
            "samples": self.samples,
            "seed": self.seed,
            "text": digest(self.prose.text),
            "qa": {name: digest([q.documents, q.questions]) for name, q in sorted(self.qa.items())},
        }

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Task, length and number of each sample. Its text is made when it is measured, and depends on the seed."""
        for length in self.lengths:
            check_length(length, window)
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"--tasks {task}: there is no such task; choose from {', '.join(TASKS)}")
            if task in QA_TASKS and task not in self.qa:
                raise UserError(f"task {task} needs questions: give --data {task}=QUESTIONS.jsonl,DOCUMENTS.jsonl")
            for length in self.lengths:
                self.sample(directory, task, length, 0)  # raises if the length cannot hold the task
        return [
            Item(f"{task}/{length}/{i}", (task, length, i), length)
            for length in self.lengths  # prompts of one length are measured together
            for task in self.tasks
            for i in range(self.samples)
        ]

    def sample(self, directory: Directory, task: str, length: int, index: int) -> Sample:
        """One sample: prompt, answer prefix and generation budget together have at most `length` tokens."""
        return self._made(directory, task, length, index)[0]

    def _made(self, directory: Directory, task: str, length: int, index: int) -> tuple[Sample, list[int]]:
        """A sample and the tokens of its prompt."""
        make, budget = TASKS[task]
        seed = f"{self.seed}/{task}/{length}/{index}"

        encode = lru_cache(KEPT)(directory.encode)

        def count(text: str) -> int:
            return len(encode(text))

        def build(size: int) -> Sample:
            return make(random.Random(seed), size, source)

        what, room = f"{task} at {length}", length - budget
        source = Source(self.prose, length, index, self.qa.get(task), count)
        if task in QA_TASKS:
            source = replace(source, index=_question_number(source, room, what))
        most = _most(task, source)
        sample = build(fill(lambda n: build(n).prompt, count, room, what, most=most))
        if (tokens := count(sample.prompt) + budget) < NEAR * length:
            if most is None:  # one more line of the text would be too much
                raise UserError(f"{what}: its lines are too long to fill that length; give longer --lengths")
            raise UserError(f"{what}: all its text has {tokens} tokens; give more text, or shorter --lengths")
        if task not in QA_TASKS and not all(output in sample.text for output in sample.outputs):
            raise UserError(f"{what}: too short to hold its answers; give longer --lengths")
        return sample, encode(sample.prompt)

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        asked: deque[tuple[int, Sample]] = deque()  # the prompt's tokens and the sample of each item to be answered

        def questions() -> Iterator[Question]:
            def make(item: Item) -> tuple[Sample, list[int]]:
                return self._made(subject.directory, *item.content)

            for item, (sample, tokens) in made_ahead(make, left(items, done)):
                task = item.content[0]
                asked.append((len(tokens), sample))
                yield Question(tokens, TASKS[task][1], partial(_right, task, sample.outputs))

        for item, answer in zip(left(items, done), subject.answers(questions(), tick), strict=True):
            yield self._record(item, *asked.popleft(), subject.directory.decode(answer))

    def _record(self, item: Item, prompt_tokens: int, sample: Sample, answer: str) -> Record:
        task, length, _ = item.content
        points = 100 * score(task, answer, sample.outputs)
        names = (f"average@{length}", f"{task}@{length}")
        return {
            "id": item.id,
            "samples": dict.fromkeys(names, points),
            "answer": answer,
            "outputs": list(sample.outputs),
            "prompt_tokens": prompt_tokens,
        }

    def metric(self, name: str) -> Metric:
        return Metric(grouped=name.startswith("average@"))

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}


def _most(task: str, source: Source) -> int | None:
    """The largest size for which a task has text; None if there is no limit."""
    if source.qa is not None:
        return sum(len(document["text"].split(" ")) for document in source.qa.documents.values())
    return len(source.prose.vocabulary) + len(ADJECTIVES) * len(NOUNS) - 50 if task == "cwe" else None
