"""What the suites of an evaluation say of a model in words: what is lost, what scaling alone does as well, and what
was not measured and would be by which command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .statistics import EQUAL, NOISE

KEPT = 0.8  # share of native from which on a model counts as restored
SURE = 2.0  # standard errors of a difference, where there is no paired test
COPYING = ("passkey", "ruler")  # suites whose answers must be found in a long text and copied exactly
SHORT_TEXT = ("choice", "lambada")
NATIVE, SCALED = "native", "scaled"

Rows = Mapping[str, Mapping[str, Any]]  # results.json's rows by model


@dataclass(frozen=True)
class Headline:
    """The number of a suite that is talked of: `length` in tokens where it has one."""

    suite: str
    metric: str
    title: str
    length: int | None
    show: Callable[[float], str]


@dataclass(frozen=True)
class Finding:
    """A headline number that is below what counts as restored. `sure`: by more than chance; `share`: of native."""

    headline: Headline
    words: str
    sure: bool
    share: float
    beyond: bool


@dataclass(frozen=True)
class Note:
    """A sentence that a reader should not miss, and the command that answers it, where there is one."""

    text: str
    command: str | None = None


def headlines(row: Mapping[str, Any]) -> Iterator[Headline]:
    """The numbers of a row in which more is better and that a user would ask for."""
    for suite, entry in row.items():
        metrics = entry.get("metrics") if isinstance(entry, Mapping) else None
        if not isinstance(metrics, Mapping):
            continue
        kind, _, name = suite.partition("/")
        if kind == "choice":
            best = "acc_norm" if "acc_norm" in metrics else "acc"
            yield Headline(suite, best, f"multiple choice {name}".rstrip(), None, _share)
        elif kind == "lambada":
            yield Headline(suite, "acc", "the last word of passages", None, _share)
        elif kind in COPYING:
            start, title, show = ("accuracy@", "the pass key", _share) if kind == "passkey" else (
                "average@", "RULER", _points)  # fmt: skip
            for metric in metrics:
                length = metric.removeprefix(start)
                if length != metric and length.isdecimal():
                    yield Headline(suite, metric, f"{title} at {length} tokens", int(length), show)


def _share(value: float) -> str:
    return f"{value:.0%}"


def _points(value: float) -> str:
    return f"{value:.1f}%"


def lost(rows: Rows, comparisons: Mapping[str, Any], name: str, window: int | None) -> list[Finding]:
    """Where `name` has less than `KEPT` of native; beyond the native `window`, of native at its longest inside it."""
    found = []
    for headline in headlines(rows.get(name, {})):
        own = _entry(rows, name, headline.suite, headline.metric)
        beyond = window is not None and headline.length is not None and headline.length > window
        measure = _inside(rows, headline, window) if beyond else headline.metric
        native = _entry(rows, NATIVE, headline.suite, measure) if measure else None
        if own and native and own["value"] < KEPT * native["value"]:
            at = f" at {measure.partition('@')[2]}" if beyond and measure else ""
            words = (
                f"{headline.title}: {headline.show(own['value'])} against {headline.show(native['value'])} native{at}"
            )
            test = {} if beyond else _test(comparisons, headline, name, NATIVE)
            share = own["value"] / native["value"]
            found.append(Finding(headline, words, _sure(test, own, native), share, beyond))
    return found


def worst(found: Sequence[Finding]) -> list[Finding]:
    """Of each suite the length at which least is left, inside the native window and beyond it."""
    least: dict[tuple[str, bool], Finding] = {}
    for one in found:
        key = one.headline.suite, one.beyond
        if key not in least or one.share < least[key].share:
            least[key] = one
    return list(least.values())


def _inside(rows: Rows, headline: Headline, window: int | None) -> str | None:
    """The same metric at native's longest length inside its window."""
    inside = [
        h for h in headlines(rows.get(NATIVE, {})) if h.suite == headline.suite and (h.length or 0) <= (window or 0)
    ]
    return max(inside, key=lambda h: h.length or 0).metric if inside else None


def _entry(rows: Rows, name: str, suite: str, metric: str) -> Mapping[str, Any] | None:
    entry = rows.get(name, {}).get(suite)
    found = entry["metrics"].get(metric) if isinstance(entry, Mapping) and "metrics" in entry else None
    return found if isinstance(found, Mapping) else None


def _test(comparisons: Mapping[str, Any], headline: Headline, name: str, other: str) -> Mapping[str, Any]:
    rows = comparisons.get(headline.suite, {}).get("metrics", {}).get(headline.metric, {})
    return next((test for test in rows.get(name, {}).get("tests", ()) if test["b"] == other), {})


def _sure(test: Mapping[str, Any], own: Mapping[str, Any], native: Mapping[str, Any]) -> bool:
    if test:
        return bool(test["outcome"] == "worse")
    one, other = own.get("stderr"), native.get("stderr")
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return False
    return bool(native["value"] - own["value"] > SURE * math.hypot(one, other))


def no_better(rows: Rows, comparisons: Mapping[str, Any], name: str) -> list[Headline]:
    """Where scaling cost something that can be told from chance, and training won nothing back that can be."""
    return [
        headline
        for headline in headlines(rows.get(name, {}))
        if _test(comparisons, headline, SCALED, NATIVE).get("outcome") == "worse"
        and _test(comparisons, headline, name, SCALED).get("outcome") in (NOISE, EQUAL, "worse")
    ]


def unmeasured(rows: Rows, names: Sequence[str], window: int | None, run: Path) -> Iterator[Note]:
    """What a user would want to know of a finished run and nobody has measured, with the command that does."""
    command = f"mlx_linearard.evaluate --run {shlex.quote(str(run))}"
    common = set.intersection(*(_suites(rows.get(name, {})) for name in (NATIVE, *names)))
    if not common & set(COPYING):
        yield Note(
            "Whether it still finds what stands in a long text and copies it exactly was not measured; perplexity and "
            "KL do not show that.",
            f"{command} --suite passkey,ruler --data TEXT",
        )
    elif window and not _beyond(rows, names, window):
        yield Note(
            f"What it finds in a text beyond the native window of {window} tokens was not measured.",
            f"{command} --suite passkey --lengths {2 * window} --data TEXT",
        )
    if not common & set(SHORT_TEXT):
        yield Note(
            "Tasks on short text were not measured.",
            f"{command} --suite choice,lambada --data choice=hf:hellaswag --data lambada=hf:lambada",
        )


def _suites(row: Mapping[str, Any]) -> set[str]:
    return {
        suite.partition("/")[0] for suite, entry in row.items() if isinstance(entry, Mapping) and "metrics" in entry
    }


def _beyond(rows: Rows, names: Sequence[str], window: int) -> bool:
    return all(any((h.length or 0) > window for h in headlines(rows.get(name, {}))) for name in names)
