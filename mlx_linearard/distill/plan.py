"""What a run will do, before it loads weights: its sizes for this model and machine, and its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import rope
from ..config import LONG_WEIGHT, DistillConfig
from ..convert.default_model import cache_directory
from ..distributed.ranks import ALONE, Ranks, Share
from ..errors import UserError
from ..files import RunDir
from ..machine import Machine, on_gpu
from ..models.adapters import qkv_keys
from ..models.directory import Checked, build, check_model_dir
from ..models.experts import copied_bytes
from ..models.quantization import check_trainable
from ..models.shape import Shape
from ..models.trees import named_modules
from ..ops.fused import Choice
from ..ops.probe import choice_of
from .kept import NOTHING, Kept
from .long_text import SHORTEST as SHORTEST_LONG
from .long_text import LongSizes
from .memory import FLOAT32, SHORTEST, MemoryPlan, Step, advice, keeping, kept_line, longest, plan_memory
from .objective import Objective, resolve_objective
from .sizing import Sizing, is_demo, long_sizes, size_run
from .timing import Clock

WHOLE_BATCHES = "with --lora-dropout it needs complete batches per process: raise --grad-accum"
MOST_LONG_TIMES = 8  # a default long block takes at most this many times as long as the rest of a step


@dataclass(frozen=True)
class Plan:
    """A run whose options, model directory, sizes and memory are checked; no weights are loaded."""

    config: DistillConfig
    path: Path  # the model directory
    native: dict[str, Any]  # its config.json
    dtype: str | None  # dtype of the frozen weights in memory; None keeps the dtype of the files
    machine: Machine
    sizing: Sizing
    step: Step  # the sizes of a step that decide its memory, for one rank
    long_step: Step | None  # the same sizes of the long part of a step; None without a long part
    attention: Choice | None = None  # which attention runs under a gradient; None: the default, without a probe
    long_optional: bool = False  # whether a long part is planned that nobody asked for
    note: str | None = None  # what the plan leaves out, and why

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.output)

    @property
    def kept_of_long(self) -> Kept:
        """Which layers keep the activations of the long block."""
        return self.long_step.kept if self.long_step else NOTHING

    def objective(self, student: Any) -> Objective:
        """The objective of the run, for its student."""
        chosen = objective_of(self.config, student)
        return dataclasses.replace(chosen, attention=self.attention, kept=self.step.kept)

    @property
    def memory(self) -> MemoryPlan:
        return max(map(plan_memory, filter(None, (self.step, self.long_step))), key=lambda plan: plan.total)

    def lines(self) -> Iterator[str]:
        """The plan as text, line by line."""
        yield from self.sizing.lines(self.machine)
        yield from filter(None, (self.note, rope.difference(self.native)))
        if self.step.copied:
            yield (
                "experts: this device multiplies them in float32 only, and so does this run; their weights keep their "
                "dtype, with which mlx_lm itself fails on this device"
            )
        yield self.memory.line()
        steps = ((self.step, ""), (self.long_step, " of long text"))
        yield from (kept_line(step, name) for step, name in steps if step and step.kept)
        window, limit = self.sizing.window[0], self.machine.usable
        most = longest(self._least(self.step), limit, window)
        fits = "no sequence fits" if not most else f"the longest sequence that fits is {most} tokens"
        yield f"this machine: {limit / 1e9:.2f} GB; {fits}{' (the native window)' if most == window else ''}"

    def with_long(self, most: int) -> Plan:
        """The same plan with a long block of at most `most` tokens, a multiple of SHORTEST if possible."""
        length = most - most % min(most, SHORTEST)
        sizing = dataclasses.replace(self.sizing, long=long_sizes(self.config, self.sizing.window[0], length))
        assert self.long_step is not None
        long_step = _long_step(self.config, self.step, self.long_step.layers, sizing.long)
        return dataclasses.replace(self, sizing=sizing, long_step=long_step).keeping()

    def without_long(self) -> Plan:
        """The same plan without a long part."""
        config = dataclasses.replace(self.config, long_weight=0.0)
        sizing = dataclasses.replace(self.sizing, long=None)
        return dataclasses.replace(self, config=config, sizing=sizing, long_step=None, long_optional=False)

    def keeping(self) -> Plan:
        """The same plan with as many layers keeping their activations as --recompute says."""
        limit = self.machine.usable
        long_step = self.long_step and keeping(self.long_step, self.config, limit)
        return dataclasses.replace(self, step=keeping(self.step, self.config, limit), long_step=long_step)

    def _least(self, step: Step) -> Step:
        """`step` with as few kept activations as --recompute allows."""
        return dataclasses.replace(step, kept=NOTHING) if self.config.recompute == "auto" else step

    def check(self) -> None:
        """Raise UserError, with flags that help, if the plan exceeds the machine's memory; --force allows it."""
        if self.config.force or self.memory.total <= self.machine.usable:
            return
        advice = "; ".join(self._advice())
        raise UserError(
            f"this run needs about {self.memory.total / 1e9:.2f} GB and this machine has "
            f"{self.machine.usable / 1e9:.2f}: {advice or 'no flag makes it fit, use a smaller model'} "
            "(--force runs it anyway)"
        )

    def _advice(self) -> Iterator[str]:
        limit, long = self.machine.usable, self.long_step
        if plan_memory(self.step).total > limit:
            yield from advice(self.step, limit, self.config)
        if long and plan_memory(long).total > limit:
            most = longest(long, limit, long.seq_len)
            yield f"--long-seq-len {most}" if most >= SHORTEST else "--long-weight 0"


