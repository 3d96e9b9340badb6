"""Conclusions from the suites: what a model lost, what scaling alone does equally well, what was not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cli import path_word, runnable, shell_command
from .fields import is_whole, visible
from .rows import NATIVE, SCALED, PairedTest, Results, Row, Value
from .statistics import EQUAL, NOISE, WORSE

KEPT = 0.8  # fraction of native at which a model counts as restored
CERTAIN = 2.0  # standard errors of a difference, if there is no paired test
COPYING = ("passkey", "ruler")  # suites whose answers must be found in a long text and copied exactly
SHORT_TEXT = ("choice", "lambada")

Rows = Mapping[str, Row]


@dataclass(frozen=True)
class KeyMetric:
    """The metric of a suite that the verdict uses; higher is better. `length` is in tokens, None without one."""

    suite: str
    metric: str
    title: str
    length: int | None
    show: Callable[[float], str]


@dataclass(frozen=True)
class Shortfall:
    """A key metric below `KEPT`, the fraction of native at which a model counts as restored.

    certain: by more than chance. fraction: of native. beyond: the length is beyond the native window.
    """

    metric: KeyMetric
    text: str
    certain: bool
    fraction: float
    beyond: bool


@dataclass(frozen=True)
class Note:
    """A sentence that a reader should not miss, and the shell command that answers it, if there is one."""

    text: str
    command: str | None = None


def key_metrics(row: Row) -> Iterator[KeyMetric]:
    """The key metrics of a row, suite by suite."""
    for suite, result in row.suites.items():
        kind, _, name = suite.partition("/")
        if kind == "choice":
            metric = "acc_norm" if "acc_norm" in result.metrics else "acc"
            yield KeyMetric(suite, metric, f"multiple choice {visible(name)}".rstrip(), None, _fraction)
        elif kind == "lambada":
            yield KeyMetric(suite, "acc", "the last word of passages", None, _fraction)
        elif kind == "passkey":
            yield from _by_length(suite, result.metrics, "accuracy@", "the pass key", _fraction)
        elif kind == "ruler":
            yield from _by_length(suite, result.metrics, "average@", "RULER", _points)


def _by_length(
    suite: str, metrics: Mapping[str, Value], start: str, title: str, show: Callable[[float], str]
) -> Iterator[KeyMetric]:
    for metric in metrics:
        length = metric.removeprefix(start)
        if length != metric and is_whole(length):
            yield KeyMetric(suite, metric, f"{title} at {length} tokens", int(length), show)


def _fraction(value: float) -> str:
    return f"{value:.0%}"


def _points(value: float) -> str:
    return f"{value:.1f}%"


def shortfalls(results: Results, name: str, window: int | None) -> list[Shortfall]:
    """The key metrics in which the model `name` has less than `KEPT` of native.

    Beyond the native `window`, in tokens, the reference is native at its longest length inside the window.
    """
    short = []
    for metric in key_metrics(results.rows.get(name, Row())):
        own = value_of(results.rows, name, metric.suite, metric.metric)
        beyond = window is not None and metric.length is not None and metric.length > window
        reference = inside(results.rows, metric, window) if beyond else metric.metric
        native = value_of(results.rows, NATIVE, metric.suite, reference) if reference else None
        if own and native and own.value < KEPT * native.value:
            at = f" at {reference.partition('@')[2]}" if beyond and reference else ""
            text = f"{metric.title}: {metric.show(own.value)} against {metric.show(native.value)} native{at}"
            test = None if beyond else _test(results, metric, name, NATIVE)
            certain = test.outcome == WORSE if test else _clearly_lower(own, native)
            short.append(Shortfall(metric, text, certain, own.value / native.value, beyond))
    return short


def worst_of_each(short: Sequence[Shortfall]) -> list[Shortfall]:
    """Of each suite the length with the lowest fraction of native, inside the native window and beyond it."""
    least: dict[tuple[str, bool], Shortfall] = {}
    for one in short:
        key = one.metric.suite, one.beyond
        if key not in least or one.fraction < least[key].fraction:
            least[key] = one
    return list(least.values())


def inside(rows: Rows, metric: KeyMetric, window: int | None) -> str | None:
    """The same metric at native's longest length inside its window."""
    same = [other for other in key_metrics(rows.get(NATIVE, Row())) if other.suite == metric.suite]
    inside = [other for other in same if (other.length or 0) <= (window or 0)]
    return max(inside, key=lambda other: other.length or 0).metric if inside else None


def value_of(rows: Rows, name: str, suite: str, metric: str) -> Value | None:
    result = rows.get(name, Row()).suites.get(suite)
    return result.metrics.get(metric) if result else None


def _test(results: Results, metric: KeyMetric, name: str, other: str) -> PairedTest | None:
    compared = results.compared(metric.suite, metric.metric).get(name)
    return compared.test_against(other) if compared else None


def _clearly_lower(own: Value, native: Value) -> bool:
    if own.stderr is None or native.stderr is None:
        return False
    return native.value - own.value > CERTAIN * math.hypot(own.stderr, native.stderr)


def no_better_than_scaled(results: Results, name: str) -> list[KeyMetric]:
    """The key metrics that scaling lowered by more than chance and in which training won nothing back."""
    same = []
    for metric in key_metrics(results.rows.get(name, Row())):
        cost, gain = _test(results, metric, SCALED, NATIVE), _test(results, metric, name, SCALED)
        if cost and gain and cost.outcome == WORSE and gain.outcome in (NOISE, EQUAL, WORSE):
            same.append(metric)
    return same


def unmeasured(rows: Rows, names: Sequence[str], window: int | None, run: Path) -> Iterator[Note]:
    """Measurements that a finished run lacks and a user needs, each with the command that makes it."""
    command = runnable(("mlx_linearard.evaluate", "--run", path_word(run)))
    everywhere = set.intersection(*(_kinds(rows.get(name, Row())) for name in (NATIVE, *names)))
    if not everywhere & set(COPYING):
        yield Note(
            "Finding a detail in a long text and copying it was not measured; perplexity and KL do not show it.",
            shell_command(*command, "--suite", "passkey,ruler", "--data", "TEXT"),
        )
    elif window and not _beyond(rows, names, window):
        yield Note(
            f"Finding a detail beyond the native window of {window} tokens was not measured.",
            shell_command(*command, "--suite", "passkey", "--lengths", 2 * window, "--data", "TEXT"),
        )
    if not everywhere & set(SHORT_TEXT):
        options = ("--suite", "choice,lambada", "--data", "choice=hf:hellaswag", "--data", "lambada=hf:lambada")
        yield Note("Tasks on short text were not measured.", shell_command(*command, *options))


def _kinds(row: Row) -> set[str]:
    return {suite.partition("/")[0] for suite in row.suites}


def _beyond(rows: Rows, names: Sequence[str], window: int) -> bool:
    return all(any((metric.length or 0) > window for metric in key_metrics(rows.get(name, Row()))) for name in names)
