"""One optimizer step as a function, and the loop that yields what happened. It neither prints nor writes."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ..data import Blocks
from ..distributed.ranks import ALONE, WHOLE, Ranks, Share
from ..machine import on_gpu
from ..models.adapters import Leaves
from ..models.pair import Pair
from ..models.trees import named_arrays
from .guard import Guard
from .objective import Objective, objective_loss


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: everything a step needs beside the models, the loss and the data."""

    steps: int
    batch_size: int
    grad_accum: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float  # of the gradient's norm; 0: none
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: linear warm-up that starts above zero, then a cosine to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class Snapshot:
    """Weights and the optimizer's state at one moment; by reference, which is enough for arrays that never change."""

    parameters: list[Leaves]
    optimizer: dict[str, Any]


@dataclass
class Best:
    """The best evaluation so far: after which step, its score (lower is better), and evaluations since then.

    `evaluated` is the step of the last evaluation, so that a resumed run makes the one that is due, once;
    `text` is the hash of what was evaluated on.
    """

    step: int
    score: float
    misses: int
    evaluated: int
    text: str


@dataclass
class TrainState:
    """All that changes while a run goes on. `step` counts finished steps and is also the data's cursor."""

    step: int
    parameters: list[Leaves]
    optimizer: optim.AdamW
    good: Snapshot  # what the last good loss was computed with, before the update that followed
    guard: Guard = field(default_factory=Guard)
    best: Best | None = None

    def __post_init__(self) -> None:
        # On a GPU thousands of small operations would cost more than the gradients' own computation.
        self.update = mx.compile(partial(_updated, self.optimizer)) if on_gpu() else partial(_updated, self.optimizer)

    @classmethod
    def start(cls, pair: Pair, schedule: Schedule) -> TrainState:
        """The state before the first step."""
        parameters = pair.parameters()
        optimizer = optim.AdamW(
            learning_rate=schedule.learning_rate, weight_decay=schedule.weight_decay
        )  # fmt: skip
        optimizer.init({"layers": parameters})
        return cls(0, parameters, optimizer, Snapshot(parameters, _copy(optimizer.state)))

    def snapshot(self) -> Snapshot:
        """Weights and optimizer as they are now."""
        return Snapshot(self.parameters, _copy(self.optimizer.state))

    def frozen(self) -> TrainState:
        """The state as it is now, which later steps leave alone; by reference."""
        optimizer = copy.copy(self.optimizer)
        optimizer.state = _copy(self.optimizer.state)
        best = None if self.best is None else dataclasses.replace(self.best)
        return TrainState(self.step, self.parameters, optimizer, self.good, dataclasses.replace(self.guard), best)

    def restore(self, snapshot: Snapshot) -> None:
        """Weights and optimizer as they were."""
        self.parameters = snapshot.parameters
        self.optimizer.state = _copy(snapshot.optimizer)


def _copy(tree: Any) -> Any:
    """New containers around the same arrays."""
    return tree_map(lambda array: array, tree)


@dataclass(frozen=True)
class StepRecord:
    """What one step did; `as_json` is a line of metrics.jsonl."""

    step: int  # 1 is the first
    loss: float  # nats
    parts: dict[str, float]
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # of this step
    seconds: float
    peak_memory: int  # bytes, of mlx
    skipped: str | None = None  # why the guard made no update
    rate_factor: float = 1.0  # the guard's part in the learning rate of the next step

    def as_json(self) -> dict[str, Any]:
        """Numbers that are not finite are null; `skipped` and `rate_factor` stand where the guard has acted."""
        numbers = {"loss": self.loss, **self.parts, "grad_norm": self.grad_norm}
        guarded = {"skipped": self.skipped} if self.skipped else {}
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "learning_rate": self.learning_rate, "tokens": self.tokens, "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 2),
            "peak_memory_gb": round(self.peak_memory / 1e9, 4),
            **guarded,
            **({"rate_factor": self.rate_factor} if self.skipped or self.rate_factor < 1 else {}),
        }  # fmt: skip


