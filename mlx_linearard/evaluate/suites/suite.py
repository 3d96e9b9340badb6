"""The protocol of a suite: items, a measurement of one item, and metrics with their uncertainty."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...results.statistics import Metric, summarize
from ...results.store import Record
from ..model import Directory, Subject, Tick


@dataclass(frozen=True)
class Item:
    """One thing to measure. `id` is unique in its suite; `cost` is its number of tokens."""

    id: str
    content: Any
    cost: int = 1


Done = Collection[str]  # the ids of items that are measured already


def left(items: Sequence[Item], done: Done) -> list[Item]:
    """The items that are not measured yet."""
    return [item for item in items if item.id not in done]


class Suite(Protocol):
    """A suite.

    options: everything, except the model, on which its numbers depend; a resumed evaluation must have the same.
    parts: the names of those options that only choose which items are measured. Items of the same id are the same for
    all values of these options, so evaluations of several parts add up.
    """

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> dict[str, Any]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def items(self, directory: Directory, window: int) -> Sequence[Item]:
        """The items in the directory's tokens; UserError if one does not fit `window` or the data are not valid."""

    def measure(self, subject: Subject, items: Sequence[Item], done: Done, tick: Tick) -> Iterator[Record]:
        """The record of each item of `left(items, done)`, in order, as soon as it is known, in JSON values.

        `items` are all items of the suite. So an item is in the same batch whether or not other items are measured
        already, and its numbers are the same to the last digit. `tick` counts the tokens of the items in order; it
        need not count the tokens of an item that is measured in one pass.
        """

    def metric(self, name: str) -> Metric:
        """The kind of the metric `name`."""

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        """Further entries of the suite in results.json, beside its metrics."""


def samples(records: Iterable[Record], metric: str) -> dict[str, float]:
    """The samples of one metric by item."""
    return {record["id"]: float(record["samples"][metric]) for record in records if metric in record["samples"]}


def metric_names(records: Iterable[Record]) -> list[str]:
    """The metrics of some records, in order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record["samples"]))


def identity(options: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The options without the parts: if two suites agree on them, their items of one id are the same."""
    return {name: value for name, value in options.items() if name not in parts}


def all_options(suite: Suite, before: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a suite and of an earlier evaluation `before` with the same identity.

    Parts that are lists are joined; of two numbers the larger is taken.
    """
    options = suite.options
    if identity(before, suite.parts) != identity(options, suite.parts) or before.keys() != options.keys():
        return options
    return {name: _both(before[name], value) if name in suite.parts else value for name, value in options.items()}


def _both(before: Any, now: Any) -> Any:
    if isinstance(now, list):
        return [*before, *(value for value in now if value not in before)]
    return max(before, now)


def summary(suite: Suite, records: Sequence[Record]) -> dict[str, Any]:
    """The entry of one suite of one model in results.json."""
    metrics: Mapping[str, Any] = {
        name: summarize(samples(records, name), suite.metric(name)).as_json() for name in metric_names(records)
    }
    return {"metrics": metrics, **suite.extras(records), "options": suite.options}
