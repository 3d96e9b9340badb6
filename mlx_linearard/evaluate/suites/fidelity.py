"""Suite `fidelity`: how close a model's next-token distributions are to those of a reference directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...data import windows
from ...errors import UserError
from ...ops.logits import compare_logits
from ...results.statistics import Metric
from ...results.store import Record
from ..model import Directory, Subject, Tick, digest
from ..passes import LOGITS_BYTES, itself
from .suite import Done, Item, left

TOP = 5


@dataclass(frozen=True)
class FidelityToReference:
    """How close a model is to `reference`, on windows of `lengths` (one or several) + 1 of `tokens` (N,).

    About `budget` tokens per length are used, and no length exceeds the reference's own window. Metrics, means over
    windows, each also as NAME@LENGTH: `kl`, KL(reference || model) in nats per token; `top1`, the top-1 agreement;
    `top5`, the share of the reference's five most likely tokens that are among the model's five.
    """

    tokens: np.ndarray
    lengths: int | tuple[int, ...]
    reference: Subject
    budget: int = 32768
    name: str = "fidelity"
    parts: ClassVar[tuple[str, ...]] = ("lengths",)

    @property
    def options(self) -> dict[str, Any]:
        text = digest(self.tokens.tobytes().hex())
        reference = self.reference.directory.fingerprint()
        return {"lengths": list(self._lengths), "tokens": self.budget, "text": text, "reference": reference}

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (self.lengths,) if isinstance(self.lengths, int) else self.lengths

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Windows; UserError if one exceeds the reference's window or the text is too short."""
        return [item for length in self._lengths for item in self._windows(length)]

    def _windows(self, length: int) -> list[Item]:
        limit = self.reference.directory.window
        if length > limit:
            raise UserError(
                f"{length} tokens do not fit the window of the reference {self.reference.directory.path}, "
                f"{limit} tokens: give shorter --lengths"
            )
        cut = windows(self.tokens, length, max(1, self.budget // length))
        if not len(cut):
            raise UserError(
                f"the text of suite {self.name} has {len(self.tokens)} tokens, too few for one window of "
                f"{length}: give more text with --data or a shorter --lengths"
            )
        return [Item(f"{length}/{i}", row, length) for i, row in enumerate(cut)]

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        for item in left(items, done):
            yield self._record(subject, item, tick)

    def _record(self, subject: Subject, item: Item, tick: Tick) -> Record:
        inputs = item.content[:-1]
        means = self._means(subject, inputs, tick)
        return {"id": item.id, "samples": means | {f"{name}@{len(inputs)}": value for name, value in means.items()}}

    def _means(self, subject: Subject, inputs: np.ndarray, tick: Tick) -> dict[str, float]:
        if subject.directory.path == self.reference.directory.path:
            tick(len(inputs))
            return {"kl": 0.0, "top1": 1.0, "top5": 1.0}
        sums = np.zeros(3)
        both = zip(self.reference.logits(inputs), subject.logits(inputs, tick), strict=True)
        for (_, reference), (_, logits) in both:
            compared = compare_logits(logits, reference, itself, itself, workspace_bytes=4 * LOGITS_BYTES)
            sums += [_sum(compared.kl), _sum(compared.agreement), _sum(top_overlap(logits, reference))]
        return dict(zip(("kl", "top1", "top5"), (sums / len(inputs)).tolist(), strict=True))

    def metric(self, name: str) -> Metric:
        distance = name.partition("@")[0] == "kl"
        return Metric(higher_is_better=not distance)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}


def _sum(values: mx.array) -> float:
    return float(values.sum().item())  # type: ignore[arg-type]


def top_overlap(a: mx.array, b: mx.array, count: int = TOP) -> mx.array:
    """The share of b's `count` largest entries along the last axis that are among a's; (..., V) -> (...)."""
    first_a, first_b = (mx.argpartition(x, -count, axis=-1)[..., -count:] for x in (a, b))
    return (first_a[..., :, None] == first_b[..., None, :]).any(axis=-2).mean(axis=-1)
