"""A run as far as it is known without its weights: the checks that need none, its memory, and whether it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import rope
from ..config import DistillConfig
from ..distributed.ranks import ALONE, Ranks, Share
from ..errors import UserError
from ..machine import Machine, on_gpu
from ..models.adapters import qkv_keys
from ..models.directory import Checked, build, check_model_dir
from ..models.shape import Shape
from ..models.trees import named_modules
from .memory import FLOAT32, MemoryPlan, Step, longest, plan_memory
from .objective import Objective, resolve_objective
from .plan import Sizing, size_run

SHORTEST = 64  # tokens: no shorter sequence is advised
QUANTIZED = 4.5 / 8  # bytes a weight in 4 bits, with a scale and a bias for every 64


@dataclass(frozen=True)
class Outline:
    """What a run will be: its model directory, its size, its memory and the machine's."""

    path: Path
    native: dict[str, Any]
    dtype: str | None  # of the frozen weights; None keeps the file's own
    machine: Machine
    sizing: Sizing
    step: Step

    @property
    def memory(self) -> MemoryPlan:
        return plan_memory(self.step)

    def lines(self) -> Iterator[str]:
        """The plan, in lines."""
        yield from self.sizing.lines(self.machine)
        yield self.memory.line()
        window, limit = self.sizing.window[0], self.machine.usable
        most = longest(self.step, limit, window)
        fits = "no sequence fits" if not most else f"the longest sequence that fits is {most} tokens"
        yield f"this machine: {limit / 1e9:.2f} GB; {fits}{' (the native window)' if most == window else ''}"

    def check(self, config: DistillConfig) -> None:
        """UserError, with the flags that would help, where the plan exceeds the machine; nothing with --force."""
        if config.force or self.memory.total <= self.machine.usable:
            return
        ways = "; ".join(_ways(self.step, self.machine.usable, config))
        raise UserError(
            f"this run needs about {self.memory.total / 1e9:.2f} GB and this machine has "
            f"{self.machine.usable / 1e9:.2f}: {ways or 'no flag makes it fit, take a smaller model'} "
            "(--force runs it all the same)"
        )


def _ways(step: Step, limit: int, config: DistillConfig) -> Iterator[str]:
    """What would make the step fit, each way alone; where none does, some together."""

    def fits(**changes: Any) -> bool:
        return plan_memory(dataclasses.replace(step, **changes)).total <= limit

    found = False
    if (length := longest(step, limit, step.seq_len)) >= SHORTEST:
        found = True
        yield f"--seq-len {length // SHORTEST * SHORTEST}"
    smaller = next((n for n in range(step.batch - 1, 0, -1) if fits(batch=n)), None)
    if smaller:
        found = True
        yield f"--batch-size {smaller * (config.batch_size // step.batch)}"
    if config.layers != "last" and "relation" in config.objective and fits(supervised=1):
        found = True
        yield "--layers last"
    if config.workspace > 64 and fits(workspace=64 << 20):
        found = True
        yield "--workspace 64"
    small = dataclasses.replace(step, weights=min(step.weights, int(_weights(step.shape) * QUANTIZED)))
    if config.fine_tune_type != "full" and small.weights < 0.9 * step.weights:
        if plan_memory(small).total <= limit:
            yield "a 4-bit model"
        elif not found and (length := longest(small, limit, step.seq_len)) >= SHORTEST:
            yield f"a 4-bit model with --seq-len {length // SHORTEST * SHORTEST}"


def _weights(shape: Shape) -> int:
    return shape.block_weights + shape.vocabulary * shape.width * (1 if shape.tied else 2)


def outline(config: DistillConfig, path: Path, measure: Callable[[], Machine], ranks: Ranks = ALONE) -> Outline:
    """Check all that can be checked of the model without its weights, and plan the run; takes seconds.

    Of several `ranks` memory is that of one: its share of a step, and its part of the machine.

    `measure` tells of the machine; it is asked once the model is in order. Raises UserError for what is wrong with
    the directory (headers, index, shapes, tokenizer), the method, the objective, the layers or the sizes.
    """
    checked = check_model_dir(path)
    try:
        rope.scale_rope(checked.config, config.method, config.factor)
    except ValueError as error:
        raise UserError(str(error)) from None
    model = build(checked.config, len(checked.stored), path)
    objective = objective_of(config, model)
    dtype, machine = working_dtype(config), measure()
    sizing = size_run(config, checked.config, machine, ranks)
    step = _step(config, checked, model, objective, dtype, sizing, ranks.share(sizing.grad_accum, sizing.batch_size))
    return Outline(path, checked.config, dtype, machine, sizing, step)


def objective_of(config: DistillConfig, model: Any) -> Objective:
    """The objective that `config` asks of `model`."""
    return resolve_objective(
        model, config.objective, layers=config.layers, relations=config.relations,
        normalization=config.normalization, relation_weight=config.relation_weight,
        logits_weight=config.logits_weight, workspace_bytes=config.workspace << 20,
    )  # fmt: skip


def working_dtype(config: DistillConfig) -> str | None:
    """The dtype of the frozen weights in memory; None keeps the file's own."""
    if config.dtype != "auto":
        return config.dtype
    return None if on_gpu() else "float32"


def _step(
    config: DistillConfig,
    checked: Checked,
    model: Any,
    objective: Objective,
    dtype: str | None,
    sizing: Sizing,
    share: Share,
) -> Step:
    run = objective.last_layer(len(model.layers)) + 1
    keys = set(qkv_keys(model))
    trained = [_trained(layer, keys, config) for layer in model.layers[:run]]
    return Step(
        shape=Shape.of(checked.config),
        weights=weight_bytes(checked.arrays, dtype),
        trained=FLOAT32 * sum(trained),
        rank=0 if config.fine_tune_type == "full" else config.lora_rank * len(keys),
        size=activation_size(checked.arrays, dtype),
        layers=run,
        supervised=len(objective.layers),
        relations=objective.relations,
        logits="kl" if objective.logits_weight else "ce" if objective.ce_weight else None,
        batch=sizing.batch_size // share.parts,
        seq_len=sizing.seq_len,
        grad_accum=sizing.grad_accum // share.groups,
        workspace=objective.workspace_bytes,
        gpu=on_gpu(),
    )


def weight_bytes(arrays: Mapping[str, mx.array], dtype: str | None) -> int:
    """Bytes of a model's arrays in memory, floating ones in `dtype`."""

    def size(array: mx.array) -> int:
        floating = dtype is not None and mx.issubdtype(array.dtype, mx.floating)
        return getattr(mx, str(dtype)).size if floating else array.dtype.size

    return sum(array.size * size(array) for array in arrays.values())


def activation_size(arrays: Mapping[str, mx.array], dtype: str | None) -> int:
    """Bytes of an activation: that of the weights' dtype in memory, the widest where they differ."""
    if dtype is not None:
        return getattr(mx, dtype).size
    return max((a.dtype.size for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)), default=FLOAT32)


def _trained(layer: nn.Module, keys: set[str], config: DistillConfig) -> int:
    """Numbers that are trained in a layer."""
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