def train_step(
    pair: Pair,
    objective: Objective,
    schedule: Schedule,
    state: TrainState,
    batches: list[mx.array],
    ranks: Ranks = ALONE,
    share: Share = WHOLE,
) -> StepRecord:
    """One optimizer step over `batches` ((B, T + 1) each, equally weighted); the update is made where the guard agrees.

    Of several `ranks` each has its `share` of the step's batches; all make the same update, of the mean over all.
    A step that the guard rejects counts as a step all the same: its batches are not read again.
    Raises LostProcess, with the state as it was, where another rank has ended.
    """
    started = time.perf_counter()
    pair.set_parameters(state.parameters)  # or the arrays that they were loaded with would stay in memory
    mx.reset_peak_memory()
    losses, parts, gradients = ranks.mean(_accumulate(pair, objective, schedule, state, batches, share))
    norm = (_compiled_norm if on_gpu() else gradient_norm)(gradients)
    rate = schedule.rate(state.step) * state.guard.factor
    loss = _number(losses)
    skipped = state.guard.complaint(loss, _number(norm)) or _update(state, gradients, norm, rate, schedule.clip)
    if skipped is None:
        state.guard.accept(loss)
    elif state.guard.reject(loss):
        state.restore(state.good)
    state.step += 1
    return StepRecord(
        step=state.step,
        loss=loss,
        parts={name: _number(value) for name, value in parts.items()},
        grad_norm=_number(norm),
        learning_rate=rate,
        tokens=ranks.size * sum(b.shape[0] * (b.shape[1] - 1) for b in batches),
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory(),
        skipped=skipped,
        rate_factor=state.guard.factor,
    )


def _number(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def _accumulate(
    pair: Pair, objective: Objective, schedule: Schedule, state: TrainState, batches: list[mx.array], share: Share
) -> tuple[mx.array, dict[str, mx.array], list[Leaves]]:
    """Mean loss, parts and gradients over the batches, each evaluated and released before the next begins."""
    passes = len(batches) * share.groups
    first = (schedule.seed % 2**24 << 32) + state.step * passes + share.passes(passes).start

    def loss_of(parameters: list[Leaves], tokens: mx.array, dropout_seed: int | None) -> Any:
        return objective_loss(pair, objective, parameters, tokens, dropout_seed)

    total: Any = None
    for i, tokens in enumerate(batches):
        seed = first + i if pair.adapter.dropout > 0 else None
        (loss, parts), gradients = mx.value_and_grad(loss_of)(state.parameters, tokens, seed)
        now = (loss, parts, gradients)
        total = now if total is None else tree_map(mx.add, total, now)
        mx.eval(total)
    return total if len(batches) == 1 else tree_map(lambda x: x / len(batches), total)


def gradient_norm(gradients: list[Leaves]) -> mx.array:
    """The Euclidean norm of all gradients together, float32 scalar."""
    squares = [g.astype(mx.float32).square().sum() for _, g in named_arrays(gradients)]
    return mx.sqrt(sum(squares[1:], squares[0]))


_compiled_norm = mx.compile(gradient_norm)


def _update(state: TrainState, gradients: list[Leaves], norm: mx.array, rate: float, clip: float) -> str | None:
    """Make the update; where it would not be finite leave all as it was and return the complaint."""
    before = state.snapshot()
    scale = mx.minimum(1.0, clip / (norm + 1e-12)) if clip else mx.array(1.0)
    now = {**before.optimizer, "learning_rate": mx.array(rate)}
    parameters, optimizer, finite = state.update(state.parameters, now, gradients, scale)
    mx.eval(parameters, optimizer, finite)
    if not finite.item():
        state.restore(before)
        return "weights not finite after the update"
    state.parameters, state.optimizer.state, state.good = parameters, optimizer, before
    return None


def _updated(
    optimizer: optim.AdamW, parameters: list[Leaves], state: Any, gradients: list[Leaves], scale: mx.array
) -> tuple[list[Leaves], Any, mx.array]:
    """Parameters and optimizer's state after an update by scale * gradients, and whether all of them are finite.

    It depends on its arguments alone; what it leaves in `optimizer` is without meaning.
    """
    optimizer.state = _copy(state)
    gradients = tree_map(lambda g: g * scale.astype(g.dtype), gradients)
    updated = optimizer.apply_gradients({"layers": gradients}, {"layers": parameters})["layers"]
    arrays = [array for _, array in named_arrays([updated, optimizer.state])]
    return updated, optimizer.state, mx.all(mx.stack([mx.isfinite(array).all() for array in arrays]))


def train(
    pair: Pair, objective: Objective, schedule: Schedule, blocks: Blocks, state: TrainState, ranks: Ranks = ALONE
) -> Iterator[StepRecord]:
    """Steps from `state.step` to the end, one record each; the caller may save, evaluate or stop between them."""
    share = ranks.share(schedule.grad_accum, schedule.batch_size)
    rows = share.rows(schedule.batch_size)
    while state.step < schedule.steps:
        first = state.step * schedule.grad_accum
        batches = [
            mx.array(blocks.batch(first + i, schedule.batch_size)[rows]) for i in share.passes(schedule.grad_accum)
        ]  # fmt: skip
        yield train_step(pair, objective, schedule, state, batches, ranks, share)
