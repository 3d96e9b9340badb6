"""Teacher (native RoPE, frozen) and student (scaled RoPE, adapted) over ONE copy of the frozen weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .. import rope
from ..errors import UserError
from .adapters import Adapter, Leaves, adapt, put, qkv_keys
from .directory import check_model_dir, load, resolve
from .quantization import check_trainable
from .tokenizer import tokenizer_of
from .trees import named_arrays, named_modules
from .weights import check_finite


@dataclass
class Pair:
    """Teacher and student, their tokenizer and their configs. `path` is the directory of the weights."""

    path: Path
    teacher: Any
    student: Any
    tokenizer: Any
    native_config: dict[str, Any]
    scaled_config: dict[str, Any]
    adapter: Adapter

    @property
    def native_window(self) -> int:
        return rope.native_window(self.native_config)

    def parameters(self) -> list[Leaves]:
        """The trainable arrays of each adapted layer, in the order of `adapter.layers`."""
        layers = self.student.layers
        return [dict(named_arrays(layers[i].trainable_parameters())) for i in self.adapter.layers]

    def set_parameters(self, parameters: list[Leaves]) -> None:
        """Put trained arrays into the student."""
        for index, leaves in zip(self.adapter.layers, parameters, strict=True):
            put(self.student.layers[index], leaves)


def load_pair(
    path: str | Path,
    *,
    method: str,
    factor: float,
    yarn_beta_fast: float | None = None,
    yarn_beta_slow: float | None = None,
    fine_tune_type: str = "lora",
    lora_rank: int = 64,
    lora_scale: float = 2.0,
    lora_dropout: float = 0.0,
    adapt_layers: Iterable[int] | Callable[[Any], Iterable[int]] | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> Pair:
    """Load a model directory once and build teacher and student over the same arrays.

    Args:
        path: a local mlx-lm or Hugging Face directory (safetensors), quantized or not, or a hub repository.
        method, factor, yarn_beta_fast, yarn_beta_slow: the scaling of the student's RoPE (see `rope.scale_rope`).
        fine_tune_type: `lora` or `dora` adapters on the q, k, v projections, or `full`: the projections themselves.
        adapt_layers: the layers that get adapters, or a function from the model to these layers; all by default.
        dtype: dtype of the frozen weights in memory (quantized weights keep their bits); by default that of the files.
        seed: seed of the adapters' first values.
    Raises:
        UserError: the model is missing or damaged, the weights are not finite, or the family does not support the
            method.
    """
    path = resolve(path)
    checked = check_model_dir(path)
    native = checked.config
    try:
        scaled = rope.scale_rope(native, method, factor, beta_fast=yarn_beta_fast, beta_slow=yarn_beta_slow)
    except ValueError as error:
        raise UserError(str(error)) from None
    teacher = load_frozen(path, native, dtype)
    check_finite(dict(named_arrays(teacher.parameters())), path)
    student = share(teacher, scaled)
    check_trainable(fine_tune_type, checked.quantized, qkv_keys(student))
    if adapt_layers is None:
        adapt_layers = range(len(student.layers))
    chosen = tuple(sorted(adapt_layers(student) if callable(adapt_layers) else adapt_layers))
    adapter = Adapter(fine_tune_type, lora_rank, lora_scale, lora_dropout, qkv_keys(student), chosen)
    mx.random.seed(seed)
    adapt(student, adapter)
    tokenizer = tokenizer_of(path, native)
    return Pair(path, teacher, student, tokenizer, native, scaled, adapter)


def load_frozen(path: Path, config: dict[str, Any], dtype: str | None = None) -> Any:
    """mlx-lm's model for `config` with the weights in `path`, frozen; never more than one copy in memory.

    UserError if the weights do not fit the config.
    """
    model: Any = load(path, config)
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    model.freeze()
    mx.eval(model.parameters())
    return model


def share(teacher: Any, config: dict[str, Any]) -> Any:
    """A second model of the teacher's class with `config`'s RoPE, over the teacher's own arrays.

    The initial weights of the new model are never evaluated, so there is no second copy at any time.
    """
    student = type(teacher)(type(teacher.args).from_dict(copy.deepcopy(config)))  # mlx-lm changes a text_config
    with_weights = [(name, module) for name, module in named_modules(teacher.leaf_modules()) if module.parameters()]
    student.update_modules(tree_unflatten(with_weights))
    student.update(teacher.parameters())
    student.freeze()
    student.eval()
    return student


def layer_paths(model: Any) -> list[str]:
    """The dotted path of each layer in its model, such as model.layers.0."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in model.layers]


def fingerprint(model: nn.Module) -> str:
    """A hash of all bits of a model's arrays, to show that frozen weights do not change."""
    digest = hashlib.sha256()
    for name, array in sorted(named_arrays(model.parameters())):
        digest.update(name.encode())
        digest.update(np.array(array.view(mx.uint8)).tobytes())
    return digest.hexdigest()
