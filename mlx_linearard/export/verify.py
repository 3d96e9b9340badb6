"""Checks a written model: stock mlx-lm loads it, and its logits must be those of the student in memory.

A single computation can give a wrong result. So the student's logits are computed twice, and if the loaded model
differs, it is loaded and computed again before anything is reported. Rounding alone stays within the
tolerance: in one of 303 exports of SmolLM2 in bfloat16 it changed a single early position by much, which gave a mean
KL of 0.020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from ..errors import UserError
from ..models.directory import path_for_mlx_lm
from ..models.experts import compute_in_float32
from ..models.trees import named_arrays

ATTEMPTS = 4  # computations of one side, until two in succession agree
SAME = 1e-3  # the largest mean KL between two computations of the same numbers; one wrong row of 64 gives 0.1
STUDENT, EXPORT = "the student in memory", "the loaded export"

# The largest mean KL between the student in memory and the export as stock mlx-lm loads it, in nats per token, by
# the dtype of the export: fusing rounds W + scale B A once more. A larger KL has another cause.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 5e-2}


@dataclass(frozen=True)
class Logits:
    """The logits of one side on the sample, (T, V) float32."""

    values: np.ndarray
    stable: bool = True  # False: the logits were different when computed again


@dataclass(frozen=True)
class Verified:
    """How far the loaded export is from the student in memory, on one sample."""

    max_difference: float  # the largest difference of two logits, over all positions
    kl: float  # nats per token
    tokens: int
    tolerance: float  # the largest allowed `kl`
    unstable: tuple[str, ...] = ()  # the sides whose logits changed when they were computed again

    @property
    def ok(self) -> bool:
        return self.kl <= self.tolerance

    @property
    def note(self) -> str | None:
        """One line about a side that was unstable; None if there is none."""
        if not self.unstable:
            return None
        return f"{' and '.join(self.unstable)} gave different logits when computed again"

    def check(self, directory: Path) -> None:
        """Raise UserError, in one line, if the export in `directory` is not what was trained."""
        if self.ok:
            return
        raise UserError(
            f"the export in {directory} does not compute what was trained: KL {self.kl:.2g} nats per token "
            f"(at most {self.tolerance:.2g}), logits differ by up to {self.max_difference:.2g}; "
            f"{self.note or 'both sides gave the same logits when computed again'}. The results and the report are "
            "written; run the same command with --resume to export again"
        )


def student_logits(student: Any, tokens: np.ndarray) -> Logits:
    """The student's logits on `tokens` (T,), computed until two results in succession agree."""
    return _settled(lambda: _logits(student, tokens), [])


def verify_export(directory: Path, tokens: np.ndarray, expected: Logits) -> Verified:
    """Load `directory` with stock mlx-lm and compare its logits on `tokens` with the student's.

    Experts are computed in float32 where the device needs it (`models.experts`). If the logits differ, the export is
    loaded and computed again until two results in succession agree.
    """
    dtypes: set[mx.Dtype] = set()

    def loaded() -> np.ndarray:
        with path_for_mlx_lm(directory) as path:
            model, _ = load_model(path)
        compute_in_float32(model)
        dtypes.update(array.dtype for _, array in named_arrays(model.parameters()))
        return _logits(model, tokens)

    found = Logits(loaded())
    tolerance = max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[mx.bfloat16])
    if not _mean_kl(expected.values, found.values) <= tolerance:  # NaN as well
        found = _settled(loaded, [found.values])
    unstable = tuple(name for name, side in ((STUDENT, expected), (EXPORT, found)) if not side.stable)
    kl = _mean_kl(expected.values, found.values)
    difference = float(np.abs(found.values - expected.values).max())
    return Verified(difference, kl, len(tokens), tolerance, unstable)


def _logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """A model's logits on one sample by its own stock code, (T, V) float32."""
    model.eval()
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


def _settled(compute: Callable[[], np.ndarray], results: list[np.ndarray]) -> Logits:
    """`compute` until two results in succession agree, `results` counted; the last result if none do."""
    results = results or [compute()]
    while len(results) < ATTEMPTS:
        results.append(compute())
        if _mean_kl(results[-2], results[-1]) <= SAME:
            return Logits(results[-1], len(results) == 2)
    return Logits(results[-1], False)


def _mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    """KL(softmax a || softmax b), averaged over rows, in float64; NaN if a logit is not finite."""
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
