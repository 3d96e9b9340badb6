"""A trained pair as files: adapters, the scaled base, the fused model, and the check of what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from ..files import ADAPTER_CONFIG, ADAPTERS, new_directory, write_json
from ..models.adapters import MasterLinear
from ..models.pair import Pair, layer_paths
from ..models.save import (
    Tensor,
    copy_tokenizer,
    lazy,
    link_model_files,
    model_directory,
    write_config,
    write_safetensors,
)
from ..models.trees import named_arrays
from .formats import _adapter_tensors


def write_fused(pair: Pair, target: Path) -> None:
    """The restored model: adapters folded into q, k, v, all other weights as they are.

    Projections of a quantized base are written unquantized where they were adapted: quantizing them again
    would throw away most of what was learnt. mlx-lm loads such a mixture as it stands.
    """
    fused = {name: _fuse(module) for name, module in pair.student.named_modules() if _is_adapted(module)}
    config = dict(pair.scaled_config)
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = {name: value for name, value in config[key].items() if name not in fused}
    with model_directory(target, config, _fused_tensors(pair, fused), overwrite=True) as made:
        copy_tokenizer(pair.path, made)


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "fuse") or isinstance(module, MasterLinear)


def _fuse(module: Any) -> nn.Module:
    """One projection with its adapter folded in, unquantized and lazy."""
    return module.as_linear() if isinstance(module, MasterLinear) else module.fuse(dequantize=True)


def _fused_tensors(pair: Pair, fused: dict[str, nn.Module]) -> Iterator[Tensor]:
    for name, array in named_arrays(pair.student.parameters()):
        if not any(name.startswith(f"{prefix}.") for prefix in fused):
            yield lazy(name, array)
    for prefix, module in fused.items():
        for name, array in named_arrays(module.parameters()):
            yield lazy(f"{prefix}.{name}", array)


def write_adapters(pair: Pair, target: Path, note: dict[str, Any]) -> None:
    """mlx-lm's adapter directory; `note` is kept in adapter_config.json beside what mlx-lm reads."""
    paths = layer_paths(pair.student)
    with new_directory(target, overwrite=True) as made:
        write_safetensors(made / ADAPTERS, _adapter_tensors(pair, paths))
        write_json(made / ADAPTER_CONFIG, {**pair.adapter.config(paths), **note})


def write_base(pair: Pair, target: Path) -> None:
    """The base model with the scaled config: weights linked, not copied, so that adapters find their RoPE."""
    with new_directory(target, overwrite=True) as made:
        link_model_files(pair.path, made)
        write_config(made, pair.scaled_config)


@dataclass(frozen=True)
class Verified:
    """How far the loaded export is from the student in memory, on one sample."""

    max_difference: float  # of logits
    kl: float  # nats a token
    tokens: int
    tolerance: float  # of the KL

    @property
    def ok(self) -> bool:
        return self.kl <= self.tolerance


def sample_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """A model's logits on one sample by its own stock code, (T, V) float32."""
    model.eval()
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


def verify_export(directory: Path, tokens: np.ndarray, expected: np.ndarray) -> Verified:
    """Load `directory` with stock mlx-lm and compare its logits on `tokens` with the student's."""
    model, _ = load_model(directory)
    found = sample_logits(model, tokens)
    floats = [a.dtype for _, a in named_arrays(model.parameters()) if a.dtype in TOLERANCE]
    tolerance = max((TOLERANCE[dtype] for dtype in floats), default=TOLERANCE[mx.bfloat16])
    return Verified(float(np.abs(found - expected).max()), _mean_kl(expected, found), len(tokens), tolerance)


def _mean_kl(a: np.ndarray, b: np.ndarray) -> float:
    """KL(softmax a || softmax b), averaged over rows, in float64."""
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# Mean KL between the student in memory and the export as stock mlx-lm loads it, in nats a token. Fusing
# rounds W + scale B A once more, in the dtype of the export; beyond these bounds something else is wrong.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 5e-2}