@dataclass(frozen=True)
class Inspected:
    """A model directory whose files are checked and whose weights are not loaded."""

    path: Path
    checked: Checked
    model: Any  # the mlx-lm model with weights that are never evaluated
    objective: Objective


def inspect_model(config: DistillConfig, path: Path) -> Inspected:
    """Check everything about the model that needs no weights; takes seconds.

    Raises:
        UserError: the directory (headers, index, shapes, tokenizer), the method, the objective or the layers are
            wrong.
    """
    checked = check_model_dir(path)
    try:
        rope.scale_rope(
            checked.config,
            config.method,
            config.factor,
            beta_fast=config.yarn_beta_fast,
            beta_slow=config.yarn_beta_slow,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    model = build(checked.config, len(checked.stored), path)
    check_trainable(config.fine_tune_type, checked.quantized, qkv_keys(model))
    return Inspected(path, checked, model, objective_of(config, model))


def plan_run(
    config: DistillConfig,
    inspected: Inspected,
    machine: Machine,
    ranks: Ranks = ALONE,
    attention: Choice | None = None,
) -> Plan:
    """The plan of a run on `machine`. With several `ranks`, the memory is one rank's: its share of a step.

    Its config says whether the run has a long part. A long part that nobody asked for is left out if it is not
    possible, and `note` says why.

    Args:
        attention: which attention runs under a gradient; None: the default, without a probe.
    Raises:
        UserError: the sizes do not fit the model, or the processes cannot have the long part that is asked for.
    """

    def plan(weight: float) -> Plan:
        return _plan(dataclasses.replace(config, long_weight=weight), inspected, machine, ranks, attention)

    wanted = plan(config.weight_of_long)
    if wanted.sizing.long is None:
        return wanted
    shares_rows = ranks.share(wanted.sizing.grad_accum, wanted.sizing.batch_size).parts > 1
    impossible = WHOLE_BATCHES if shares_rows and config.lora_dropout else None
    if config.needs_long:
        if impossible:
            raise UserError(f"--long-weight: {impossible}")
        return wanted
    if why := impossible or _no_long_part(wanted):
        return dataclasses.replace(plan(0.0), note=f"no long part: {why}")
    return dataclasses.replace(wanted, long_optional=True)


def _no_long_part(plan: Plan) -> str | None:
    """Why a long part that nobody asked for is left out; None if it is not."""
    sizing = plan.sizing
    if is_demo(plan.config) and not sizing.long_in_demo:
        return f"a demonstration on {plan.machine.name} would take too long with it"
    fits = plan.long_step is None or plan_memory(plan.long_step).total <= plan.machine.usable
    if not fits or sizing.long_seq_len <= sizing.window[0]:
        return f"this machine's memory holds no block longer than the native window of {sizing.window[0]} tokens"
    if (times := _long_times(plan)) > MOST_LONG_TIMES:
        return (
            f"a block of {sizing.long_seq_len} tokens would take about {times:.0f} times as long as the rest of a "
            f"step; --long-weight {LONG_WEIGHT:g} trains on it anyway"
        )
    return None


def _long_times(plan: Plan) -> float:
    """How many times as long as the rest of a step the block of long text takes."""
    assert plan.sizing.long is not None
    clock = Clock(Shape.of(plan.native), plan.machine, plan.config)
    return clock.long_part(plan.sizing.long) / clock.training(plan.sizing.tokens_per_step, plan.sizing.seq_len)


def _plan(
    config: DistillConfig, inspected: Inspected, machine: Machine, ranks: Ranks, attention: Choice | None
) -> Plan:
    dtype = working_dtype(config)
    sizing = size_run(config, inspected.checked.config, machine, ranks)
    share = ranks.share(sizing.grad_accum, sizing.batch_size)
    step = _step_of(config, inspected, dtype, sizing, share, machine.gpu)
    if attention is not None:
        step = dataclasses.replace(step, fused=attention.fused)
    long_step = _long_step(config, step, len(inspected.model.layers), sizing.long)
    plan = Plan(config, inspected.path, inspected.checked.config, dtype, machine, sizing, step, long_step, attention)
    if long_step is None or config.long_seq_len:
        return plan.keeping()
    most = longest(long_step, machine.usable, long_step.seq_len)
    if SHORTEST_LONG <= most < long_step.seq_len:
        plan = plan.with_long(most)
    return plan.keeping()


def fit_long_part(plan: Plan, tokens: int) -> tuple[Plan, str | None]:
    """The plan for a long text of `tokens` tokens, and a line that says what was changed.

    Blocks are made shorter if their length was left open, and if they would not be longer than the native window, a
    long part that nobody asked for is left out.
    """
    sizing = plan.sizing
    if sizing.long is None or plan.config.long_seq_len or sizing.long.text < tokens:
        return plan, None
    if tokens > sizing.window[0] + SHORTEST:
        shorter = plan.with_long(tokens - 1)
        return shorter, f"the long text has {tokens} tokens: every step reads {shorter.sizing.long_seq_len} of them"
    if not plan.long_optional:
        return plan, None
    return plan.without_long(), (
        f"no long part: the text has {tokens} tokens, too few for a block longer than the native window of "
        f"{sizing.window[0]}"
    )


def _long_step(config: DistillConfig, step: Step, layers: int, sizes: LongSizes | None) -> Step | None:
    """The long part of `step` as the memory plan describes it; the sum of the short part is another copy."""
    if sizes is None:
        return None
    return dataclasses.replace(
        step,
        layers=layers,
        supervised=0,
        logits=None if config.long_objective == "recall" else "ce",
        recalled=sizes.recalled,
        kept=NOTHING,
        batch=1,
        seq_len=sizes.seq_len,
        grad_accum=max(2, step.grad_accum),
    )


def trained_layers(config: DistillConfig, objective: Objective, total: int) -> int:
    """How many layers carry adapters: those that the loss depends on, all of them with a long part."""
    return total if config.weight_of_long else objective.last_layer(total) + 1


def objective_of(config: DistillConfig, model: Any) -> Objective:
    """The objective of `config`, resolved for `model`."""
    return resolve_objective(
        model,
        config.objective,
        layers=config.layers,
        relations=config.relations,
        normalization=config.normalization,
        relation_weight=config.relation_weight,
        logits_weight=config.logits_weight,
        workspace_bytes=config.workspace << 20,
    )


def working_dtype(config: DistillConfig) -> str | None:
    """The dtype of the frozen weights in memory; None keeps the file's own."""
    if config.dtype != "auto":
        return config.dtype
    return None if on_gpu() else "float32"


def _step_of(
    config: DistillConfig, inspected: Inspected, dtype: str | None, sizing: Sizing, share: Share, gpu: bool
) -> Step:
    """A training step of this model, as the memory plan describes it."""
    checked, model, objective = inspected.checked, inspected.model, inspected.objective
    layers = objective.last_layer(len(model.layers)) + 1
    activation = activation_dtype(checked.arrays, dtype)
    trained = trained_layers(config, objective, len(model.layers))
    keys = set(qkv_keys(model))
    return Step(
        shape=Shape.of(checked.config),
        weights=weight_bytes(checked.arrays, dtype),
        trained=FLOAT32 * sum(_trained_numbers(layer, keys, config) for layer in model.layers[:trained]),
        rank=0 if config.fine_tune_type == "full" else config.lora_rank * len(keys),
        size=activation.size,
        layers=layers,
        supervised=len(objective.layers),
        relations=objective.relations,
        logits="kl" if objective.logits_weight else "ce" if objective.ce_weight else None,
        batch=sizing.batch_size // share.parts,
        seq_len=sizing.seq_len,
        grad_accum=sizing.grad_accum // share.groups,
        workspace=objective.workspace_bytes,
        gpu=gpu,
        copied=copied_bytes(model, activation, checked.quantized),
    )


def attention_choice(config: DistillConfig, inspected: Inspected) -> Choice | None:
    """Which attention runs under a gradient on this machine, by a probe; None if nothing is known."""
    dtype = activation_dtype(inspected.checked.arrays, working_dtype(config))
    try:
        folder = cache_directory()
    except (UserError, RuntimeError):  # no home folder: nothing is kept
        folder = None
    return choice_of(dtype, Shape.of(inspected.checked.config).head_dim, folder)


def weight_bytes(arrays: Mapping[str, mx.array], dtype: str | None) -> int:
    """Bytes of a model's arrays in memory, with floating-point arrays in `dtype`."""

    def size(array: mx.array) -> int:
        floating = dtype is not None and mx.issubdtype(array.dtype, mx.floating)
        return getattr(mx, str(dtype)).size if floating else array.dtype.size

    return sum(array.size * size(array) for array in arrays.values())


def activation_dtype(arrays: Mapping[str, mx.array], dtype: str | None) -> mx.Dtype:
    """The dtype of activations: that of the weights in memory, the widest if they differ."""
    if dtype is not None:
        return getattr(mx, dtype)
    floating = (a.dtype for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating))
    return max(floating, key=lambda floating: floating.size, default=mx.float32)


def _trained_numbers(layer: nn.Module, keys: set[str], config: DistillConfig) -> int:
    """How many numbers of a layer are trained."""
    total = 0
    for name, module in named_modules(layer.leaf_modules()):
        if name not in keys:
            continue
        outputs, inputs = module.weight.shape
        if config.fine_tune_type == "full":
            total += outputs * inputs + ("bias" in module) * outputs
        else:
            total += config.lora_rank * (outputs + inputs) + (config.fine_tune_type == "dora") * outputs
    return total
