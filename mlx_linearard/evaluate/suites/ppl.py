"""Suite `ppl`: perplexity by length and by position, in windows side by side or in a sliding window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...data import windows
from ...errors import UserError
from ...results.statistics import PERPLEXITY, Metric, summarize
from ...results.store import Record
from ..model import Directory, Subject, Tick, digest
from .suite import Done, Item, left, samples

FIRST_BUCKET = 128  # positions; each further bucket ends at twice the position of the last


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of `tokens` (N,) in windows of each of `lengths`, about `budget` tokens per length.

    Without `stride`, windows are side by side and all their tokens count. With `stride`, the window moves by that
    many tokens and only its last `stride` tokens count, so each has at least length - stride tokens before it.
    Metrics: `perplexity@LENGTH`, over windows, and by position within the longest length.
    """

    tokens: np.ndarray
    lengths: tuple[int, ...]
    budget: int = 32768
    stride: int = 0
    name: str = "ppl"
    parts: ClassVar[tuple[str, ...]] = ("lengths",)

    @property
    def options(self) -> dict[str, Any]:
        text = digest(self.tokens.tobytes().hex())
        return {"lengths": list(self.lengths), "tokens": self.budget, "stride": self.stride, "text": text}

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Windows of length + 1 tokens; UserError if a length exceeds `window` or the text is too short."""
        items = []
        for length in self.lengths:
            check_length(length, window)
            cut = self._windows(length)
            if not len(cut):
                raise UserError(
                    f"the text of suite {self.name} has {len(self.tokens)} tokens, too few for one window of "
                    f"{length}: give more text with --data or a shorter --lengths"
                )
            items += [Item(f"{length}/{i}", row, length) for i, row in enumerate(cut)]
        return items

    def _windows(self, length: int) -> np.ndarray:
        if not self.stride:
            return windows(self.tokens, length, max(1, self.budget // length))
        if self.stride > length:
            raise UserError(f"--stride {self.stride} is above --lengths {length}: tokens would be left out")
        starts = range(0, len(self.tokens) - length, self.stride)[: max(1, self.budget // self.stride)]
        cut = [self.tokens[s : s + length + 1] for s in starts]
        return np.stack(cut) if cut else np.zeros((0, length + 1), np.int32)

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        for item in left(items, done):
            yield self._record(subject, item, tick)

    def _record(self, subject: Subject, item: Item, tick: Tick) -> Record:
        length = len(item.content) - 1
        first = length - self.stride if self.stride else 0
        scored = subject.nll(item.content, tick)[first:]
        positions = bucket_means(scored, first)
        mean = float(scored.mean(dtype=np.float64))
        return {"id": item.id, "samples": {f"perplexity@{length}": mean}, "length": length, "positions": positions}

    def metric(self, name: str) -> Metric:
        return Metric(PERPLEXITY, higher_is_better=False)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        """`by_length`: length -> perplexity. `by_position`: buckets of the longest windows; `end` is not included."""
        lengths = sorted({record["length"] for record in records})
        by_length = {}
        for length in lengths:
            by_length[str(length)] = summarize(samples(records, f"perplexity@{length}"), self.metric("")).value
        longest = lengths[-1]
        rows = np.array([r["positions"] for r in records if r["length"] == longest], np.float64)
        edges = buckets(longest, longest - self.stride if self.stride else 0)
        by_position = [
            {"start": start, "end": end, "perplexity": math.exp(min(mean, 700.0))}
            for (start, end), mean in zip(edges, rows.mean(axis=0), strict=True)
        ]
        return {"by_length": by_length, "by_position": by_position}


def check_length(length: int, window: int) -> None:
    """UserError if `length` exceeds `window`."""
    if length > window:
        raise UserError(
            f"--lengths {length} does not fit the longest window of the directories given, {window} tokens: "
            "give shorter ones"
        )


def buckets(length: int, first: int = 0) -> list[tuple[int, int]]:
    """[start, end) of the buckets of positions `first` to `length`: 0-128, 128-256, 256-512, ..., cut at both ends."""
    edges = [first]
    edge = FIRST_BUCKET
    while edge < length:
        edges += [edge] if edge > first else []
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))


def bucket_means(nll: np.ndarray, first: int = 0) -> list[float]:
    """The mean in each bucket of `nll` (T,), which belongs to the positions from `first` on."""
    return [
        float(nll[start - first : end - first].mean(dtype=np.float64))
        for start, end in buckets(first + len(nll), first)
    ]
