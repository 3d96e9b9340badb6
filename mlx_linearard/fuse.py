"""What a run leaves behind: the scaled base, the adapters, and the fused model that any mlx-lm tool opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from .errors import UserError
from .files import ADAPTER_CONFIG, ADAPTERS, CONFIG, GENERATION_CONFIG, TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX
from .files import new_directory, write_json
from .pair import MasterLinear, Pair, layer_paths

SHARD_BYTES = 4 << 30

# Mean KL between the student in memory and the export as stock mlx-lm loads it, in nats a token. Fusing
# rounds W + scale B A once more, in the dtype of the export; beyond these bounds something else is wrong.
EXPORT_TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 5e-2}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which survives the source's removal; a symbolic link across file systems."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        target.symlink_to(real)


def write_base(pair: Pair, target: Path) -> None:
    """The base model with the scaled config: weights linked, not copied, so that adapters find their RoPE."""
    with new_directory(target, overwrite=True) as temporary:
        _write_config(pair.scaled_config, temporary)
        _copy_beside(pair.path, temporary)
        for file in sorted(pair.path.glob("model*.safetensors")):
            link_or_copy(file, temporary / file.name)
        if (pair.path / WEIGHTS_INDEX).exists():
            shutil.copy(pair.path / WEIGHTS_INDEX, temporary)


def _write_config(config: dict[str, Any], folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")


def _copy_beside(source: Path, target: Path) -> None:
    """The small files of a model: tokenizer, chat template, generation settings."""
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)


def write_adapters(pair: Pair, target: Path, note: dict[str, Any]) -> None:
    """mlx-lm's adapter directory; `note` is kept in adapter_config.json beside what mlx-lm reads."""
    paths = layer_paths(pair.student)
    arrays = {
        f"{paths[index]}.{name}": value
        for index, leaves in zip(pair.adapter.layers, pair.parameters(), strict=True)
        for name, value in leaves.items()
    }
    _refuse_non_finite(arrays.items())
    with new_directory(target, overwrite=True) as temporary:
        mx.save_safetensors(str(temporary / ADAPTERS), arrays, metadata={"format": "mlx"})
        write_json(temporary / ADAPTER_CONFIG, {**pair.adapter.config(paths), **note})


def write_fused(pair: Pair, target: Path) -> None:
    """The restored model: adapters folded into q, k, v, all other weights as they are.

    Projections of a quantized base are written unquantized where they were adapted: quantizing them again
    would throw away most of what was learnt. mlx-lm loads such a mixture as it stands.
    """
    weights = dict(fused_weights(pair))
    with new_directory(target, overwrite=True) as temporary:
        _write_config(pair.scaled_config, temporary)
        _copy_beside(pair.path, temporary)
        write_shards(weights, temporary)


def fused_weights(pair: Pair) -> Iterable[tuple[str, mx.array]]:
    """The fused model's arrays by name, each lazy until it is written."""
    fused = {
        name: fuse_module(module)
        for name, module in pair.student.named_modules()
        if hasattr(module, "fuse") or isinstance(module, MasterLinear)
    }
    for name, array in tree_flatten(pair.student.parameters()):
        if not any(name.startswith(f"{prefix}.") for prefix in fused):
            yield name, array
    for prefix, module in fused.items():
        for name, array in tree_flatten(module.parameters()):
            yield f"{prefix}.{name}", array


def fuse_module(module: Any) -> nn.Module:
    """One projection with its adapter folded in, unquantized."""
    if isinstance(module, MasterLinear):
        return module.as_linear()
    return module.fuse(dequantize=True)


def write_shards(weights: dict[str, mx.array], folder: Path) -> None:
    """model.safetensors, or shards of at most `SHARD_BYTES` with an index; empties `weights` as it goes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(weights):
        if groups[-1] and size + weights[name].nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += weights[name].nbytes
    total = sum(w.nbytes for w in weights.values())
    names = [WEIGHTS] if len(groups) == 1 else [
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))
    ]  # fmt: skip
    for file, group in zip(names, groups, strict=True):
        shard = {name: weights.pop(name) for name in group}
        _refuse_non_finite(shard.items())
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
    index = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})


def _refuse_non_finite(arrays: Iterable[tuple[str, mx.array]]) -> None:
    bad = [n for n, a in arrays if mx.issubdtype(a.dtype, mx.floating) and not mx.isfinite(a).all().item()]
    if bad:
        raise UserError(f"weights that are not finite are never written: {', '.join(bad[:8])}; lower --learning-rate")


# ---------------------------------------------------------------------------------------------------
# Verification: what stock mlx-lm loads is what was trained.


@dataclass(frozen=True)
class Verified:
    """How far the loaded export is from the student in memory, on one sample."""

    max_difference: float  # of logits
    kl: float  # nats a token
    tokens: int
    dtype: str

    @property
    def ok(self) -> bool:
        return self.kl <= EXPORT_TOLERANCE.get(self.dtype, EXPORT_TOLERANCE["bfloat16"])


def sample_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """A model's logits on one sample by its own stock code, (T, V) float32."""
    model.eval()
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


def verify_export(directory: Path, tokens: np.ndarray, expected: np.ndarray) -> Verified:
    """Load `directory` with stock mlx-lm and compare its logits on `tokens` with the student's."""
    model, _ = load_model(directory)
    found = sample_logits(model, tokens)
    dtype = next(
        str(a.dtype).removeprefix("mlx.core.")
        for name, a in tree_flatten(model.parameters()) if name.endswith("norm.weight")
    )  # fmt: skip
    return Verified(float(np.abs(found - expected).max()), _mean_kl(expected, found), len(tokens), dtype)


def _mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    log_a = a - a.max(-1, keepdims=True)
    log_a -= np.log(np.exp(log_a).sum(-1, keepdims=True))
    log_b = b - b.max(-1, keepdims=True)
    log_b -= np.log(np.exp(log_b).sum(-1, keepdims=True))
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())
