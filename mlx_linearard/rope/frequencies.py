"""The inverse frequencies and the attention factor of a config.

Independent of mlx-lm and transformers: linear (arXiv 2306.15595), ntk (a larger theta), yarn (arXiv
2309.00071, section 3), llama3 (the Llama 3.1 release), longrope (arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .lookup import family_or_default, native_window
from .parameters import normalise, read, rotary_dims, yarn_attention_factor
from .settings import FULL, SLIDING
from .values import positive

YARN_FAST, YARN_SLOW = 32.0, 1.0  # the defaults of beta_fast and beta_slow


def inverse_frequencies(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse frequencies of a config, float64 (rotary_dims / 2,), by layer type.

    The keys are `full_attention` and, for the nested families, `sliding_attention`. ValueError for a rope_type
    without fixed frequencies, such as dynamic.
    """
    config = normalise(config)
    full, sliding = read(config, family_or_default(config))
    dims = rotary_dims(config)
    kinds = {FULL: full} if sliding is None else {FULL: full, SLIDING: sliding}
    return {name: frequencies(dims, params) for name, params in kinds.items()}


def attention_factor(config: Mapping[str, Any]) -> float:
    """The factor of the rotated queries and keys of full-attention layers (yarn and longrope; otherwise 1)."""
    config = normalise(config)
    full, _ = read(config, family_or_default(config))
    if full["rope_type"] == "yarn":
        return yarn_attention_factor(full)
    if full["rope_type"] == "longrope":
        original = full["original_max_position_embeddings"]
        ratio = native_window(config) / original
        return 1.0 if ratio <= 1 or original <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    return 1.0


def frequencies(dims: int, params: Mapping[str, Any]) -> np.ndarray:
    """The inverse frequencies of canonical parameters, float64 (dims / 2,)."""
    theta, rope_type = params["rope_theta"], params["rope_type"]
    native = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if rope_type == "default":
        return native
    if rope_type == "linear":
        return native / params["factor"]
    if rope_type == "llama3":
        return _llama3(native, params)
    if rope_type == "yarn":
        return _yarn(native, dims, params)
    if rope_type == "longrope":
        return native / _factors(params, native.size)
    raise ValueError(f"rope_type {rope_type!r} has no fixed frequencies")


def _factors(params: Mapping[str, Any], count: int) -> np.ndarray:
    """longrope's factors per frequency, (count,); of the long ones, which mlx-lm always uses."""
    factors = params.get("long_factor")
    if not isinstance(factors, list) or len(factors) != count:
        raise ValueError(f"long_factor must hold {count} numbers")
    return np.array([positive("long_factor", factor) for factor in factors])


def _llama3(native: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend between."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * native / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return native * (keep + (1 - keep) / params["factor"])


def _yarn(native: np.ndarray, dims: int, params: Mapping[str, Any]) -> np.ndarray:
    """Like llama3, but the blend is linear in the dimension's index between two whole indices."""

    def index(turns: float) -> float:
        ratio = params["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(params["rope_theta"]))

    low = max(math.floor(index(params.get("beta_fast", YARN_FAST))), 0)
    high: float = min(math.ceil(index(params.get("beta_slow", YARN_SLOW))), dims - 1)
    if low == high:
        high += 0.001
    divide = np.clip((np.arange(native.size, dtype=np.float64) - low) / (high - low), 0, 1)
    return native * (divide / params["factor"] + (1 - divide))
