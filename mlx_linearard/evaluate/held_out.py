"""Held-out text in a run: how close the student is to the native teacher, and the perplexity of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..data import first_token
from ..models.layers import forward_hidden, head
from ..models.pair import Pair
from ..ops.logits import compare_logits, token_nll
from ..ops.mlp import width_of
from ..results.rows import Row
from ..results.sample import Sample

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Pieces = dict[str, dict[str, float]]  # metric -> piece of held-out text -> mean over its tokens

PIECE = 64  # the largest number of tokens of a piece; paired tests resample pieces


@dataclass
class Fidelity:
    """One model's row of the table.

    perplexity: by window length. kl: KL(teacher || model) in nats per token. agreement: top-1 agreement, a fraction.
    pieces: the same numbers of each piece of a window, for paired tests: `kl`, `agreement` and, in nats,
    `perplexity@LENGTH`. A piece is named LENGTH/WINDOW/PIECE.
    """

    perplexity: dict[int, float] = field(default_factory=dict)
    kl: float | None = None
    agreement: float | None = None
    pieces: Pieces = field(default_factory=dict)
    sample: Sample | None = None  # what the model writes after a prompt of this text

    @property
    def row(self) -> Row:
        """The row of results.json; the pieces are kept in another file."""
        return Row(self.perplexity, self.kl, self.agreement, sample=self.sample)

    @classmethod
    def of_row(cls, row: Row, pieces: Mapping[str, Mapping[str, float]]) -> Fidelity:
        """The inverse of `row`, with the pieces."""
        copied = {name: dict(own) for name, own in pieces.items()}
        return cls(dict(row.perplexity), row.kl, row.agreement, copied, row.sample)

    def as_json(self) -> dict[str, Any]:
        """The row in results.json, where lengths are strings."""
        return self.row.as_json()


class _Sums:
    """One model's numbers over the windows of one length: sums over tokens and means of pieces."""

    def __init__(self, length: int) -> None:
        self.length, self.windows, self.tokens = length, 0, 0
        self.sums: dict[str, float] = {}
        self.pieces: Pieces = {}

    def add(self, **values: mx.array | np.ndarray) -> None:
        """Add one window's `nll` and, if measured, `kl` and `agreement`, (1, T) each."""
        for name, value in values.items():
            row = np.asarray(value, np.float64)[0]
            self.sums[name] = self.sums.get(name, 0.0) + float(row.sum())
            pieces = self.pieces.setdefault(f"perplexity@{self.length}" if name == "nll" else name, {})
            for i, piece in enumerate(np.array_split(row, math.ceil(len(row) / PIECE))):
                pieces[f"{self.length}/{self.windows}/{i}"] = float(piece.mean())
        self.tokens += self.length
        self.windows += 1

    def mean(self, name: str) -> float:
        return self.sums[name] / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean("nll"), 700.0))


def measure(
    pair: Pair,
    windows: Mapping[int, np.ndarray],
    *,
    native: bool,
    workspace_bytes: int,
    progress: Progress | None = None,
) -> tuple[Fidelity, Fidelity]:
    """The rows of (teacher, student) on `windows` by length, each (n, length + 1) int32.

    A model that needs a first token reads it before each window.
    Perplexity is measured at every length, the teacher's only if `native`. KL and top-1 agreement are measured at the
    longest length that fits the teacher's native window, because beyond it the native model is no reference.
    """
    teacher, student = Fidelity(kl=0.0, agreement=1.0), Fidelity()
    total = sum(w.size - len(w) for w in windows.values())
    reference = max((n for n in windows if n <= pair.native_window), default=None)
    done = 0
    pair.student.eval()
    try:
        for length, batch in windows.items():
            sums_t, sums_s = _Sums(length), _Sums(length)
            for window in batch:
                _add(pair, window, sums_t, sums_s, native, length == reference, workspace_bytes)
                done += length
                if progress:
                    progress(done, total)
            if native:
                teacher.perplexity[length] = sums_t.perplexity
            student.perplexity[length] = sums_s.perplexity
            if length == reference:
                student.kl, student.agreement = sums_s.mean("kl"), sums_s.mean("agreement")
            teacher.pieces |= sums_t.pieces
            student.pieces |= sums_s.pieces
    finally:
        pair.student.train()
    return teacher, student


def _add(
    pair: Pair, window: np.ndarray, sums_t: _Sums, sums_s: _Sums, native: bool, compared: bool, workspace: int
) -> None:
    targets = mx.array(window)[None, 1:]
    first = first_token(pair.tokenizer, pair.native_config)
    before = [] if first is None or window[0] == first else [first]  # is read before the window, and not scored
    inputs = mx.array([[*before, *window[:-1].tolist()]])

    def hidden(model: Any) -> mx.array:
        states = forward_hidden(model, inputs, feed_forward=width_of(pair.native_config), workspace_bytes=workspace)
        return states[:, len(before) :]

    hidden_s = hidden(pair.student)
    if native or compared:
        hidden_t = hidden(pair.teacher)
    if native:
        nll = token_nll(hidden_t, head(pair.teacher), targets, workspace_bytes=workspace)
        with_itself = {"kl": np.zeros(nll.shape), "agreement": np.ones(nll.shape)} if compared else {}
        sums_t.add(nll=nll, **with_itself)
    if compared:
        compared_logits = compare_logits(
            hidden_s, hidden_t, head(pair.student), head(pair.teacher), targets, workspace_bytes=workspace
        )
        assert compared_logits.nll is not None
        sums_s.add(nll=compared_logits.nll, kl=compared_logits.kl, agreement=compared_logits.agreement)
    else:
        sums_s.add(nll=token_nll(hidden_s, head(pair.student), targets, workspace_bytes=workspace))
