"""Suite `passkey`: a number is hidden at some depth of a long text; the question for it ends the text."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

from ...errors import UserError
from ...results.statistics import DECISION, Metric
from ...results.store import Record
from ..model import Directory, Question, Subject, Tick, digest
from .ahead import made_ahead
from .haystack import KEPT, Prose, fill, join
from .ppl import check_length
from .suite import Done, Item, left

BUDGET = 16  # tokens of the answer: five digits, and room for words before them
DEPTHS = (0, 10, 25, 50, 75, 90, 100)
INTRODUCTION = "Somewhere in the text below there is a pass key. Read on and keep it in mind.\n\n"
NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """`samples` prompts at each length and depth (the percentage of the text before the key), answered greedily.

    Prompt and answer together have 98 % to 100 % of `length` tokens. Metrics: `accuracy` and `accuracy@LENGTH`;
    `grid` in results.json is length -> depth -> share of right answers.
    """

    prose: Prose
    lengths: tuple[int, ...]
    depths: tuple[int, ...] = DEPTHS
    samples: int = 3
    seed: int = 42
    name: str = "passkey"
    parts: ClassVar[tuple[str, ...]] = ("lengths", "depths", "samples")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "samples": self.samples,
            "seed": self.seed,
            "text": digest(self.prose.text),
        }

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Length, depth and number of each prompt. Its text is made when it is measured, and depends on the seed."""
        for length in self.lengths:
            check_length(length, window)
            self.prompt(directory, length, 50, 0)  # raises if the length cannot hold the question
        if bad := [depth for depth in self.depths if not 0 <= depth <= 100]:
            raise UserError(f"--depths {bad[0]}: a depth is a percentage of the text, from 0 to 100")
        return [
            Item(f"{length}/{depth}/{i}", (length, depth, i), length)
            for length in self.lengths
            for depth in self.depths
            for i in range(self.samples)
        ]

    def prompt(self, directory: Directory, length: int, depth: int, sample: int) -> tuple[list[int], str]:
        """(tokens of the prompt, the key); UserError if `length` cannot hold the question."""
        rng = random.Random(f"{self.seed}/{length}/{depth}/{sample}")
        key, start = str(rng.randrange(10_000, 100_000)), rng.randrange(self.prose.words)
        build = self._builder(key, start, depth)
        encode = lru_cache(KEPT)(directory.encode)
        size = fill(build, lambda text: len(encode(text)), length - BUDGET, f"passkey at {length}")
        return encode(build(size)), key

    def _builder(self, key: str, start: int, depth: int) -> Callable[[int], str]:
        def build(words: int) -> str:
            hay = self.prose.take(words, start)
            at = len(hay) * depth // 100
            needled = [*hay[:at], NEEDLE.format(key=key), *hay[at:]]
            return INTRODUCTION + join(needled) + QUESTION

        return build

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        asked: deque[tuple[int, str]] = deque()  # the prompt's tokens and the key of each item that is being answered

        def questions() -> Iterator[Question]:
            def make(item: Item) -> tuple[list[int], str]:
                return self.prompt(subject.directory, *item.content)

            for _, (prompt, key) in made_ahead(make, left(items, done)):
                asked.append((len(prompt), key))
                yield Question(prompt, BUDGET, partial(_contains, key))

        for item, tokens in zip(left(items, done), subject.answers(questions(), tick), strict=True):
            yield self._record(item, *asked.popleft(), subject.directory.decode(tokens))

    def _record(self, item: Item, prompt_tokens: int, key: str, answer: str) -> Record:
        length, depth, _ = item.content
        right = float(key in answer)
        names = ["accuracy", f"accuracy@{length}"]
        return {
            "id": item.id,
            "samples": dict.fromkeys(names, right),
            "key": key,
            "answer": answer,
            "length": length,
            "depth": depth,
            "prompt_tokens": prompt_tokens,
        }

    def metric(self, name: str) -> Metric:
        return Metric(DECISION)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        cells: dict[int, dict[int, list[float]]] = {}
        for record in records:
            row = cells.setdefault(record["length"], {})
            row.setdefault(record["depth"], []).append(record["samples"]["accuracy"])
        return {"grid": {str(n): {str(d): _mean(row[d]) for d in sorted(row)} for n, row in sorted(cells.items())}}


def _contains(key: str, text: str) -> bool:
    return key in text


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
