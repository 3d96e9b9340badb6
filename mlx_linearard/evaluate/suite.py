"""What every suite is: items, a measurement of one item, and metrics with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .subject import Directory, Subject, Tick

Record = dict[str, Any]  # one measured item: `id`, `samples` (metric -> number), and what else a reader may want

MEAN, DECISION, PERPLEXITY = "mean", "decision", "perplexity"


@dataclass(frozen=True)
class Metric:
    """How the samples of one metric become its value.

    kind: `decision` (samples 0 or 1, the value their mean), `mean`, or `perplexity` (samples in nats, the
    value the exponential of their mean). ideal: the value of a perfect model, where there is one.
    """

    kind: str = MEAN
    higher_is_better: bool = True
    ideal: float | None = None


@dataclass(frozen=True)
class Item:
    """One thing to measure. `id` is unique in its suite; `cost` is its share of the work, in tokens."""

    id: str
    content: Any
    cost: int = 1


class Suite(Protocol):
    """A suite. `options` are what, beside the model, its numbers depend on: a resumed run must have the same.

    `parts` names those of the options that only choose which items are measured: an item of the same id is the
    same whatever they are, so that evaluations of several parts add up.
    """

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def items(self, directory: Directory, window: int) -> Sequence[Item]:
        """The items in the directory's tokens; UserError where one does not fit `window` or the data are not right."""

    def measure(self, subject: Subject, item: Item, tick: Tick) -> Record:
        """The record of one item, JSON all through."""

    def metric(self, name: str) -> Metric:
        """What kind of number the metric is."""

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        """What results.json keeps of a suite beside its metrics."""


@dataclass(frozen=True)
class Value:
    """A metric's value over n samples with its standard error; None where one sample says nothing of it."""

    value: float
    stderr: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


def samples(records: Iterable[Record], metric: str) -> dict[str, float]:
    """A metric's samples by item."""
    return {record["id"]: float(record["samples"][metric]) for record in records if metric in record["samples"]}


def metric_names(records: Iterable[Record]) -> list[str]:
    """The metrics of some records, in order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record["samples"]))


def summarize(values: Sequence[float], metric: Metric) -> Value:
    """Mean and standard error (sample deviation over sqrt n); for a perplexity carried through the exponential."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    if metric.kind == PERPLEXITY:
        mean = math.exp(min(mean, 700.0))
        spread = None if spread is None else mean * spread
    return Value(mean, spread, n)


def identity(options: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The options without the parts: where they are equal, items of one id are the same."""
    return {name: value for name, value in options.items() if name not in parts}


def all_options(suite: Suite, before: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's options with what was measured `before` of the same identity: lists joined, of numbers the larger."""
    options = suite.options
    if identity(before, suite.parts) != identity(options, suite.parts) or before.keys() != options.keys():
        return options
    return {name: _both(before[name], value) if name in suite.parts else value for name, value in options.items()}


def _both(before: Any, now: Any) -> Any:
    if isinstance(now, list):
        return [*before, *(value for value in now if value not in before)]
    return max(before, now)


def summary(suite: Suite, records: Sequence[Record]) -> dict[str, Any]:
    """What results.json keeps of one suite of one model."""
    metrics: Mapping[str, Any] = {
        name: summarize(list(samples(records, name).values()), suite.metric(name)).as_json()
        for name in metric_names(records)
    }
    return {"metrics": metrics, **suite.extras(records), "options": suite.options}
