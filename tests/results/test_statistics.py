"""Comparisons against values worked out by hand, and standard errors against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_linearard.results.statistics import (
    DECISION,
    NOISE,
    PERPLEXITY,
    Metric,
    bootstrap,
    compare,
    mcnemar,
    paired,
    percent_of,
    recovered,
    summarize,
)

PPL = Metric(PERPLEXITY, higher_is_better=False)
KL = Metric(higher_is_better=False)
ACC = Metric(DECISION)
AVERAGE = Metric(grouped=True)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # 2 * P(X <= 1 of 6 fair coins) = 2 * 7 / 64; nothing discordant says nothing; a tie cannot exceed 1.
    assert mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(1, 5) == mcnemar(5, 1)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)
    assert mcnemar(0, 0) == 1.0 and mcnemar(3, 3) == 1.0


def test_bootstrap_interval_matches_the_normal_one_and_repeats() -> None:
    differences = np.random.default_rng(1).normal(0.5, 2.0, 400)
    low, high, p = bootstrap(differences)
    mean, half = differences.mean(), 1.96 * differences.std(ddof=1) / 20
    assert low == pytest.approx(mean - half, abs=0.1 * half) and high == pytest.approx(mean + half, abs=0.1 * half)
    assert p < 0.001 and bootstrap(differences) == (low, high, p)
    assert bootstrap(differences - mean)[2] > 0.5


def test_summary_has_the_standard_error_of_the_mean() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    found = summarize(named(values), ACC)
    assert found.value == pytest.approx(0.6) and found.n == 5
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    nats = summarize(named([2.0, 3.0]), PPL)
    assert nats.value == pytest.approx(math.exp(2.5)) and nats.stderr == pytest.approx(math.exp(2.5) * 0.5)
    assert summarize(named([1.0]), ACC).stderr is None


def named(values: list[float]) -> dict[str, float]:
    """Samples by item."""
    return {str(i): value for i, value in enumerate(values)}


def test_what_chosen_tasks_differ_by_is_not_an_error() -> None:
    """The standard error of an average of tasks is that of their means: here of 30 and 40 samples."""
    rng = np.random.default_rng(2)
    tasks = {"easy": 90 + rng.normal(0, 5, 30), "hard": 10 + rng.normal(0, 8, 40)}
    samples = {f"{task}/4096/{i}": float(v) for task, values in tasks.items() for i, v in enumerate(values)}
    found = summarize(samples, AVERAGE)
    errors = [len(v) * np.std(v, ddof=1) / math.sqrt(len(v)) for v in tasks.values()]
    assert found.stderr == pytest.approx(math.hypot(*errors) / 70) and found.n == 70
    assert found.value == pytest.approx(np.mean(np.concatenate(list(tasks.values()))))
    assert summarize(samples, Metric()).stderr > 4 * found.stderr  # as if the tasks were drawn
    single = {item: samples[item] for item in ("easy/4096/0", "easy/4096/1", "hard/4096/0")}
    assert summarize(single, AVERAGE) == summarize(single, Metric())


def test_paired_samples_of_tasks_are_drawn_task_by_task() -> None:
    """A task that gains 10 and one that loses 10 for sure make a difference of 0 for sure."""
    differences = [10.0] * 20 + [-10.0] * 20
    groups = [range(20), range(20, 40)]
    assert bootstrap(differences, groups)[:2] == (0.0, 0.0) and bootstrap(differences)[0] < -2
    a = {f"{'up' if d > 0 else 'down'}/8/{i}": d + (i == 0) for i, d in enumerate(differences)}
    test = paired(("a", a), ("b", dict.fromkeys(a, 0.0)), AVERAGE)
    assert test and 0.0 == test.low <= test.difference <= test.high < 0.2


def test_shares_of_native_and_of_the_loss() -> None:
    assert percent_of(0.45, 0.5, ACC) == pytest.approx(90)
    assert percent_of(40.0, 30.0, PPL) == pytest.approx(75)
    assert percent_of(0.1, 0.0, KL) is None
    assert recovered(0.0, 1.70, 0.17, KL) == pytest.approx(90)
    assert recovered(0.6, 0.4, 0.55, ACC) == pytest.approx(75)
    assert recovered(math.e, math.e**3, math.e**2, PPL) == pytest.approx(50)  # in nats: 1, 3 and 2
    assert recovered(0.0, 1.0, 1.5, KL) == pytest.approx(-50)
    assert recovered(0.5, 0.6, 0.7, ACC) is None  # nothing was lost


def items(*values: float) -> dict[str, float]:
    return {str(i): value for i, value in enumerate(values)}


def test_noise_is_called_noise_and_a_difference_better_or_worse() -> None:
    good, bad = items(*[1.0] * 10), items(*[0.0] * 9, 1.0)
    found = paired(("restored", good), ("scaled", bad), ACC)
    assert found and found.outcome == "better" and found.p == pytest.approx(2 / 512) and "better" in found.words
    back = paired(("scaled", bad), ("restored", good), ACC)
    assert back and back.outcome == "worse"
    noisy = paired(("a", items(1, 0, 1, 0, 1)), ("b", items(0, 1, 1, 1, 1)), ACC)
    assert noisy and noisy.outcome == NOISE and NOISE in noisy.words
    assert paired(("a", good), ("b", good), ACC).outcome == "equal"  # type: ignore[union-attr]
    assert paired(("a", items(1.0)), ("b", {"other": 1.0}), ACC) is None


def test_lower_is_better_for_perplexity_and_few_windows_are_not_tested() -> None:
    low, high = items(1.0, 1.1, 1.2, 1.0, 1.1, 1.0), items(2.0, 2.2, 2.1, 2.0, 2.2, 2.1)
    found = paired(("restored", low), ("scaled", high), PPL)
    assert found and found.outcome == "better" and found.low is not None and found.high is not None
    assert found.low < found.difference < found.high < 0
    few = paired(("restored", items(1.0, 2.0)), ("scaled", items(2.0, 3.0)), PPL)
    assert few and few.p is None and few.outcome == "too few samples"


def test_a_table_has_what_can_be_said_and_nothing_else() -> None:
    rows = {"native": items(1, 1, 1, 1), "scaled": items(0, 0, 0, 0), "restored": items(1, 1, 1, 0), "other": {}}
    table = compare(rows, ACC)
    assert set(table) == {"native", "scaled", "restored"}
    assert table["restored"].percent_of_native == 75 and table["restored"].recovered == 75
    assert [test.b for test in table["restored"].tests] == ["native", "scaled"]
    assert table["scaled"].recovered is None and not table["native"].tests
    assert "recovered" not in table["scaled"].as_json() and "tests" not in table["native"].as_json()
