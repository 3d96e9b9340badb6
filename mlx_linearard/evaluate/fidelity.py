"""How close the student is to the native teacher, and both models' perplexity, on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ..data import windows
from ..errors import UserError
from ..models.layers import forward_hidden, head
from ..models.pair import Pair
from ..ops.logits import compare_logits, token_nll
from ..ops.mlp import width_of
from ..results.statistics import Metric
from ..results.store import Record
from .subject import LOGITS_BYTES, Directory, Subject, Tick, digest, itself
from .suite import Item

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Pieces = dict[str, dict[str, float]]  # metric -> piece of held-out text -> mean over its tokens

PIECE = 64  # tokens of a piece, at most: what paired tests resample


@dataclass
class Fidelity:
    """One model's row of the table. Perplexity by window length; KL(teacher || model) in nats a token.

    `pieces` has the same numbers over pieces of each window, for paired tests: `kl`, `agreement` and, in nats,
    `perplexity@LENGTH`; a piece is named LENGTH/WINDOW/PIECE.
    """

    perplexity: dict[int, float] = field(default_factory=dict)
    kl: float | None = None
    agreement: float | None = None
    pieces: Pieces = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as results.json keeps it: lengths are strings there."""
        return {
            "perplexity": {str(length): value for length, value in self.perplexity.items()},
            "kl": self.kl,
            "agreement": self.agreement,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any], pieces: Pieces | None = None) -> Fidelity:
        """The inverse of `as_json`, with the pieces that are kept elsewhere."""
        lengths = {int(length): value for length, value in row["perplexity"].items()}
        return cls(lengths, row["kl"], row["agreement"], pieces or {})


class _Sums:
    """One model's numbers over the windows of one length: sums over tokens, and means over pieces."""

    def __init__(self, length: int) -> None:
        self.length, self.windows, self.tokens = length, 0, 0
        self.sums: dict[str, float] = {}
        self.pieces: Pieces = {}

    def add(self, **values: mx.array | np.ndarray) -> None:
        """One window's `nll` and perhaps `kl` and `agreement`, (1, T) each."""
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
    tokens = mx.array(window)[None]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    width = width_of(pair.native_config)
    hidden_s = forward_hidden(pair.student, inputs, feed_forward=width, workspace_bytes=workspace)
    if native or compared:
        hidden_t = forward_hidden(pair.teacher, inputs, feed_forward=width, workspace_bytes=workspace)
    if native:
        nll = token_nll(hidden_t, head(pair.teacher), targets, workspace_bytes=workspace)
        itself_kl = {"kl": np.zeros(nll.shape), "agreement": np.ones(nll.shape)} if compared else {}
        sums_t.add(nll=nll, **itself_kl)
    if compared:
        found = compare_logits(
            hidden_s, hidden_t, head(pair.student), head(pair.teacher), targets, workspace_bytes=workspace
        )
        assert found.nll is not None
        sums_s.add(nll=found.nll, kl=found.kl, agreement=found.agreement)
    else:
        sums_s.add(nll=token_nll(hidden_s, head(pair.student), targets, workspace_bytes=workspace))


# ---------------------------------------------------------------------------------------------------
# Between any two directories, through stock mlx-lm

TOP = 5


@dataclass(frozen=True)
class FidelityToReference:
    """Suite `fidelity`: how close a model's next-token distributions are to those of `reference`.

    On windows of `lengths` (one or several) + 1 of `tokens` (N,), about `budget` tokens a length, none longer
    than the reference's own window. Metrics, means over windows, each also as NAME@LENGTH: `kl`, KL(reference ||
    model) in nats a token; `top1`, the share of positions where both put the same token first; `top5`, the
    share of the reference's first five tokens among the model's first five.
    """

    tokens: np.ndarray
    lengths: int | tuple[int, ...]
    reference: Subject
    budget: int = 32768
    name: str = "fidelity"
    parts: ClassVar[tuple[str, ...]] = ("lengths",)

    @property
    def options(self) -> dict[str, Any]:
        text = digest(self.tokens.tobytes().hex())
        reference = self.reference.directory.fingerprint()
        return {"lengths": list(self._lengths), "tokens": self.budget, "text": text, "reference": reference}

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (self.lengths,) if isinstance(self.lengths, int) else self.lengths

    def items(self, directory: Directory, window: int) -> list[Item]:
        """Windows of the reference's length; UserError where it or the text is too short."""
        return [item for length in self._lengths for item in self._windows(length)]

    def _windows(self, length: int) -> list[Item]:
        limit = self.reference.directory.window
        if length > limit:
            raise UserError(
                f"{length} tokens do not fit the window of the reference {self.reference.directory.path}, "
                f"{limit} tokens, beyond which it is none: give shorter --lengths"
            )
        cut = windows(self.tokens, length, max(1, self.budget // length))
        if not len(cut):
            raise UserError(
                f"the text of suite {self.name} has {len(self.tokens)} tokens, too few for one window of "
                f"{length}: give more text with --data or a shorter --lengths"
            )
        return [Item(f"{length}/{i}", row, length) for i, row in enumerate(cut)]

    def measure(self, subject: Subject, item: Item, tick: Tick) -> Record:
        inputs = item.content[:-1]
        means = self._means(subject, inputs, tick)
        return {"id": item.id, "samples": means | {f"{name}@{len(inputs)}": value for name, value in means.items()}}

    def _means(self, subject: Subject, inputs: np.ndarray, tick: Tick) -> dict[str, float]:
        if subject.directory.path == self.reference.directory.path:
            tick(len(inputs))
            return {"kl": 0.0, "top1": 1.0, "top5": 1.0}
        sums = np.zeros(3)
        both = zip(self.reference.logits(inputs), subject.logits(inputs, tick), strict=True)
        for (_, reference), (_, logits) in both:
            found = compare_logits(logits, reference, itself, itself, workspace_bytes=4 * LOGITS_BYTES)
            sums += [_sum(found.kl), _sum(found.agreement), _sum(top_overlap(logits, reference))]
        return dict(zip(("kl", "top1", "top5"), (sums / len(inputs)).tolist(), strict=True))

    def metric(self, name: str) -> Metric:
        distance = name.partition("@")[0] == "kl"
        return Metric(higher_is_better=not distance, ideal=0.0 if distance else 1.0)

    def extras(self, records: Sequence[Record]) -> dict[str, Any]:
        return {}


def top_overlap(a: mx.array, b: mx.array, count: int = TOP) -> mx.array:
    """The share of b's `count` largest entries along the last axis that are among a's; (..., V) -> (...)."""
    first_a, first_b = (mx.argpartition(x, -count, axis=-1)[..., -count:] for x in (a, b))
    return (first_a[..., :, None] == first_b[..., None, :]).any(axis=-2).mean(axis=-1)
