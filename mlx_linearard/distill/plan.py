"""What a run will do, before it loads weights: its sizes for this model, text and machine, its memory, its time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import rope
from ..config import DistillConfig
from ..convert.default_model import cache_directory
from ..distributed.ranks import ALONE, Ranks, Share
from ..errors import UserError
from ..files import RunDir
from ..machine import Machine, on_gpu
from ..models.adapters import qkv_keys
from ..models.directory import Checked, build, check_model_dir
from ..models.quantization import check_trainable
from ..models.shape import Shape
from ..models.trees import named_modules
from ..ops.fused import Choice
from ..ops.probe import choice_of
from .best import reference_length
from .long_text import LongSizes
from .memory import FLOAT32, SHORTEST, MemoryPlan, Step, advice, longest, plan_memory
from .objective import Objective, resolve_objective
from .timing import Clock, Times, choose_eval_tokens

STEP_TOKENS = 8192  # tokens per step of the measured recipe
STEP_COUNT = 144


@dataclass(frozen=True)
class Demo:
    """The size of a demonstration: block length, blocks per step, steps, held-out tokens."""

    seq_len: int
    grad_accum: int
    steps: int
    eval_tokens: int


# The demonstration by matrix speed in GFLOP/s: the first row whose speed the machine reaches.
DEMOS: tuple[tuple[float, Demo], ...] = (
    (2000.0, Demo(2048, 4, 144, 32768)),
    (20.0, Demo(256, 2, 36, 2048)),
    (0.0, Demo(64, 1, 28, 320)),
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
    demo = next(demo for speed, demo in DEMOS if machine.gflops >= speed) if _is_demo(config) else None
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
    )


def long_seq_len(config: DistillConfig, native_window: int) -> int:
    """The length of long blocks, 0 without a long part; UserError if it is above the new window."""
    if not config.long_weight:
        return 0
    extended = int(native_window * config.factor)
    length = config.long_seq_len or min(2 * native_window, extended)
    if length > extended:
        raise UserError(f"--long-seq-len {length} is above the new window: give at most {extended} tokens")
    return length


def long_sizes(config: DistillConfig, native_window: int, length: int) -> LongSizes | None:
    """The sizes of a long block of `length` tokens, None without a long part; UserError if they do not fit it."""
    return LongSizes.of(config.long_objective, length, native_window, config.recall_passage) if length else None


def steps_of(tokens: int, per_step: int) -> int:
    """The number of steps that `tokens` training tokens make; at least one."""
    return max(1, tokens // per_step)


def _is_demo(config: DistillConfig) -> bool:
    return config.model is None and config.data is None


def eval_lengths(config: DistillConfig, seq_len: int, native_window: int, machine: Machine) -> tuple[int, ...]:
    """The lengths of --eval-lengths, ascending."""
    if config.eval_lengths != "auto":
        return tuple(sorted({int(part) for part in config.eval_lengths.split(",")}))
    return (seq_len, 2 * native_window) if machine.gpu else (seq_len,)


# ---------------------------------------------------------------------------------------------------
# The plan


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

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.output)

    @property
    def memory(self) -> MemoryPlan:
        return max(map(plan_memory, filter(None, (self.step, self.long_step))), key=lambda plan: plan.total)

    def lines(self) -> Iterator[str]:
        """The plan as text, line by line."""
        yield from self.sizing.lines(self.machine)
        yield self.memory.line()
        window, limit = self.sizing.window[0], self.machine.usable
        most = longest(self.step, limit, window)
        fits = "no sequence fits" if not most else f"the longest sequence that fits is {most} tokens"
        yield f"this machine: {limit / 1e9:.2f} GB; {fits}{' (the native window)' if most == window else ''}"

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

    Args:
        attention: which attention runs under a gradient; None: the default, without a probe.
    """
    dtype = working_dtype(config)
    sizing = size_run(config, inspected.checked.config, machine, ranks)
    share = ranks.share(sizing.grad_accum, sizing.batch_size)
    step = _step_of(config, inspected, dtype, sizing, share, machine.gpu)
    if attention is not None:
        step = dataclasses.replace(step, fused=attention.fused)
    layers = len(inspected.model.layers)
    long_step = _long_step(config, step, layers, sizing.long)
    if long_step and not config.long_seq_len and (most := longest(long_step, machine.usable, long_step.seq_len)):
        length = most if most == sizing.long_seq_len else most - most % min(most, SHORTEST)
        sizing = dataclasses.replace(sizing, long=long_sizes(config, sizing.window[0], length))
        long_step = _long_step(config, step, layers, sizing.long)
    return Plan(config, inspected.path, inspected.checked.config, dtype, machine, sizing, step, long_step, attention)


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
        batch=1,
        seq_len=sizes.seq_len,
        grad_accum=max(2, step.grad_accum),
    )


def trained_layers(config: DistillConfig, objective: Objective, total: int) -> int:
    """How many layers carry adapters: those that the loss depends on, all of them with a long part."""
    return total if config.long_weight else objective.last_layer(total) + 1


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
    trained = trained_layers(config, objective, len(model.layers))
    keys = set(qkv_keys(model))
    return Step(
        shape=Shape.of(checked.config),
        weights=weight_bytes(checked.arrays, dtype),
        trained=FLOAT32 * sum(_trained_numbers(layer, keys, config) for layer in model.layers[:trained]),
        rank=0 if config.fine_tune_type == "full" else config.lora_rank * len(keys),
        size=activation_dtype(checked.arrays, dtype).size,
        layers=layers,
        supervised=len(objective.layers),
        relations=objective.relations,
        logits="kl" if objective.logits_weight else "ce" if objective.ce_weight else None,
        batch=sizing.batch_size // share.parts,
        seq_len=sizing.seq_len,
        grad_accum=sizing.grad_accum // share.groups,
        workspace=objective.workspace_bytes,
        gpu=gpu,
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
