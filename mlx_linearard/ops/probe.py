"""Measures mlx's attention under a gradient on this machine, once, and keeps the answer in a file.

mlx's attention holds all scores in the backward pass on some devices and dtypes and not on others, and this differs
between versions. The probe runs it at two lengths. Its memory must grow in proportion to the length, and its
gradient must be about as exact as that of ops/attention.py. Only then does training use it.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..files import read_json, write_json
from ..machine import describe, on_gpu
from .attention import attention
from .fused import Choice

FILE = "attention.json"  # in the cache folder
HEADS = 2  # query heads; they share one key head
LENGTHS = {True: (1024, 4096), False: (256, 1024)}  # by whether the device is a GPU
MOST_GROWTH = 1.5  # exponent of memory over length: 1 is linear, 2 quadratic; on a busy machine it varies by 0.3
ERROR_RATIO = 6.0  # the largest ratio of the error of the kernel to ours; on CUDA in bfloat16 it was 2.5
ERROR_FLOOR = 1e-6
SETTINGS = ("MLX_ENABLE_TF32", "MLX_SDPA_VJP_BLOCK", "MLX_SDPA_VJP_FALLBACK")  # these change mlx's kernels

Attend = Callable[..., mx.array]  # with the arguments of mx.fast.scaled_dot_product_attention


@dataclass(frozen=True)
class Probe:
    """The measurements of mlx's attention under a gradient. An attention that fails has infinite growth."""

    growth: float  # exponent of peak memory over length
    error: float  # relative error of the gradient, the larger one of the two lengths
    own_error: float  # the same error of ops/attention.py, at the shorter length
    peak: int  # bytes at the longer length, gradients included
    own_peak: int

    @property
    def fused(self) -> bool:
        """Whether training uses mlx's kernel."""
        return self.growth <= MOST_GROWTH and self.error <= ERROR_RATIO * self.own_error + ERROR_FLOOR

    def line(self) -> str:
        """The choice and its reason, in one line."""
        growth = f"memory grows as T^{self.growth:.1f}" if math.isfinite(self.growth) else "it fails"
        return (
            f"{'mlx' if self.fused else 'own tiles'} (mlx: {growth}, gradient off by {self.error:.1e}, "
            f"{self.peak / 1e6:.0f} MB; own tiles: {self.own_error:.1e}, {self.own_peak / 1e6:.0f} MB)"
        )


def choice_of(dtype: mx.Dtype, dim: int, folder: Path | None) -> Choice | None:
    """The choice for this machine, None if nothing is known about it.

    On a GPU the probe runs if it has not run yet. A CPU is not probed for a run: there mlx's attention holds all
    scores (mlx 0.32.4). `doctor` probes it, and its answer counts.

    Args:
        folder: where the answers are kept; None keeps nothing.
    """
    found = recorded(dtype, dim, folder)
    if found is None and on_gpu():
        found = probe_once(dtype, dim, folder)
    return None if found is None else Choice(_name(dtype), dim, found.fused)


def probe_once(dtype: mx.Dtype, dim: int, folder: Path | None) -> Probe:
    """The recorded probe of this machine; if there is none, the probe runs and is recorded."""
    found = recorded(dtype, dim, folder)
    if found is None:
        found = probe(dtype, dim)
        _record(dtype, dim, folder, found)
    return found


# ---------------------------------------------------------------------------------------------------
# Measure


def probe(dtype: mx.Dtype, dim: int, attend: Attend = mx.fast.scaled_dot_product_attention) -> Probe:
    """Measure `attend` under a gradient, for causal attention with heads of size `dim` in `dtype`."""
    short, long = LENGTHS[on_gpu()]
    inputs = {length: _inputs(length, dim, dtype) for length in (short, long)}
    expected = _float64(*(np.array(a.astype(mx.float32)).astype(np.float64) for a in inputs[short]))
    own_error = _error(_gradients(attention, inputs[short])[0], expected)
    own_peak = _gradients(attention, inputs[long])[1]
    exact_long = _gradients(attention, [a.astype(mx.float32) for a in inputs[long]])[0]
    try:
        gradients, low = _gradients(attend, inputs[short])
        gradients_long, high = _gradients(attend, inputs[long])
    except (RuntimeError, ValueError):  # no kernel for this dtype or head size
        return Probe(math.inf, math.inf, own_error, 0, own_peak)
    return Probe(
        growth=math.log(high / low) / math.log(long / short),
        error=max(_error(gradients, expected), _error(gradients_long, exact_long)),
        own_error=own_error,
        peak=high,
        own_peak=own_peak,
    )


