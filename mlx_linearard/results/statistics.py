"""One model against another on the same items: how much is kept, how much is won back, and whether it is chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MEAN, DECISION, PERPLEXITY = "mean", "decision", "perplexity"  # the kinds of metric
ALPHA = 0.05
RESAMPLES = 10_000
FEWEST = 5  # paired samples below which no test is made
NOISE, EQUAL, TOO_FEW = "inside the noise", "equal", "too few samples"


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of McNemar's test: decisions only one of the two got right, a fair coin otherwise."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def bootstrap(differences: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """(low, high, p) of the mean of paired differences: its 95% percentile interval, and a two-sided p-value.

    p is twice the smaller share of resampled means on one side of zero, never below 1 / resamples.
    """
    values = np.asarray(differences, np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(values))
    means = np.concatenate([
        values[rng.integers(0, len(values), (min(rows, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, rows)
    ])  # fmt: skip
    low, high = np.percentile(means, [2.5, 97.5])
    side = min((means <= 0).mean(), (means >= 0).mean())
    return float(low), float(high), float(min(1.0, max(2 * side, 1 / resamples)))


def percent_of(value: float, native: float, metric: Metric) -> float | None:
    """Per cent of native, 100 for as good: value / native, inverted where lower is better; None for a native 0."""
    upper, lower = (value, native) if metric.higher_is_better else (native, value)
    return 100 * upper / lower if native and lower else None


def recovered(native: float, scaled: float, restored: float, metric: Metric) -> float | None:
    """Per cent of what scaling lost that training won back; None where scaling lost nothing.

    For a perplexity the loss is counted in nats, as the difference of the logarithms.
    """
    if metric.kind == PERPLEXITY:
        native, scaled, restored = (math.log(v) for v in (native, scaled, restored))
    sign = 1 if metric.higher_is_better else -1
    lost = sign * (native - scaled)
    return 100 * sign * (restored - scaled) / lost if lost > 0 else None


@dataclass(frozen=True)
class Paired:
    """`a` against `b` over the items both were measured on.

    difference: mean of a - b of the samples, for a perplexity in nats; low and high its 95% interval (None
    where decisions are compared, or samples are too few); p two-sided (None: too few to tell).
    """

    a: str
    b: str
    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    test: str
    outcome: str  # better, worse, equal, inside the noise, or too few samples

    @property
    def words(self) -> str:
        """The outcome as a clause."""
        if self.outcome == EQUAL:
            return f"{self.a} equals {self.b}"
        if self.p is None or self.outcome == NOISE:
            return f"{self.a} against {self.b}: {self.outcome}" + ("" if self.p is None else f" ({p_in_words(self.p)})")
        return f"{self.a} is {self.outcome} than {self.b} ({p_in_words(self.p)})"

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "words": self.words}


def paired(a: tuple[str, Mapping[str, float]], b: tuple[str, Mapping[str, float]], metric: Metric) -> Paired | None:
    """Test (label, samples by item) against another; None where they share no item."""
    shared = [item for item in a[1] if item in b[1]]
    if not shared:
        return None
    differences = [a[1][item] - b[1][item] for item in shared]
    mean = math.fsum(differences) / len(shared)
    low = high = p = None
    if metric.kind == DECISION:
        test, p = "McNemar", mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    else:
        test = "bootstrap"
        if len(shared) >= FEWEST:
            low, high, p = bootstrap(differences)
    return Paired(a[0], b[0], len(shared), mean, low, high, p, test, outcome(mean, p, metric))


def outcome(difference: float, p: float | None, metric: Metric) -> str:
    """What a paired difference says, in a word or three."""
    if difference == 0:
        return EQUAL
    if p is None:
        return TOO_FEW
    if p >= ALPHA:
        return NOISE
    return "better" if (difference > 0) == metric.higher_is_better else "worse"


def p_in_words(p: float) -> str:
    """'p = 0.02' or 'p < 0.001'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def compare(
    rows: Mapping[str, Mapping[str, float]], metric: Metric, *, native: str = "native", scaled: str = "scaled"
) -> dict[str, Any]:
    """One metric of several models side by side: rows is label -> samples by item.

    Returns label -> value, stderr, n, percent_of_native, recovered (per cent) and `tests` against native and
    scaled; what cannot be said is absent. A row's value is of all its items, all else of those it shares.
    """
    rows = {label: found for label, found in rows.items() if found}
    table: dict[str, Any] = {}
    for label, found in rows.items():
        entry: dict[str, Any] = summarize(list(found.values()), metric).as_json()
        if label != native:
            entry |= _shares(rows, label, metric, native, scaled)
        others = [other for other in (native, scaled) if other in rows and other != label and label != native]
        tests = [paired((label, rows[label]), (other, rows[other]), metric) for other in others]
        entry |= {"tests": [test.as_json() for test in tests if test]} if any(tests) else {}
        table[label] = entry
    return table


def _shares(
    rows: Mapping[str, Mapping[str, float]], label: str, metric: Metric, native: str, scaled: str
) -> dict[str, float]:
    """What can be said of percent_of_native and recovered."""
    found: dict[str, float | None] = {}
    if both := _on_shared(rows, (label, native), metric):
        found["percent_of_native"] = percent_of(both[0], both[1], metric)
    if label != scaled and (three := _on_shared(rows, (native, scaled, label), metric)):
        found["recovered"] = recovered(three[0], three[1], three[2], metric)
    return {name: value for name, value in found.items() if value is not None}


def _on_shared(rows: Mapping[str, Mapping[str, float]], labels: Sequence[str], metric: Metric) -> list[float]:
    """The models' values on the items that all of them have; [] where there are none."""
    if not all(label in rows for label in labels):
        return []
    shared = [item for item in rows[labels[0]] if all(item in rows[label] for label in labels)]
    return [summarize([rows[label][item] for item in shared], metric).value for label in labels] if shared else []


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
class Value:
    """A metric's value over n samples with its standard error; None where one sample says nothing of it."""

    value: float
    stderr: float | None
    n: int

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


def summarize(values: Sequence[float], metric: Metric) -> Value:
    """Mean and standard error (sample deviation over sqrt n); for a perplexity carried through the exponential."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    if metric.kind == PERPLEXITY:
        mean = math.exp(min(mean, 700.0))
        spread = None if spread is None else mean * spread
    return Value(mean, spread, n)
