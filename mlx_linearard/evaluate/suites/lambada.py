"""Suite `lambada`: the last word of a passage, scored by log-likelihood as lm-evaluation-harness scores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import UserError
from ...results.statistics import DECISION, PERPLEXITY, Metric
from ...results.store import Record
from ..model import Directory, Subject, Tick, digest
from .continuation import request_item
from .suite import Done, Item, left


def check_passage(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """{text} of a last-word item; UserError if the text has fewer than two words."""
    text = item.get("text")
    if not isinstance(text, str) or len(text.split()) < 2:
        raise UserError(f"{place} has no `text` of at least two words")
    return {"text": text.rstrip()}


@dataclass(frozen=True)
class LastWord:
    """The last word of each of `passages` ({text}), given all words before it.

    Metrics: `acc`, every token of the word is the model's first choice; `perplexity`, of a word given its passage.
    """

    passages: Sequence[Mapping[str, Any]]
    name: str = "lambada"
    parts: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> dict[str, Any]:
        return {"items": len(self.passages), "data": digest(list(self.passages))}

    def items(self, directory: Directory, window: int) -> list[Item]:
        items = []
        for i, passage in enumerate(self.passages):
            context, _, word = passage["text"].rpartition(" ")
            items.append(request_item(directory, window, i, context, [f" {word}"], passage))
        return items

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        wanted = [item.id not in done for item in items]
        scores = subject.scores([item.content for item in items], wanted)
        for item, ((score, first_choice),) in zip(left(items, done), scores, strict=True):
            yield {"id": item.id, "samples": {"acc": float(first_choice), "perplexity": -score}}

    def metric(self, name: str) -> Metric:
        return Metric(DECISION) if name == "acc" else Metric(PERPLEXITY, higher_is_better=False)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}
