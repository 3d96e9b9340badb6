"""mlx's own attention kernel: on which devices and dtypes it holds no scores, and the choice of a probe."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..machine import on_gpu


@dataclass(frozen=True)
class Choice:
    """Which attention runs under a gradient, for queries, keys and values of one dtype and head size."""

    dtype: str
    dim: int
    fused: bool  # mlx's kernel; else the tiles of ops/attention.py

    def covers(self, queries: mx.array, values: mx.array) -> bool:
        """Whether the choice was made for arrays like these, (B, H, T, D) and (B, H, T, Dv)."""
        same_size = queries.shape[-1] == values.shape[-1] == self.dim
        return same_size and queries.dtype == values.dtype == getattr(mx, self.dtype)


def trains_fused(queries: mx.array, values: mx.array, choice: Choice | None) -> bool:
    """Whether mlx's kernel runs under a gradient: as `choice` says; without a choice, as `is_linear` says."""
    if choice is not None and choice.covers(queries, values):
        return choice.fused
    return on_gpu() and is_linear(queries, values)


def has_linear_kernel(dim: int, dim_v: int, *, half: bool) -> bool:
    """Whether mlx's kernel is known to hold no scores on a GPU, with or without a gradient.

    This was measured on CUDA in half precision.
    """
    return not mx.metal.is_available() and half and dim == dim_v and dim <= 128 and dim % 8 == 0


def is_linear(queries: mx.array, values: mx.array) -> bool:
    """`has_linear_kernel` for queries (B, H, T, D) and values (B, H, T, Dv)."""
    half = queries.dtype in (mx.float16, mx.bfloat16)
    return has_linear_kernel(queries.shape[-1], values.shape[-1], half=half)
