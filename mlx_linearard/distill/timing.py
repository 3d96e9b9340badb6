"""Estimates the time of a run before it starts, and chooses how much held-out text is measured in that time.

The unit of work is one pass of a token through the model. Its time follows from the counts of multiplications and,
on a CPU, exponentials, and from the machine's measured speed. On a CPU an estimate was within a factor of two. On a
GPU, where loading and compiling kernels comes on top, a short run took more than four times its estimate.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import DistillConfig
from ..machine import Machine
from ..models.shape import Shape
from ..ops.tiling import FLOAT32
from ..progress import duration
from .long_text import LongSizes

GPU_EFFICIENCY = 0.35  # fraction of the matrix speed that a step reached on one GPU
CPU_EFFICIENCY = 0.6
CPU_EXP_SECONDS = 1e-8  # per exponential on one core; a GPU hides this time
SOFTMAX_EXPONENTIALS = 2  # per logit
PASSES = 4  # passes of a training token through the layers: teacher, student, recomputation, gradient
RELATION_PRODUCTS = 4  # matrix products of a relation: both scores, and the gradient E X + E^T X
DISK_BYTES_PER_SECOND = 2e8  # written and read again

MEASURING_SHARE = 0.25  # the part of the training time for all measurements together
FEWEST_WINDOWS = 4  # measured even if they take a larger share, but never longer than training
MOST_TOKENS = 32768  # per length


@dataclass(frozen=True)
class Times:
    """Estimated seconds of the three parts of a run."""

    measuring: float
    training: float
    exporting: float

    @property
    def total(self) -> float:
        return self.measuring + self.training + self.exporting

    def line(self) -> str:
        """The times in one line."""
        parts = ", ".join(f"{name} {duration(getattr(self, name))}" for name in ("measuring", "training", "exporting"))
        return f"time: about {duration(self.total)} ({parts})"


@dataclass(frozen=True)
class Clock:
    """The time of parts of a run with one model on one machine."""

    shape: Shape
    machine: Machine
    config: DistillConfig

    def blocks(self, length: int) -> float:
        """Seconds of one token through all layers, in a causal window of `length` tokens."""
        shape = self.shape
        scores = length / 2 * shape.heads * shape.layers
        return self._seconds(2 * shape.block_weights + 4 * scores * shape.head_dim, scores)

    def head(self) -> float:
        """Seconds of one token's logits and their softmax."""
        return self._seconds(2 * self.shape.width * self.shape.vocabulary, SOFTMAX_EXPONENTIALS * self.shape.vocabulary)

    def training(self, tokens: int, seq_len: int) -> float:
        """Seconds of `tokens` training tokens in blocks of `seq_len`."""
        shape, objective = self.shape, self.config.objective
        per_token = PASSES * self.blocks(seq_len)
        if "logits" in objective:
            per_token += 3 * self.head()  # both models and the gradient
        elif objective == "ce":
            per_token += 2 * self.head()
        if "relation" in objective:
            scores = seq_len / 2 * sum(shape.heads_of(self.config.relations)) * self._supervised()
            per_token += self._seconds(2 * RELATION_PRODUCTS * scores * shape.head_dim, 2 * scores)
        return tokens * per_token

    def long_part(self, sizes: LongSizes) -> float:
        """Seconds of one long block."""
        objective = self.config.long_objective
        seconds = sizes.seq_len * PASSES * self.blocks(sizes.seq_len)
        if objective != "recall":
            seconds += 2 * sizes.text * self.head()
        if "longce" in objective:  # the teacher's windows overlap by half
            seconds += sizes.text * (2 * self.blocks(sizes.window) + self.head())
        if "recall" in objective:
            both = 2 * sizes.passage
            seconds += sizes.passages * both * self.blocks(both) + 3 * sizes.recalled * self.head()
        return seconds

    def measuring(self, tokens: int, lengths: Sequence[int], reference: int, evaluations: int) -> float:
        """Seconds of all measurements of `tokens` held-out tokens per length.

        At the start both models read every length. At the end the student reads every length again, and the teacher
        reads the windows of `reference` tokens, on which the two are compared. In each of the `evaluations` in between
        both read these windows.
        """

        def one_pass(length: int) -> float:
            return held_out_windows(tokens, length) * length * (self.blocks(length) + self.head())

        once = sum(one_pass(length) for length in lengths)
        return 3 * once + (1 + 2 * evaluations) * one_pass(reference)

    def exporting(self) -> float:
        """Seconds to write the fused model and to read it again."""
        shape = self.shape
        weights = shape.block_weights + shape.vocabulary * shape.width
        return 2 * weights * (2 if self.machine.gpu else FLOAT32) / DISK_BYTES_PER_SECOND

    def _supervised(self) -> int:
        """The number of layers whose relations are matched."""
        layers = self.config.layers
        return {"last": 1, "all": self.shape.layers}.get(layers, layers.count(",") + 1)

    def _seconds(self, operations: float, exponentials: float) -> float:
        if self.machine.gpu:
            return operations / (self.machine.gflops * 1e9 * GPU_EFFICIENCY)
        return operations / (self.machine.gflops * 1e9 * CPU_EFFICIENCY) + exponentials * CPU_EXP_SECONDS


def held_out_windows(tokens: int, length: int) -> int:
    """The number of held-out windows of `length` tokens for `tokens` tokens per length; at least one."""
    return max(1, tokens // length)


def choose_eval_tokens(training: float, measuring: Callable[[int], float], window: int) -> int:
    """The held-out tokens per length, a multiple of `window` tokens, that suit `training` seconds.

    Measuring takes at most MEASURING_SHARE of the training time. FEWEST_WINDOWS windows are measured even if this
    takes a larger share, as long as it is not longer than training. At least one window is always measured.

    Args:
        measuring: a function from held-out tokens per length to the seconds of all measurements.
        window: the length of the windows on which the models are compared, in tokens.
    """

    def most(seconds: float) -> int:
        choices = range(1, max(1, MOST_TOKENS // window) + 1)
        return bisect.bisect_right(choices, seconds, key=lambda windows: measuring(windows * window))

    windows = max(most(MEASURING_SHARE * training), min(FEWEST_WINDOWS, most(training)), 1)
    return windows * window
