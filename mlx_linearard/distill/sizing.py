"""The sizes of a run: those of the options, and those that the model, the machine and the time allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import rope
from ..config import LEARNING_RATE, STEP_COUNT, STEP_TOKENS, DistillConfig, default_rate
from ..distributed.ranks import ALONE, Ranks
from ..errors import UserError
from ..machine import Machine
from ..models.shape import Shape
from .best import reference_length
from .long_text import LongSizes, length_around
from .timing import Clock, Times, choose_eval_tokens


@dataclass(frozen=True)
class Demo:
    """A demonstration: block length, blocks per step, steps, held-out tokens, with a long part or not."""

    seq_len: int
    grad_accum: int
    steps: int
    eval_tokens: int
    long: bool


# The demonstration by matrix speed in GFLOP/s: the first row whose speed the machine reaches.
DEMOS: tuple[tuple[float, Demo], ...] = (
    (2000.0, Demo(2048, 4, STEP_COUNT, 32768, True)),
    (20.0, Demo(256, 2, 36, 2048, False)),
    (0.0, Demo(64, 1, 16, 256, False)),
)


@dataclass(frozen=True)
class Sizing:
    """Every size of a run that the configuration may leave open."""

    seq_len: int
    batch_size: int
    grad_accum: int
    steps: int
    eval_tokens: int
    eval_lengths: tuple[int, ...]
    times: Times  # estimated
    model: str
    window: tuple[int, int]  # native, extended
    processes: int = 1  # number of processes that share the blocks of a step
    long: LongSizes | None = None  # the block of long text in every step; None without a long part
    learning_rate: float = LEARNING_RATE
    long_in_demo: bool = True  # False: a demonstration on this machine has no time for a long part

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size * self.grad_accum

    @property
    def long_seq_len(self) -> int:
        """Tokens of the block of long text in every step; 0 without a long part."""
        return self.long.seq_len if self.long else 0

    @property
    def held_out(self) -> int:
        """Tokens at the end of the text that are kept out of training, if there are that many."""
        return 2 * max(self.eval_tokens, max(self.eval_lengths) + 1)

    def lines(self, machine: Machine) -> Iterator[str]:
        """The sizes in a few lines."""
        native, extended = self.window
        yield f"{self.model}: window {native} -> {extended} tokens"
        shared = f", shared by {self.processes} processes" if self.processes > 1 else ""
        yield (
            f"{self.steps} steps of {self.tokens_per_step} tokens ({self.batch_size * self.grad_accum} blocks of "
            f"{self.seq_len}{shared}) on {machine.name}"
        )
        if self.long:
            yield f"every step also reads {self.long.described()}"
        if machine.hint:
            yield f"hint: {machine.hint}"


def size_run(config: DistillConfig, native: dict[str, Any], machine: Machine, ranks: Ranks = ALONE) -> Sizing:
    """Choose the sizes that the configuration leaves open, and check the others against the native window.

    `ranks` share the steps; only the first rank evaluates.
    """
    native_window = rope.native_window(native)
    demo = next(demo for speed, demo in DEMOS if machine.gflops >= speed) if is_demo(config) else None
    seq_len = config.seq_len or (demo.seq_len if demo else min(2048, native_window))
    if seq_len > native_window:
        raise UserError(
            f"--seq-len {seq_len} is above the native window of {native_window} tokens, beyond which the teacher is "
            f"no reference: give at most {native_window}"
        )
    accum = config.grad_accum or (demo.grad_accum if demo else max(1, STEP_TOKENS // (seq_len * config.batch_size)))
    per_step = seq_len * config.batch_size * accum
    steps = config.steps or (steps_of(config.tokens, per_step) if config.tokens else 0)
    steps = steps or (demo.steps if demo else STEP_COUNT)
    lengths = eval_lengths(config, seq_len, native_window, machine)
    clock = Clock(Shape.of(native), machine, config)
    long = long_sizes(config, native_window, long_seq_len(config, native_window))
    training = clock.training(per_step * steps, seq_len) / ranks.devices + (
        steps * clock.long_part(long) if long else 0
    )
    reference = reference_length(lengths, native_window)
    evaluations = steps // config.eval_every if config.eval_every else 0

    def measuring(tokens: int) -> float:
        return clock.measuring(tokens, lengths, reference, evaluations)

    eval_tokens = config.eval_tokens or (demo.eval_tokens if demo else None)
    eval_tokens = eval_tokens or choose_eval_tokens(training, measuring, reference)
    return Sizing(
        seq_len=seq_len,
        batch_size=config.batch_size,
        grad_accum=accum,
        steps=steps,
        eval_tokens=eval_tokens,
        eval_lengths=lengths,
        times=Times(measuring(eval_tokens), training, clock.exporting()),
        model=config.model or "SmolLM2-135M-Instruct",
        window=(native_window, int(native_window * config.factor)),
        processes=ranks.size,
        long=long,
        learning_rate=config.learning_rate or default_rate(per_step),
        long_in_demo=demo is None or demo.long,
    )


def long_seq_len(config: DistillConfig, native_window: int) -> int:
    """The length of long blocks, 0 without a long part; UserError if it is above the new window."""
    if not config.weight_of_long:
        return 0
    extended = int(native_window * config.factor)
    text = length_around(config.long_objective, 2 * native_window, native_window, config.recall_passage)
    length = config.long_seq_len or min(text, extended)
    if length > extended:
        raise UserError(f"--long-seq-len {length} is above the new window: give at most {extended} tokens")
    return length


def long_sizes(config: DistillConfig, native_window: int, length: int) -> LongSizes | None:
    """The sizes of a long block of `length` tokens, None without a long part; UserError if they do not fit it."""
    return LongSizes.of(config.long_objective, length, native_window, config.recall_passage) if length else None


def steps_of(tokens: int, per_step: int) -> int:
    """The number of steps that `tokens` training tokens make; at least one."""
    return max(1, tokens // per_step)


def is_demo(config: DistillConfig) -> bool:
    """Whether this is a run of the embedded model on the text of Python."""
    return config.model is None and config.data is None


def eval_lengths(config: DistillConfig, seq_len: int, native_window: int, machine: Machine) -> tuple[int, ...]:
    """The lengths of --eval-lengths, ascending."""
    if config.eval_lengths != "auto":
        return tuple(sorted({int(part) for part in config.eval_lengths.split(",")}))
    return (seq_len, 2 * native_window) if machine.gpu else (seq_len,)
