"""The seam for attentions that mlx-lm writes out instead of calling its attention function.

A stand-in repeats such a module's own steps with its own parts and calls `attend` where the scores would be made.
tests/families compares it with the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Attend = Callable[..., mx.array]


def gemma2(attention: Any, attend: Attend, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
    """mlx_lm.models.gemma2.Attention without a cache: queries are scaled and scores capped before the mask."""
    if cache is not None:
        raise ValueError("this attention runs without a cache")
    batch, length, _ = x.shape
    queries, keys, values = (
        projection(x).reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
        for projection, heads in (
            (attention.q_proj, attention.n_heads),
            (attention.k_proj, attention.n_kv_heads),
            (attention.v_proj, attention.n_kv_heads),
        )
    )
    queries, keys = attention.rope(queries), attention.rope(keys)
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.shape[-2:] == (length, length):
        mask = "causal"  # without a cache mlx-lm's mask is the causal one, as an array
    cap = float(attention.attn_logit_softcapping)
    output = attend(queries, keys, values, scale=attention.scale, mask=mask, softcap=cap)
    return attention.o_proj(output.transpose(0, 2, 1, 3).reshape(batch, length, -1))


WRITTEN_OUT: dict[tuple[str, str], Callable[..., mx.array]] = {("mlx_lm.models.gemma2", "Attention"): gemma2}


def written_out(module: nn.Module) -> Callable[..., mx.array] | None:
    """The function that computes the attention of `module` through the seam; None if it calls the seam itself."""
    return WRITTEN_OUT.get((type(module).__module__, type(module).__name__))
