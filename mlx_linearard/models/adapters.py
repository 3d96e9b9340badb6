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
from .layers import attention_of
from .trees import named_modules, slot


@dataclass(frozen=True)
class Adapter:
    """What is trained: of which kind, and of which projections in which layers."""

    fine_tune_type: str  # lora, dora or full
    rank: int
    scale: float
    dropout: float
    keys: tuple[str, ...]  # paths inside a layer, such as self_attn.q_proj
    layers: tuple[int, ...]  # the layers that carry adapters

    def config(self, paths: list[str]) -> dict[str, Any]:
        """mlx-lm's adapter_config.json, for layers at `paths`. Adapters on some layers only are named in full."""
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
    """Make the adapted projections trainable, and nothing else."""
    for index in adapter.layers:
        layer = student.layers[index]
        if adapter.fine_tune_type == "full":
            _unshare(layer, adapter.keys)
            continue
        wrapped = _OneLayer(layer)
        parameters = {
            "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": set(adapter.keys),
        }  # fmt: skip
        linear_to_lora_layers(wrapped, 1, parameters, use_dora=adapter.fine_tune_type == "dora")
    student.train()  # dropout; the frozen modules have none
    mx.eval(student.trainable_parameters())


def drop_rows(student: Any, part: int, parts: int) -> None:
    """From here on, dropout is what one of `parts` equal parts of a batch's rows has where the batch is whole."""
    for layer in student.layers:
        for name, module in named_modules(layer.leaf_modules()):
            if type(module) is nn.Dropout:
                layer.update_modules(tree_unflatten([(name, _DropoutOfRows(module, part, parts))]))


class _DropoutOfRows(nn.Dropout):
    """Draws for all rows of a batch, of which it gets only some."""

    def __init__(self, whole: nn.Dropout, part: int, parts: int):
        super().__init__(1 - whole._p_1)
        self._p_1, self._part, self._parts = whole._p_1, part, parts

    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        rows, *rest = x.shape
        mask = mx.random.bernoulli(self._p_1, (rows * self._parts, *rest))[self._part * rows : (self._part + 1) * rows]
        return (mask * x) * (1 / self._p_1)


class _OneLayer(nn.Module):
    """A single layer as a model, so that mlx-lm's own conversion adapts exactly this one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layers = [layer]


def _unshare(layer: nn.Module, keys: Iterable[str]) -> None:
    """Give the student its own trainable q, k, v: float32 masters of the shared arrays."""
    modules = dict(layer.named_modules())
    for key in keys:
        if key not in modules:
            continue
        old = modules[key]
        if not isinstance(old, nn.Linear):
            raise UserError(
                f"--fine-tune-type full cannot train {type(old).__name__} {key}: use lora or dora on a quantized "
                "model, or an unquantized one"
            )
        layer.update_modules(tree_unflatten([(key, MasterLinear(old))]))


class MasterLinear(nn.Linear):
    """A trainable linear layer that keeps float32 masters and computes in its input's dtype."""

    def __init__(self, source: nn.Linear):
        nn.Module.__init__(self)
        self.source_dtype = source.weight.dtype
        for name, value in source.parameters().items():
            self[name] = value.astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight.astype(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def as_linear(self) -> nn.Linear:
        """The layer in the source's dtype."""
        plain = nn.Linear(1, 1, bias="bias" in self)
        plain.update({name: value.astype(self.source_dtype) for name, value in self.parameters().items()})
        return plain


Leaves = dict[str, mx.array]  # trainable arrays of one layer, by their path inside it


def put(layer: nn.Module, leaves: Leaves) -> None:
    """Set a layer's arrays by their paths."""
    for path, array in leaves.items():
        container, key = slot(layer, path)
        container[key] = array


@contextmanager
def holding(layer: nn.Module, leaves: Leaves) -> Iterator[None]:
    """The layer with other arrays in place, for as long as the block runs."""
    own = {path: container[key] for path in leaves for container, key in [slot(layer, path)]}
    try:
        put(layer, leaves)
        yield
    finally:
        put(layer, own)


def qkv_keys(model: Any) -> tuple[str, ...]:
    """Paths, inside a layer, of the projections that make q, k and v; UserError for an architecture without them."""
    for layer in model.layers:
        if found := attention_of(layer):
            path, attention = found
            if names := [name for name in QKV_NAMES if name in attention]:
                return tuple(f"{path}.{name}" for name in names)
    raise UserError(
        f"no layer of {model.model_type} calls scaled_dot_product_attention on q, k, v projections "
        "that are known here: this architecture is not supported"
    )


# The projections that make q, k and v, as mlx-lm's attentions name them; the last four are fused.
QKV_NAMES = ("q_proj", "k_proj", "v_proj", "wq", "wk", "wv", "qkv_proj", "query_key_value", "Wqkv", "c_attn")
