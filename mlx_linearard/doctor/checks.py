"""What this machine is, how fast it is, whether the loss is exact on it, and which attention trains on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..convert.default_model import cache_directory
from ..errors import UserError
from ..machine import Machine, on_gpu
from ..ops.probe import probe_once
from ..ops.relation import relation_kl

PACKAGES = ("mlx-linearard", "mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")
SETTINGS = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME", "LD_PRELOAD", "MLX_ENABLE_TF32")

HEAD_SIZES = (64, 128)  # for which the choice of attention is shown

# Largest allowed relative error of loss and gradient: in float32, and with the TF32 products of some GPUs.
EXACT, TF32 = 1e-4, 2e-2


def examine(machine: Machine) -> dict[str, Any]:
    """Everything that the command prints about `machine`, as JSON values. Takes a few seconds."""
    folder = _cache()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": platform.platform(),
        "device": machine.name,
        "memory_gb": round(machine.memory / 1e9, 1),
        "matmul_gflops": round(machine.gflops, 1),
        "exp_ns": round(_exp_ns(), 3),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "model_cache": str(folder) if isinstance(folder, Path) else f"none: {folder}",
        "self_test": self_test(machine.gpu),
        "attention": attention_choices(folder if isinstance(folder, Path) else None),
        "hint": machine.hint,
    }


def _cache() -> Path | UserError:
    """The cache folder, or the error if there is none."""
    try:
        return cache_directory()
    except UserError as error:
        return error


def attention_choices(folder: Path | None) -> dict[str, str]:
    """Which attention trains on this machine, by dtype and head size, with the figures of the probe.

    Args:
        folder: where the answers are kept; None keeps nothing.
    """
    dtypes = ("bfloat16", "float16", "float32") if on_gpu() else ("float32",)
    cases = [(name, dim) for name in dtypes for dim in HEAD_SIZES]
    return {f"{name}, heads of {dim}": probe_once(getattr(mx, name), dim, folder).line() for name, dim in cases}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _exp_ns() -> float:
    """Nanoseconds per exponential in a large array."""
    x = mx.random.normal((4_000_000,))
    mx.eval(x, mx.exp(x))
    start = time.perf_counter()
    mx.eval(mx.exp(x))
    return (time.perf_counter() - start) / x.size * 1e9


def self_test(gpu: bool, length: int = 193, heads: int = 3, dim: int = 64) -> dict[str, Any]:
    """Compare relation loss and gradient of random vectors, in many tiles, with numpy in float64."""
    shape = (1, heads, length, dim)
    student, teacher = (mx.random.normal(shape, key=mx.random.key(i)) for i in (0, 1))
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, teacher, workspace_bytes=200_000))(student)
    expected_loss, expected_gradient = _float64(np.array(student), np.array(teacher))
    loss_error = abs(float(np.array(loss)) - expected_loss) / expected_loss
    difference = np.linalg.norm(np.array(gradient).astype(np.float64) - expected_gradient)
    gradient_error = float(difference / np.linalg.norm(expected_gradient))
    allowed = TF32 if gpu and os.environ.get("MLX_ENABLE_TF32") != "0" else EXACT
    return {
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "allowed": allowed,
        "passed": bool(max(loss_error, gradient_error) <= allowed),
    }


def _float64(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """The definition for x and y, both (1, H, T, D): the mean KL of the rows, and its gradient in x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    log_s, log_t = _log_relations(x), _log_relations(y)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    rows = x.shape[1] * x.shape[2]
    loss = np.where(p_t > 0, p_t * (log_t - np.where(p_t > 0, log_s, 0.0)), 0.0).sum() / rows
    error = (p_s - p_t) / rows
    return float(loss), x.shape[-1] ** -0.5 * (error + error.swapaxes(-1, -2)) @ x


def _log_relations(x: np.ndarray) -> np.ndarray:
    length = x.shape[2]
    scores = x @ x.swapaxes(-1, -2) * x.shape[-1] ** -0.5
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -1e300)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))
