"""Suite `choice`: multiple choice, scored by log-likelihood as lm-evaluation-harness scores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...results.statistics import DECISION, Metric
from ...results.store import Record
from ..model import Directory, Subject, Tick, digest
from .continuation import Request, request_item
from .suite import Done, Item, left


def check_choice(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """{query, choices, gold} of a multiple-choice item; UserError names what is missing."""
    query, choices, gold = item.get("query"), item.get("choices"), item.get("gold")
    if not isinstance(query, str):
        raise UserError(f"{place} has no `query` that is text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{place} has no `choices`: a list of at least two texts is needed")
    if gold is None:
        raise UserError(f"{place} has no `gold`: give the number of the right choice, 0 for the first")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(f"{place}: `gold` is {gold!r}, not the number of one of its {len(choices)} choices")
    return {"query": query, "choices": choices, "gold": gold}


@dataclass(frozen=True)
class Choice:
    """Multiple choice over `questions` ({query, choices, gold}). A continuation is " " + choice.

    Metrics: `acc`, the choice of the highest log-likelihood is right; `acc_norm`, the same with each
    log-likelihood divided by its choice's length in characters. The first of equal choices wins.
    """

    questions: Sequence[Mapping[str, Any]]
    name: str = "choice"
    parts: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        return {"items": len(self.questions), "data": digest(list(self.questions))}

    def items(self, directory: Directory, window: int) -> list[Item]:
        return [
            request_item(directory, window, i, q["query"], [f" {choice}" for choice in q["choices"]], q)
            for i, q in enumerate(self.questions)
        ]

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        wanted = [item.id not in done for item in items]
        scores = subject.scores([item.content for item in items], wanted)
        for item, scored in zip(left(items, done), scores, strict=True):
            yield self._record(item, [score for score, _ in scored])

    def _record(self, item: Item, scores: list[float]) -> Record:
        request: Request = item.content
        gold, lengths = request.content["gold"], [len(choice) for choice in request.content["choices"]]
        by_sum, by_length = int(np.argmax(scores)), int(np.argmax(np.array(scores) / lengths))
        return {
            "id": item.id,
            "samples": {"acc": float(by_sum == gold), "acc_norm": float(by_length == gold)},
            "scores": scores,
            "decisions": [by_sum, by_length],
            "gold": gold,
        }

    def metric(self, name: str) -> Metric:
        return Metric(DECISION)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}
