"""Finds the best state of a run, by its evaluations on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..evaluate.held_out import Fidelity
from .step import Best, TrainState


def reference_length(lengths: Iterable[int], native_window: int) -> int:
    """The length, in tokens, at which states are compared: the longest within the native window, else the shortest.

    Beyond its native window the teacher is not a valid reference.
    """
    ordered = sorted(lengths)
    return max((n for n in ordered if n <= native_window), default=ordered[0])


def score(row: Fidelity, objective: str, length: int) -> float:
    """One number for a row, lower is better: KL to the teacher in nats per token, inf if it is not finite.

    With objective `ce`, or if there is no KL, the number is the log-perplexity at `length` tokens.
    """
    value = math.log(row.perplexity[length]) if objective == "ce" or row.kl is None else row.kl
    return value if math.isfinite(value) else math.inf


def judge(state: TrainState, value: float, text: str) -> bool:
    """Record the score of the present state; return whether it is the best so far.

    Args:
        value: the score; lower is better.
        text: a hash of the windows that were evaluated.
    """
    if state.best is None or value < state.best.score:
        state.best = Best(state.step, value, 0, state.step, text)
        return True
    state.best.misses += 1
    state.best.evaluated = state.step
    return False