def _inputs(length: int, dim: int, dtype: mx.Dtype) -> list[mx.array]:
    """[queries, keys, values, cotangent]: normal numbers, the same each time."""
    shapes = [(1, heads, length, dim) for heads in (HEADS, 1, 1, HEADS)]
    keys = mx.random.split(mx.random.key(0), len(shapes))
    arrays = [mx.random.normal(s, key=k).astype(dtype) for s, k in zip(shapes, keys, strict=True)]
    mx.eval(arrays)
    return arrays


def _gradients(attend: Attend, inputs: list[mx.array]) -> tuple[list[np.ndarray], int]:
    """([dQ, dK, dV] as float64, the peak memory beyond the inputs in bytes)."""
    *qkv, cotangent = inputs
    gc.collect()  # arrays in closures of earlier work
    mx.synchronize()  # mlx frees intermediate results after it has returned the last one
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, gradients = mx.vjp(lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal"), qkv, [cotangent])
    mx.eval(gradients)
    peak = mx.get_peak_memory() - before
    return [np.array(g.astype(mx.float32)).astype(np.float64) for g in gradients], max(1, peak)


def _error(gradients: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest relative error of the three gradients; infinite if a number is not finite."""
    errors = [float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in zip(gradients, expected, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _float64(q: np.ndarray, k: np.ndarray, v: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
    """[dQ, dK, dV] of causal attention by its definition; q and cotangent (1, H, T, D), k and v (1, 1, T, D)."""
    length, dim = q.shape[2:]
    scores = np.where(np.tril(np.ones((length, length), bool)), q @ k.swapaxes(-1, -2) * dim**-0.5, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = cotangent @ v.swapaxes(-1, -2)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * dim**-0.5
    d_k, d_v = (a.swapaxes(-1, -2) @ b for a, b in ((d_scores, q), (p, cotangent)))
    return [d_scores @ k, d_k.sum(1, keepdims=True), d_v.sum(1, keepdims=True)]


# ---------------------------------------------------------------------------------------------------
# The file


def recorded(dtype: mx.Dtype, dim: int, folder: Path | None) -> Probe | None:
    """The probe of this machine, mlx version, dtype and head size, if the file in `folder` has it."""
    value = _read(folder).get(_key(dtype, dim))
    names = [item.name for item in dataclasses.fields(Probe)]
    if not isinstance(value, dict) or set(value) != set(names):
        return None
    growth, error, own_error, peak, own_peak = (_number(value[name]) for name in names)
    if math.isnan(growth + error + own_error) or not math.isfinite(peak + own_peak):
        return None
    return Probe(growth, error, own_error, int(peak), int(own_peak))


def _number(value: Any) -> float:
    """A number of the file, where null is infinity; NaN if it is not a number that was written here."""
    if value is None:
        return math.inf
    valid = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return float(value) if valid else math.nan


def _record(dtype: mx.Dtype, dim: int, folder: Path | None, found: Probe) -> None:
    """Add a probe to the file, which is replaced if it is damaged. If the folder cannot be written, nothing is kept."""
    if folder is None:
        return
    fields = dataclasses.asdict(found).items()
    value = {name: number if math.isfinite(number) else None for name, number in fields}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, {**_read(folder), _key(dtype, dim): value})
    except (OSError, UserError):
        return


def _read(folder: Path | None) -> dict[str, Any]:
    """The file's probes by key; {} if there is no file or it is damaged."""
    if folder is None or not (folder / FILE).is_file():
        return {}
    try:
        value = read_json(folder / FILE)
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def _key(dtype: mx.Dtype, dim: int) -> str:
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return " / ".join([describe(), f"mlx {version('mlx')}", _name(dtype), f"heads of {dim}", *settings])


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
