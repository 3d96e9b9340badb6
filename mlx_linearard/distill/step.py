"""One optimizer step as a function, and the iterator over the steps of a run. Nothing here prints or writes."""

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
from .gradient import BlockLoss, Found, Gradients
from .guard import Guard
from .long import LongPart
from .objective import Objective
from .vectors import Update, VectorUpdate

_LONG_SEEDS = 1 << 31  # the dropout of long blocks draws from seeds that no short block uses


@dataclass(frozen=True)
class Schedule:
    """Sizes and rates: everything that a step needs, except the models, the loss and the data."""

    steps: int
    batch_size: int
    grad_accum: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float  # bound of the gradient's norm; 0: no clipping
    seed: int

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: a linear warm-up that starts above zero, then a cosine to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class Snapshot:
    """The weights and the optimizer's state at one moment, by reference: arrays never change in place."""

    parameters: list[Leaves]
    optimizer: dict[str, Any]


@dataclass
class Best:
    """The best evaluation so far."""

    step: int  # the step after which it was made
    score: float  # lower is better
    misses: int  # evaluations since this step, none of which was better
    evaluated: int  # the step of the last evaluation: a resumed run repeats none
    text: str  # a hash of the windows that were evaluated


@dataclass
class TrainState:
    """Everything that changes during a run. `step` counts finished steps and is also the position in the data."""

    step: int
    parameters: list[Leaves]
    optimizer: optim.AdamW
    good: Snapshot  # the weights of the last good loss, before the update that followed it
    guard: Guard = field(default_factory=Guard)
    best: Best | None = None

    def __post_init__(self) -> None:
        plain = partial(_updated, self.optimizer)
        self.update: Update = VectorUpdate(mx.compile(plain)) if on_gpu() else plain

    @classmethod
    def start(cls, pair: Pair, schedule: Schedule) -> TrainState:
        """The state before the first step."""
        parameters = pair.parameters()
        optimizer = optim.AdamW(learning_rate=schedule.learning_rate, weight_decay=schedule.weight_decay)
        optimizer.init({"layers": parameters})
        return cls(0, parameters, optimizer, Snapshot(parameters, _copy(optimizer.state)))

    def snapshot(self) -> Snapshot:
        """The present weights and optimizer state."""
        return Snapshot(self.parameters, _copy(self.optimizer.state))

    def frozen(self) -> TrainState:
        """A copy of the present state that later steps do not change, and that another thread may read.

        The arrays are shared.
        """
        mx.eval(self.parameters, self.optimizer.state, self.good.parameters, self.good.optimizer)
        optimizer = copy.copy(self.optimizer)
        optimizer.state = _copy(self.optimizer.state)
        best = None if self.best is None else dataclasses.replace(self.best)
        return TrainState(self.step, self.parameters, optimizer, self.good, dataclasses.replace(self.guard), best)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to the weights and optimizer state of `snapshot`."""
        self.parameters = snapshot.parameters
        self.optimizer.state = _copy(snapshot.optimizer)


def _copy(tree: Any) -> Any:
    """New containers around the same arrays."""
    return tree_map(lambda array: array, tree)


@dataclass(frozen=True)
class StepRecord:
    """The outcome of one step; `as_json` is a line of metrics.jsonl."""

    step: int  # 1 is the first
    loss: float  # nats
    parts: dict[str, float]
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int  # the tokens of this step, long text included
    seconds: float
    peak_memory: int  # bytes, of mlx
    skipped: str | None = None  # the guard's reason for making no update
    rate_factor: float = 1.0  # the guard's factor of the learning rate of the next step
    compiled: bool = False  # whether functions were compiled, which took a part of `seconds`

    def as_json(self) -> dict[str, Any]:
        """A JSON object. Numbers that are not finite are null.

        `skipped` and `rate_factor` are present only if the guard skipped the step or keeps the rate lowered, and
        `compiled` only if something was compiled.
        """
        numbers = {"loss": self.loss, **self.parts, "grad_norm": self.grad_norm}
        guarded = {"skipped": self.skipped} if self.skipped else {}
        return {
            "step": self.step,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 2),
            "peak_memory_gb": round(self.peak_memory / 1e9, 4),
            **guarded,
            **({"compiled": True} if self.compiled else {}),
            **({"rate_factor": self.rate_factor} if self.skipped or self.rate_factor < 1 else {}),
        }


def train_step(
    pair: Pair,
    objective: Objective,
    schedule: Schedule,
    state: TrainState,
    batches: list[mx.array],
    ranks: Ranks = ALONE,
    share: Share = WHOLE,
    long: LongPart | None = None,
    weights: list[mx.array] | None = None,
    gradients_of: Gradients | None = None,
) -> StepRecord:
    """One optimizer step over `batches`; the update is made if the guard accepts the loss and the gradient.

    Each of several `ranks` has its `share` of the step's batches, and all make the same update with the mean
    gradient. A rejected step counts as a step: its batches are not read again.

    Args:
        batches: (B, T + 1) int32 each, of equal weight.
        long: what is added to the mean over the batches, if the run has a long part.
        weights: of each batch's targets in cross-entropy, (B, T) float32 each; None if all count the same.
        gradients_of: the functions of this pair that the steps of a run share; by default they are not compiled.
    Raises:
        LostProcess: another rank has ended; the state is unchanged.
    """
    started = time.perf_counter()
    pair.set_parameters(state.parameters)  # otherwise the arrays from loading would stay in memory
    mx.reset_peak_memory()
    gradients_of = gradients_of or Gradients(pair, compiles=False)
    compiled = gradients_of.compiled
    sums = _accumulate(gradients_of, objective, schedule, state, batches, share, weights)
    if long:
        sums = _with_long(sums, gradients_of, schedule, state, long, ranks)
    losses, parts, gradients = ranks.mean(sums)
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
        tokens=ranks.size * sum(b.shape[0] * (b.shape[1] - 1) for b in batches) + (long.sizes.seq_len if long else 0),
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory(),
        skipped=skipped,
        rate_factor=state.guard.factor,
        compiled=gradients_of.compiled > compiled,
    )


def _number(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def _accumulate(
    gradients_of: Gradients,
    objective: Objective,
    schedule: Schedule,
    state: TrainState,
    batches: list[mx.array],
    share: Share,
    weights: list[mx.array] | None,
) -> Found:
    """Mean loss, parts and gradients over the batches; each batch is evaluated and released before the next one."""
    passes = len(batches) * share.groups
    first = (schedule.seed % 2**24 << 32) + state.step * passes + share.passes(passes).start
    loss = BlockLoss(objective)
    total: Any = None
    for i, tokens in enumerate(batches):
        seed = first + i if gradients_of.pair.adapter.dropout > 0 else None
        batch = {"tokens": tokens, **({"weights": weights[i]} if weights else {})}
        found = gradients_of(loss, state.parameters, batch, seed)
        total = found if total is None else tree_map(mx.add, total, found)
        del found  # so that the sum takes its place
        mx.eval(total)
    return total if len(batches) == 1 else tree_map(lambda x: x / len(batches), total)


def _with_long(
    short: Found, gradients_of: Gradients, schedule: Schedule, state: TrainState, long: LongPart, ranks: Ranks
) -> Found:
    """The short part plus `long.weight` times the long one.

    One rank reads the block, in turn, and counts it once for every rank, so that the mean over the ranks is right.
    """
    loss, parts, gradients = short
    if ranks.rank != state.step % ranks.size:
        zeros = {name: mx.array(0.0) for name in ("long", *long.loss.parts)}
        return loss, {**parts, **zeros}, gradients
    batch = long.batch(gradients_of.pair, state.step)
    dropout_seed = _LONG_SEEDS + state.step if gradients_of.pair.adapter.dropout > 0 else None
    if dropout_seed is not None:
        dropout_seed += schedule.seed % 2**24 << 32
    own, own_parts, own_gradients = gradients_of(long.loss, state.parameters, batch, dropout_seed)
    weight = long.weight * ranks.size
    total = tree_map(lambda a, b: a + b * mx.array(weight, b.dtype), (loss, gradients), (own, own_gradients))
    own_parts = {name: value * ranks.size for name, value in {"long": own, **own_parts}.items()}
    mx.eval(total, own_parts)
    return total[0], {**parts, **own_parts}, total[1]


def gradient_norm(gradients: list[Leaves]) -> mx.array:
    """The Euclidean norm of all gradients together, float32 scalar."""
    squares = [g.astype(mx.float32).square().sum() for _, g in named_arrays(gradients)]
    return mx.sqrt(sum(squares[1:], squares[0]))


_compiled_norm = mx.compile(gradient_norm)


def _update(state: TrainState, gradients: list[Leaves], norm: mx.array, rate: float, clip: float) -> str | None:
    """Make the update; if it is not finite, change nothing and return the reason."""
    before = state.snapshot()
    scale = mx.minimum(1.0, clip / (norm + 1e-12)) if clip else mx.array(1.0)
    now = {**before.optimizer, "learning_rate": mx.array(rate)}
    parameters, optimizer, finite = state.update(state.parameters, now, gradients, scale)
    if not isinstance(state.update, VectorUpdate):  # it evaluates its vectors; the arrays are views of them
        mx.eval(parameters, optimizer, finite)
    if not finite.item():
        state.restore(before)
        return "weights not finite after the update"
    state.parameters, state.optimizer.state, state.good = parameters, optimizer, before
    return None


def _updated(
    optimizer: optim.AdamW, parameters: list[Leaves], state: Any, gradients: list[Leaves], scale: mx.array
) -> tuple[list[Leaves], Any, mx.array]:
    """Parameters and optimizer state after an update with scale * gradients, and whether all of them are finite.

    The result depends on the arguments alone, not on the state that `optimizer` holds.
    """
    optimizer.state = _copy(state)
    gradients = tree_map(lambda g: g * scale.astype(g.dtype), gradients)
    updated = optimizer.apply_gradients({"layers": gradients}, {"layers": parameters})["layers"]
    arrays = [array for _, array in named_arrays([updated, optimizer.state])]
    return updated, optimizer.state, mx.all(mx.stack([mx.isfinite(array).all() for array in arrays]))


def train(
    pair: Pair,
    objective: Objective,
    schedule: Schedule,
    blocks: Blocks,
    state: TrainState,
    ranks: Ranks = ALONE,
    long: LongPart | None = None,
    gradients_of: Gradients | None = None,
) -> Iterator[StepRecord]:
    """Make the steps from `state.step` to the last; yields a record after each, so the caller can save or stop."""
    share = ranks.share(schedule.grad_accum, schedule.batch_size)
    rows = share.rows(schedule.batch_size)
    gradients_of = gradients_of or Gradients(pair)
    while state.step < schedule.steps:
        first = state.step * schedule.grad_accum
        passes = share.passes(schedule.grad_accum)
        batches = [mx.array(blocks.batch(first + i, schedule.batch_size)[rows]) for i in passes]
        weights = _target_weights(blocks, first, schedule, share)
        yield train_step(pair, objective, schedule, state, batches, ranks, share, long, weights, gradients_of)


def _target_weights(blocks: Blocks, first: int, schedule: Schedule, share: Share) -> list[mx.array] | None:
    """The weight of each target of this rank's batches in cross-entropy, (rows, T) float32; None if all count.

    Every target of the step that counts has the same weight, however many of them a batch has: the mean over batches
    and ranks is the mean over these targets.
    """
    if blocks.answers is None:
        return None
    step = [blocks.counted(first + i, schedule.batch_size) for i in range(schedule.grad_accum)]
    weight = schedule.grad_accum * share.parts / max(1, sum(int(counted.sum()) for counted in step))
    rows = share.rows(schedule.batch_size)
    return [mx.array(step[i][rows]).astype(mx.float32) * weight for i in share.passes(schedule.grad_accum)]
