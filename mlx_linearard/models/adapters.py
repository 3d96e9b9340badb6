"""LoRA, DoRA and full training of the q, k, v projections of a student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import UserError
from ..rope import family_or_default
from .layers import attention_of
from .trees import named_modules, slot

Leaves = dict[str, mx.array]  # trainable arrays of one layer, by their path inside it


@dataclass(frozen=True)
class Adapter:
    """The kind of training, and the projections and layers that it trains."""

    fine_tune_type: str  # lora, dora or full
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]  # paths inside a layer, such as self_attn.q_proj
    layers: tuple[int, ...]  # the layers that carry adapters

    def config(self, paths: list[str]) -> dict[str, Any]:
        """The content of mlx-lm's adapter_config.json, for a model whose layers have the dotted `paths`.

        If only some layers carry adapters, the keys are full paths.
        """
        keys: Iterable[str] = self.keys
        if len(self.layers) < len(paths):
            keys = [f"{paths[i]}.{key}" for i in self.layers for key in self.keys]
        parameters = {"rank": self.rank, "scale": self.scale, "dropout": self.dropout, "keys": list(keys)}
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": len(paths),
            "lora_parameters": parameters,
        }


def adapt(student: Any, adapter: Adapter) -> None:
    """Make the adapted projections of `student` trainable, and nothing else."""
    for index in adapter.layers:
        layer = student.layers[index]
        if adapter.fine_tune_type == "full":
            _unshare(layer, adapter.keys)
            continue
        parameters = {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": adapter.dropout,
            "keys": set(adapter.keys),
        }
        linear_to_lora_layers(_OneLayer(layer), 1, parameters, use_dora=adapter.fine_tune_type == "dora")
    student.train()  # switches dropout on; only adapters have it
    mx.eval(student.trainable_parameters())


def drop_rows(student: Any, part: int, parts: int) -> None:
    """Make dropout on part number `part` of a batch draw the same random numbers as on the complete batch.

    A batch of a distributed run is divided by rows into `parts` equal parts, one per rank.
    """
    for layer in student.layers:
        for name, module in named_modules(layer.leaf_modules()):
            if type(module) is nn.Dropout:
                layer.update_modules(tree_unflatten([(name, _DropoutOfRows(module, part, parts))]))


class _DropoutOfRows(nn.Dropout):
    """Dropout on some rows of a batch that draws random numbers for all rows."""

    def __init__(self, plain: nn.Dropout, part: int, parts: int):
        super().__init__(1 - plain._p_1)
        self._p_1, self._part, self._parts = plain._p_1, part, parts

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        rows, *rest = x.shape
        mask = mx.random.bernoulli(self._p_1, (rows * self._parts, *rest))[self._part * rows : (self._part + 1) * rows]
        return (mask * x) * (1 / self._p_1)


class _OneLayer(nn.Module):
    """A single layer as a model, so that mlx-lm's own function adapts exactly this layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = [layer]


def _unshare(layer: nn.Module, keys: Iterable[str]) -> None:
    """Give the student its own trainable q, k, v: float32 copies (masters) of the shared arrays."""
    modules = dict(layer.named_modules())
    for key in keys:
        if key not in modules:
            continue
        shared = modules[key]
        if not isinstance(shared, nn.Linear):
            raise UserError(
                f"--fine-tune-type full cannot train {type(shared).__name__} {key}: use lora or dora on a quantized "
                "model, or an unquantized model"
            )
        layer.update_modules(tree_unflatten([(key, MasterLinear(shared))]))


class MasterLinear(nn.Linear):
    """A trainable linear layer that keeps float32 masters and computes in its input's dtype."""

    def __init__(self, source: nn.Linear):
        nn.Module.__init__(self)
        self.source_dtype = source.weight.dtype
        for name, value in source.parameters().items():
            self[name] = value.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        product = x @ self.weight.astype(x.dtype).T
        return product + self.bias.astype(x.dtype) if "bias" in self else product

    def as_linear(self) -> nn.Linear:
        """A plain linear layer with the trained values, in the dtype of the source."""
        plain = nn.Linear(1, 1, bias="bias" in self)
        plain.update({name: value.astype(self.source_dtype) for name, value in self.parameters().items()})
        return plain


def put(layer: nn.Module, leaves: Leaves) -> None:
    """Set the arrays of a layer by their paths."""
    for path, array in leaves.items():
        container, key = slot(layer, path)
        container[key] = array


@contextmanager
def holding(layer: nn.Module, leaves: Leaves) -> Iterator[None]:
    """Put other arrays into the layer while the block runs."""
    replaced = {path: container[key] for path in leaves for container, key in [slot(layer, path)]}
    try:
        put(layer, leaves)
        yield
    finally:
        put(layer, replaced)


def qkv_keys(model: Any) -> tuple[str, ...]:
    """Paths, inside a layer, of the projections that make q, k and v; UserError for an architecture without them."""
    names = family_or_default({"model_type": getattr(model, "language_model", model).model_type}).projections
    for layer in model.layers:
        path, attention = attention_of(layer) or ("", {})
        if all(name in attention for name in names):
            return tuple(f"{path}.{name}" for name in names)
    raise UserError(
        f"no layer of {model.model_type} calls scaled_dot_product_attention on the "
        f"projections {', '.join(names)}: this architecture is not supported"
    )
