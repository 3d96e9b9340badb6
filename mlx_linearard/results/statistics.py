"""Models on the same items: values with standard errors, what is kept and won back, and paired tests of chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .rows import NATIVE, OUTCOMES, SCALED, Compared, Comparison, PairedTest, Value

MEAN, DECISION, PERPLEXITY = "mean", "decision", "perplexity"  # the kinds of metric
ALPHA = 0.05
RESAMPLES = 10_000
FEWEST = 5  # paired samples; with fewer no test is made
BETTER, WORSE, EQUAL, NOISE, TOO_FEW = OUTCOMES
MAX_NATS = 700.0  # the largest mean whose exponential is taken: exp(700) is about 1e304

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5% of Student's t, 1 to 10 degrees

Samples = Mapping[str, float]  # item -> number


@dataclass(frozen=True)
class Metric:
    """How the samples of one metric become its value.

    kind: `decision` (samples 0 or 1, the value is their mean), `mean`, or `perplexity` (samples in nats, the
    value is the exponential of their mean).
    grouped: an item is named GROUP/..., and the groups were chosen, not drawn, such as the tasks of an average: what
    they differ by is no part of the standard error, nor of a test.
    """

    kind: str = MEAN
    higher_is_better: bool = True
    grouped: bool = False

    def groups(self, items: Iterable[str]) -> list[list[int]]:
        """The places of the items of each group; one group if they are not grouped, or one group has a single item."""
        names = [item.partition("/")[0] if self.grouped else "" for item in items]
        found: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            found.setdefault(name, []).append(place)
        return list(found.values()) if all(len(group) > 1 for group in found.values()) else [list(range(len(names)))]


KL, AGREEMENT = "kl", "agreement"  # the metrics of held-out text, beside perplexity@LENGTH
HELD_OUT_METRICS = {KL: Metric(higher_is_better=False), AGREEMENT: Metric()}
_PERPLEXITY = Metric(PERPLEXITY, higher_is_better=False)


def summarize(samples: Samples, metric: Metric) -> Value:
    """Mean and standard error of samples by item; for a perplexity carried through the exponential.

    The standard error is the sample deviation over sqrt n, or that of the groups together. One sample has none.
    """
    values = list(samples.values())
    n = len(values)
    mean = math.fsum(values) / n
    stderr = None
    if n > 1:
        squares = (_square_error([values[i] for i in group]) for group in metric.groups(samples))
        stderr = math.sqrt(math.fsum(squares)) / n
    if metric.kind == PERPLEXITY:
        mean = math.exp(min(mean, MAX_NATS))
        stderr = None if stderr is None else mean * stderr
    return Value(mean, stderr, n)


def _square_error(values: Sequence[float]) -> float:
    """The square of the standard error of the sum of several values."""
    n = len(values)
    mean = math.fsum(values) / n
    return n * math.fsum((v - mean) ** 2 for v in values) / (n - 1)


def margin(value: Value) -> float | None:
    """Half the 95% interval of a mean, by Student's t; None if one sample cannot give one."""
    if value.stderr is None or value.n is None or value.n < 2:
        return None
    freedom = value.n - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.6 / freedom  # within 0.01
    return quantile * value.stderr


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of McNemar's test: decisions only one of the two got right, a fair coin otherwise."""
    n = wins + losses
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def bootstrap(
    differences: Sequence[float],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """(low, high, p) of the mean of paired differences: its 95% percentile interval, and a two-sided p-value.

    p is twice the smaller fraction of resampled means on one side of zero, never below 1 / resamples. Each of the
    `groups`, places of differences, is resampled by itself.
    """
    values = np.asarray(differences, np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, 4_000_000 // len(values))
    parts = []
    places = [np.array(group) for group in groups or [range(len(values))]]
    for done in range(0, resamples, rows):
        drawn = (at[rng.integers(0, len(at), (min(rows, resamples - done), len(at)))] for at in places)
        parts.append(values[np.concatenate(list(drawn), axis=1)].mean(axis=1))
    means = np.concatenate(parts)
    low, high = np.percentile(means, [2.5, 97.5])
    side = min((means <= 0).mean(), (means >= 0).mean())
    return float(low), float(high), float(min(1.0, max(2 * side, 1 / resamples)))


def percent_of(value: float, native: float, metric: Metric) -> float | None:
    """Per cent of native; 100 is as good. value / native, inverted if lower is better; None if either is 0."""
    upper, lower = (value, native) if metric.higher_is_better else (native, value)
    return 100 * upper / lower if native and lower else None


def recovered(native: float, scaled: float, restored: float, metric: Metric) -> float | None:
    """Per cent of the loss by scaling that training won back; None if scaling lost nothing.

    For a perplexity the loss is counted in nats, as the difference of the logarithms.
    """
    if metric.kind == PERPLEXITY:
        native, scaled, restored = (math.log(v) for v in (native, scaled, restored))
    sign = 1 if metric.higher_is_better else -1
    loss = sign * (native - scaled)
    return 100 * sign * (restored - scaled) / loss if loss > 0 else None


def paired(a: tuple[str, Samples], b: tuple[str, Samples], metric: Metric) -> PairedTest | None:
    """Test model `a`, as (label, samples by item), against model `b`; None if they share no item."""
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
            low, high, p = bootstrap(differences, metric.groups(shared))
    result = outcome(mean, p, metric)
    return PairedTest(a[0], b[0], len(shared), mean, low, high, p, test, result, _words(a[0], b[0], result, p))


def outcome(difference: float, p: float | None, metric: Metric) -> str:
    """The result of a paired test: better, worse, equal, inside the noise, or too few samples."""
    if difference == 0:
        return EQUAL
    if p is None:
        return TOO_FEW
    if p >= ALPHA:
        return NOISE
    return BETTER if (difference > 0) == metric.higher_is_better else WORSE


def _words(a: str, b: str, result: str, p: float | None) -> str:
    if result == EQUAL:
        return f"{a} equals {b}"
    if p is None or result == NOISE:
        return f"{a} against {b}: {result}" + ("" if p is None else f" ({p_in_words(p)})")
    return f"{a} is {result} than {b} ({p_in_words(p)})"


def p_in_words(p: float) -> str:
    """'p = 0.02' or 'p < 0.001'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def compare(
    rows: Mapping[str, Samples], metric: Metric, *, native: str = NATIVE, scaled: str = SCALED
) -> dict[str, Compared]:
    """One metric of several models side by side: `rows` is label -> samples by item.

    Returns label -> its numbers, with tests against native and scaled. A value is over all items of its model;
    everything else is over the items that the models share. A model without samples is left out.
    """
    rows = {label: samples for label, samples in rows.items() if samples}
    return {label: _compared(rows, label, metric, native, scaled) for label in rows}


def _compared(rows: Mapping[str, Samples], label: str, metric: Metric, native: str, scaled: str) -> Compared:
    value = summarize(rows[label], metric)
    if label == native:
        return Compared(value)
    kept = _on_shared(rows, (label, native), metric)
    three = _on_shared(rows, (native, scaled, label), metric) if label != scaled else []
    others = [other for other in (native, scaled) if other in rows and other != label]
    tests = [paired((label, rows[label]), (other, rows[other]), metric) for other in others]
    return Compared(
        value,
        percent_of(kept[0], kept[1], metric) if kept else None,
        recovered(three[0], three[1], three[2], metric) if three else None,
        tuple(test for test in tests if test),
    )


def _on_shared(rows: Mapping[str, Samples], labels: Sequence[str], metric: Metric) -> list[float]:
    """The models' values on the items that all of them have; [] if there are none."""
    if not all(label in rows for label in labels):
        return []
    shared = [item for item in rows[labels[0]] if all(item in rows[label] for label in labels)]
    on_shared = [{item: rows[label][item] for item in shared} for label in labels]
    return [summarize(samples, metric).value for samples in on_shared] if shared else []


def compare_objectives(models: Mapping[str, Mapping[str, Samples]], objectives: Sequence[str]) -> Comparison:
    """Native, scaled and the model of each objective on the same pieces of held-out text.

    `models` is label -> metric -> samples by piece. Each objective is also tested against the best one, metric by
    metric. The best is the one with the lowest KL and perplexity, and the highest agreement.
    """
    best: dict[str, str] = {}
    metrics: dict[str, dict[str, Compared]] = {}
    for name in models[SCALED]:
        metric = HELD_OUT_METRICS.get(name, _PERPLEXITY)
        rows = {label: samples[name] for label, samples in models.items() if name in samples}
        table = compare(rows, metric)
        sign = -1 if metric.higher_is_better else 1
        winner = min(objectives, key=lambda label: sign * table[label].value.value)
        for label in objectives:
            test = paired((label, rows[label]), (winner, rows[winner]), metric) if label != winner else None
            if test:
                table[label] = replace(table[label], tests=(*table[label].tests, test))
        best[name], metrics[name] = winner, table
    return Comparison(NATIVE, metrics, best)
