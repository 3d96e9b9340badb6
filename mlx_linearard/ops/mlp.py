"""The feed-forward part of a layer, some positions at a time: its wide activations never exist for a whole sequence.

Feed-forward parts, mixtures of experts too, treat each position on its own. Their activations are the widest of a
layer, and a gradient holds eight of them at once, so they decide how much memory a step takes. A chunk of
positions goes forward, and in the backward pass forward again and back, before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from .tiling import ceil_div, in_order

# (positions, width) arrays that a gradient holds: gate, up, their activation and product, and the gradients of all
# four; where chunks follow one another mlx's queue has not released those of the last one or two yet.
ALONE, ARRAYS = 8, 24
SMALLEST = 64  # positions: smaller products are slow

PositionWise = Callable[[mx.array], mx.array]


def width_of(config: Mapping[str, Any]) -> int:
    """The widest activation of a position in a feed-forward part; of a mixture, its chosen experts together."""
    dense = int(config.get("intermediate_size") or 4 * int(config["hidden_size"]))
    experts = int(config.get("num_experts_per_tok") or 1) * int(config.get("moe_intermediate_size") or dense)
    return max(dense, experts)


def chunk_size(positions: int, width: int, size: int, workspace: int) -> int:
    """Positions a chunk: all, or as many as `workspace` bytes allow, in chunks of one length.

    `width` and `size` are those of an activation: numbers a position, and bytes a number.
    """
    if ALONE * positions * width * size <= workspace:
        return positions
    most = max(SMALLEST, workspace // (ARRAYS * width * size))
    return ceil_div(positions, ceil_div(positions, most))


def held(positions: int, width: int, size: int, workspace: int) -> int:
    """Bytes of such arrays at the fullest moment of a gradient (measured on the CPU: 8.3 and up to 24.7 arrays)."""
    chunk = chunk_size(positions, width, size, workspace)
    return (ALONE if chunk >= positions else ARRAYS) * chunk * width * size


def in_chunks(feed_forward: PositionWise, width: int, workspace: int) -> PositionWise:
    """`feed_forward`, (B, T, D) to (B, T, D'), frozen, in chunks of positions; a gradient comes back in chunks too."""

    def chunked(x: mx.array) -> mx.array:
        flat = x.reshape(1, -1, x.shape[-1])
        positions = flat.shape[1]
        chunk = chunk_size(positions, width, x.dtype.size, workspace)
        if chunk >= positions:
            return feed_forward(x)
        slices = [slice(start, start + chunk) for start in range(0, positions, chunk)]

        @mx.custom_function
        def forward(flat: mx.array) -> mx.array:
            return mx.concatenate(list(_each(feed_forward, slices, flat)), axis=1)

        @forward.vjp
        def _(flat: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            def back(x: mx.array, cotangent: mx.array) -> mx.array:
                return mx.vjp(feed_forward, [x], [cotangent])[1][0]

            return mx.concatenate(list(_each(back, slices, flat, cotangent)), axis=1)

        out: Any = forward(flat)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    return chunked


def _each(function: Callable[..., mx.array], slices: list[slice], *arrays: mx.array) -> Iterator[mx.array]:
    """`function` of the arrays' (1, C, D) chunks, one behind another."""
    inputs, last = list(arrays), list[mx.array]()
    for at in slices:
        inputs = in_order(inputs, last)
        last = [function(*(a[:, at] for a in inputs))]
        yield last[0]
