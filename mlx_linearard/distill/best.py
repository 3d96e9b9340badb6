"""Which state of a run is the best, by its evaluations on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..evaluate.held_out import Fidelity
from .step import Best, TrainState


def reference_length(lengths: Iterable[int], native_window: int) -> int:
    """The length at which states are compared: the longest where the teacher is a reference, else the shortest."""
    ordered = sorted(lengths)
    return max((n for n in ordered if n <= native_window), default=ordered[0])


def score(row: Fidelity, objective: str, length: int) -> float:
    """Lower is better: KL to the teacher in nats a token; log-perplexity with objective `ce`, or without a KL."""
    value = math.log(row.perplexity[length]) if objective == "ce" or row.kl is None else row.kl
    return value if math.isfinite(value) else math.inf


def judge(state: TrainState, value: float, text: str) -> bool:
    """Take the score of the state as it is, on windows of hash `text`, into account; whether it is the best so far."""
    if state.best is None or value < state.best.score:
        state.best = Best(state.step, value, 0, state.step, text)
        return True
    state.best.misses += 1
    state.best.evaluated = state.step
    return False
