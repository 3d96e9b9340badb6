"""Prompts that are made in other threads: their order, what they raise, and how many are made too early."""

from __future__ import annotations

import threading

import pytest

from mlx_linearard.evaluate.suites import ahead
from mlx_linearard.evaluate.suites.ahead import made_ahead


def test_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 5)
    gates = [threading.Event() for _ in range(30)]
    for gate in gates[1:]:
        gate.set()

    def make(number: int) -> int:
        if number:
            gates[0].set()  # the first can end only after a later one has begun
        assert gates[number].wait(20)
        return number * number

    assert list(made_ahead(make, range(30))) == [(number, number * number) for number in range(30)]


def test_only_a_few_are_made_before_they_are_asked_for() -> None:
    taken: list[int] = []

    def things():
        for number in range(1000):
            taken.append(number)
            yield number

    results = made_ahead(str, things())
    assert next(results) == (0, "0") and len(taken) <= 1 + ahead.AHEAD * ahead.THREADS
    results.close()


def test_an_error_comes_with_its_own_result() -> None:
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = made_ahead(make, range(9))
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(ValueError, match="three"):
        next(results)
