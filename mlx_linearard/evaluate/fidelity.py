"""How close the student is to the native teacher, and both models' perplexity, on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..objective import forward_hidden
from ..pair import Pair
from ..vocabulary import compare_logits, token_nll
from ..walk import head

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


@dataclass
class Fidelity:
    """One model's row of the table. Perplexity by window length; KL(teacher || model) in nats a token."""

    perplexity: dict[int, float] = field(default_factory=dict)
    kl: float | None = None
    agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as results.json keeps it: lengths are strings there."""
        return {
            "perplexity": {str(length): value for length, value in self.perplexity.items()},
            "kl": self.kl,
            "agreement": self.agreement,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Fidelity:
        """The inverse of `as_json`."""
        lengths = {int(length): value for length, value in row["perplexity"].items()}
        return cls(lengths, row["kl"], row["agreement"])


@dataclass
class _Sums:
    """Running sums of one model over the windows of one length."""

    nll: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    tokens: int = 0

    def add(self, nll: mx.array, kl: mx.array | None = None, agreement: mx.array | None = None) -> None:
        self.tokens += nll.size
        self.nll += _sum(nll)
        self.kl += 0.0 if kl is None else _sum(kl)
        self.agreement += 0.0 if agreement is None else _sum(agreement)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.tokens, 700.0))


def _sum(values: mx.array) -> float:
    return float(values.sum().item())  # type: ignore[arg-type]


def measure(
    pair: Pair,
    windows: Mapping[int, np.ndarray],
    *,
    native: bool,
    workspace_bytes: int,
    progress: Progress | None = None,
) -> tuple[Fidelity, Fidelity]:
    """(teacher, student) on windows by length, each (n, length + 1) int32; the teacher's perplexity only if `native`.

    Perplexity is taken at every length. KL and top-1 agreement are taken at the longest length that fits the
    teacher's native window: beyond it the native model is no reference.
    """
    teacher, student = Fidelity(kl=0.0, agreement=1.0), Fidelity()
    total = sum(w.size - len(w) for w in windows.values())
    reference = max((n for n in windows if n <= pair.native_window), default=None)
    done = 0
    pair.student.eval()
    try:
        for length, batch in windows.items():
            sums_t, sums_s = _Sums(), _Sums()
            for window in batch:
                _add(pair, window, sums_t, sums_s, native, length == reference, workspace_bytes)
                done += length
                if progress:
                    progress(done, total)
            if native:
                teacher.perplexity[length] = sums_t.perplexity
            student.perplexity[length] = sums_s.perplexity
            if length == reference:
                student.kl, student.agreement = sums_s.kl / sums_s.tokens, sums_s.agreement / sums_s.tokens
    finally:
        pair.student.train()
    return teacher, student


def _add(
    pair: Pair, window: np.ndarray, sums_t: _Sums, sums_s: _Sums, native: bool, compared: bool, workspace: int
) -> None:
    tokens = mx.array(window)[None]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden_s = forward_hidden(pair.student, inputs, workspace_bytes=workspace)
    if native or compared:
        hidden_t = forward_hidden(pair.teacher, inputs, workspace_bytes=workspace)
    if native:
        sums_t.add(token_nll(hidden_t, head(pair.teacher), targets, workspace_bytes=workspace))
    if compared:
        found = compare_logits(
            hidden_s, hidden_t, head(pair.student), head(pair.teacher), targets, workspace_bytes=workspace
        )
        assert found.nll is not None
        sums_s.add(found.nll, found.kl, found.agreement)
    else:
        sums_s.add(token_nll(hidden_s, head(pair.student), targets, workspace_bytes=workspace))
