"""A trained pair as files: the adapters, the base model with the scaled config, and the fused model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..files import ADAPTER_CONFIG, ADAPTERS, new_directory, write_json
from ..models.adapters import MasterLinear
from ..models.dtypes import FLOAT_NAMES
from ..models.pair import Pair, layer_paths
from ..models.save import (
    Tensor,
    lazy,
    link_model_files,
    model_directory,
    write_config,
    write_safetensors,
)
from ..models.tokenizer_files import copy_tokenizer
from ..models.trees import named_arrays


def write_adapters(pair: Pair, target: Path, note: Mapping[str, Any]) -> None:
    """Write mlx-lm's adapter directory. adapter_config.json holds `note` beside the keys that mlx-lm reads."""
    paths = layer_paths(pair.student)
    with new_directory(target, overwrite=True) as folder:
        write_safetensors(folder / ADAPTERS, _adapter_tensors(pair, paths))
        write_json(folder / ADAPTER_CONFIG, {**pair.adapter.config(paths), **note})


def write_base(pair: Pair, target: Path) -> None:
    """Write the base model with the scaled config, which adapters need for their RoPE. Weights are linked."""
    with new_directory(target, overwrite=True) as folder:
        link_model_files(pair.path, folder, window=pair.scaled_config["max_position_embeddings"])
        write_config(folder, pair.scaled_config)


def write_fused(pair: Pair, target: Path) -> None:
    """Write the restored model: adapters folded into q, k, v, all other weights as they are in memory.

    The adapted projections of a quantized base are written unquantized, because quantizing them again would lose
    most of the training; mlx-lm loads such a mixture. The config names the dtype of the weights that are written.
    """
    dtype = next(array.dtype for _, array in named_arrays(pair.teacher.parameters()) if array.dtype in FLOAT_NAMES)
    fused = {name: _fuse(module, dtype) for name, module in pair.student.named_modules() if _is_adapted(module)}
    tensors = list(_fused_tensors(pair, fused))
    config = {**pair.scaled_config, **_dtype_keys(tensors)}
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = {name: value for name, value in config[key].items() if name not in fused}
    with model_directory(target, config, _handed_over(tensors), overwrite=True) as folder:
        copy_tokenizer(pair.path, folder, window=config["max_position_embeddings"])


def _adapter_tensors(pair: Pair, paths: list[str]) -> Iterator[Tensor]:
    """The trained arrays by their full names. Float32 masters are written in the dtype of the weights they replace."""
    for index in pair.adapter.layers:
        layer = pair.student.layers[index]
        modules = dict(layer.named_modules())
        for name, array in named_arrays(layer.trainable_parameters()):
            module = modules[name.rpartition(".")[0]]
            stored = array.astype(module.source_dtype) if isinstance(module, MasterLinear) else array
            yield lazy(f"{paths[index]}.{name}", stored)


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "fuse") or isinstance(module, MasterLinear)


def _fuse(module: Any, dtype: mx.Dtype) -> nn.Module:
    """One projection with its adapter folded in, unquantized, in the dtype of its base; not yet evaluated.

    `dtype` is for a base that has no floating numbers, such as one of 4-bit floats.
    """
    if isinstance(module, MasterLinear):
        return module.as_linear()
    if "scales" in module.linear and module.linear.scales.dtype not in FLOAT_NAMES:
        module = _on_floats(module, dtype)
    base = module.linear
    fused: nn.Module = module.fuse(dequantize=True)
    fused.set_dtype((base.scales if "scales" in base else base.weight).dtype)  # DoRA's fuse gives float32
    return fused


def _on_floats(module: Any, dtype: mx.Dtype) -> Any:
    """An adapted projection over its dequantized base."""
    base = module.linear
    plain = nn.Linear(1, 1, bias="bias" in base)
    scheme = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    plain.weight = mx.dequantize(base.weight, base.scales, **scheme).astype(dtype)
    if "bias" in base:
        plain.bias = base.bias
    copy = type(module).from_base(plain, r=module.lora_a.shape[1], scale=module.scale)
    for name in ("lora_a", "lora_b", "m"):
        if name in module:
            copy[name] = module[name]
    return copy


def _fused_tensors(pair: Pair, fused: Mapping[str, nn.Module]) -> Iterator[Tensor]:
    for name, array in named_arrays(pair.student.parameters()):
        if not any(name.startswith(f"{prefix}.") for prefix in fused):
            yield lazy(name, array)
    for prefix, module in fused.items():
        for name, array in named_arrays(module.parameters()):
            yield lazy(f"{prefix}.{name}", array)


def _handed_over(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The tensors, each dropped from the list when it is taken, so that it is released once it is written."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def _dtype_keys(tensors: list[Tensor]) -> dict[str, str]:
    """The config's keys for the floating dtype that most of the numbers have."""
    numbers = Counter[str]()
    for tensor in tensors:
        if tensor.dtype in FLOAT_NAMES:
            numbers[FLOAT_NAMES[tensor.dtype]] += tensor.nbytes // tensor.dtype.size
    return dict.fromkeys(("dtype", "torch_dtype"), numbers.most_common(1)[0][0]) if numbers else {}
