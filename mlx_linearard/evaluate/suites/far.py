"""Suite `far`: how much a model gains from text that is farther back than a shorter window."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...data import hash_of
from ...errors import UserError
from ...results.positions import Gain
from ...results.statistics import Metric, summarize
from ...results.store import Record
from ..model import Directory, Subject, Tick
from .ppl import check_length
from .suite import Done, Item, left

LAST = 1000  # tokens at the end of a text
PARTS = 10  # parts of these tokens: `gain_by_position` has their means


@dataclass(frozen=True)
class FarContext:
    """The gain of the last `last` tokens of a text from all text before them, beyond that of the last `near` tokens.

    A text is `length` + 1 tokens of one of `documents`. Its last tokens are scored twice: after everything before
    them, and again after the last `near` tokens of the text only, which include themselves. The gain of a token is
    the difference of its log-probabilities in nats; it is positive if the far context is used.

    Metric: `gain@LENGTH`, the mean over texts of the mean gain of their tokens. In results.json, `gain_by_position`
    has the mean gain in ten parts of the last tokens, by length. Standard errors are over texts.
    """

    documents: Sequence[np.ndarray]
    lengths: tuple[int, ...]
    near: int
    samples: int = 3
    last: int = LAST
    name: str = "far"
    parts: ClassVar[tuple[str, ...]] = ("lengths", "samples")

    @property
    def options(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "near": self.near,
            "last": self.last,
            "samples": self.samples,
            "text": hash_of(*self.documents),
        }

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Texts of length + 1 tokens; UserError if a length exceeds `window` or no document is long enough."""
        if self.last >= self.near:
            raise UserError(f"--near {self.near}: the last {self.last} tokens are scored: give a larger --near")
        items = []
        for length in self.lengths:
            check_length(length, window)
            if length <= self.near:
                raise UserError(
                    f"--lengths {length} holds nothing beyond the near context of {self.near} tokens: give longer "
                    "--lengths or a smaller --near"
                )
            texts = self._texts(length)
            if not texts:
                longest = max(map(len, self.documents), default=0)
                raise UserError(
                    f"the longest document of suite far has {longest} tokens, too few for a text of {length}: give "
                    "longer documents with --data or a shorter --lengths"
                )
            items += [Item(f"{length}/{i}", text, length + self.near) for i, text in enumerate(texts)]
        return items

    def _texts(self, length: int) -> list[np.ndarray]:
        """At most `samples` texts: the first of each document, then the second of each, and so on.

        These share no token. Further texts begin `last` tokens later, and so on: they share tokens with earlier texts,
        but no token is scored in two texts.
        """
        rounds = max(map(len, self.documents), default=0) // length
        shifts = range(0, length - self.last + 1, self.last)
        starts = (
            (document, i * length + shift) for shift in shifts for i in range(rounds) for document in self.documents
        )
        texts = (document[start : start + length + 1] for document, start in starts)
        return [text for text in texts if len(text) == length + 1][: self.samples]

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        for item in left(items, done):
            length = len(item.content) - 1
            everything = subject.nll(item.content, tick, last=self.last)
            near = subject.nll(item.content[-self.near - 1 :], tick, last=self.last)
            gains = near - everything
            yield {
                "id": item.id,
                "samples": {f"gain@{length}": float(gains.mean(dtype=np.float64))},
                "length": length,
                "gains": [float(part.mean(dtype=np.float64)) for part in np.array_split(gains, self._parts)],
            }

    @property
    def _parts(self) -> int:
        return min(PARTS, self.last)

    def metric(self, name: str) -> Metric:
        return Metric()

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        """`gain_by_position` by length: parts of the last tokens, with the standard error over texts."""
        lengths = sorted({record["length"] for record in records})
        return {"gain_by_position": {str(n): [gain.as_json() for gain in self._gains(records, n)] for n in lengths}}

    def _gains(self, records: Sequence[Record], length: int) -> Iterator[Gain]:
        of_length = {record["id"]: record["gains"] for record in records if record["length"] == length}
        sizes = list(map(len, np.array_split(np.arange(self.last), self._parts)))
        edges = np.cumsum([0, *sizes]) + length - self.last
        for i, (start, end) in enumerate(itertools.pairwise(map(int, edges))):
            part = summarize({item: gains[i] for item, gains in of_length.items()}, Metric())
            yield Gain(start, end, part.value, part.stderr)
