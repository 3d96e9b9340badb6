"""What a run will do, before it does it: sizes for this model, this text and this machine, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import rope
from ..config import DistillConfig
from ..distributed.ranks import ALONE, Ranks
from ..errors import UserError
from ..machine import Machine
from ..models.shape import Shape
from ..progress import duration

STEP_TOKENS = 8192  # of the measured recipe
STEP_COUNT = 144
GPU_EFFICIENCY = 0.35  # share of the matrix speed that a step reaches, seen on one GPU; a CPU reaches most of it
CPU_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Demo:
    """A demonstration's size: block length, steps of how many tokens, and held-out tokens."""

    seq_len: int
    grad_accum: int
    steps: int
    eval_tokens: int


# The demonstration by matrix speed in GFLOP/s: the first row that the machine reaches.
DEMOS: tuple[tuple[float, Demo], ...] = (
    (2000.0, Demo(2048, 4, 144, 32768)),
    (20.0, Demo(256, 2, 36, 2048)),
    (0.0, Demo(64, 1, 28, 320)),
)


@dataclass(frozen=True)
class Sizing:
    """Everything about a run's size that the configuration may leave open."""

    seq_len: int
    batch_size: int
    grad_accum: int
    steps: int
    eval_tokens: int
    eval_lengths: tuple[int, ...]
    seconds: float  # estimated, for training and both measurements
    model: str
    window: tuple[int, int]  # native, extended
    processes: int = 1  # that share a step's blocks

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size * self.grad_accum

    def lines(self, machine: Machine) -> Iterator[str]:
        """The plan in a few lines."""
        native, extended = self.window
        yield f"{self.model}: window {native} -> {extended} tokens"
        shared = f", shared by {self.processes} processes" if self.processes > 1 else ""
        yield (
            f"{self.steps} steps of {self.tokens_per_step} tokens ({self.batch_size * self.grad_accum} blocks of "
            f"{self.seq_len}{shared}) on {machine.name}: about {duration(self.seconds)}"
        )
        if machine.hint:
            yield f"hint: {machine.hint}"


def size_run(config: DistillConfig, native: dict[str, Any], machine: Machine, ranks: Ranks = ALONE) -> Sizing:
    """Choose what the configuration leaves open, and check what it says against the native window.

    `ranks` share the steps; what is measured, the first of them measures.
    """
    native_window = rope.native_window(native)
    demo = next(demo for speed, demo in DEMOS if machine.gflops >= speed) if _is_demo(config) else None
    seq_len = config.seq_len or (demo.seq_len if demo else min(2048, native_window))
    if seq_len > native_window:
        raise UserError(
            f"--seq-len {seq_len} is above the native window of {native_window} tokens, where the teacher is "
            f"no reference: give at most {native_window}"
        )
    accum = config.grad_accum or (demo.grad_accum if demo else max(1, STEP_TOKENS // (seq_len * config.batch_size)))
    per_step = seq_len * config.batch_size * accum
    steps = (
        config.steps or (config.tokens and steps_of(config.tokens, per_step)) or (demo.steps if demo else STEP_COUNT)
    )
    lengths = eval_lengths(config, seq_len, native_window, machine)
    eval_tokens = config.eval_tokens or (demo.eval_tokens if demo else 32768)
    tokens = 4 * per_step * steps / ranks.devices + 4 * max(eval_tokens, seq_len) * len(lengths)
    work = tokens * 2 * Shape.of(native).block_weights
    speed = machine.gflops * 1e9 * (GPU_EFFICIENCY if machine.gpu else CPU_EFFICIENCY)
    return Sizing(
        seq_len, config.batch_size, accum, steps, eval_tokens, lengths,
        work / speed,
        config.model or "SmolLM2-135M-Instruct", (native_window, int(native_window * config.factor)),
        ranks.size,
    )  # fmt: skip


def steps_of(tokens: int, per_step: int) -> int:
    """Steps that `tokens` training tokens make; at least one."""
    return max(1, tokens // per_step)


def _is_demo(config: DistillConfig) -> bool:
    return config.model is None and config.data is None


def eval_lengths(config: DistillConfig, seq_len: int, native_window: int, machine: Machine) -> tuple[int, ...]:
    """The lengths of --eval-lengths, ascending."""
    if config.eval_lengths != "auto":
        return tuple(sorted({int(part) for part in config.eval_lengths.split(",")}))
    return (seq_len, 2 * native_window) if machine.gpu else (seq_len,)
