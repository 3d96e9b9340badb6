"""The feed-forward part of a layer, some positions at a time, so that few of its wide activations exist at once.

A feed-forward part, or a mixture of experts, computes each position independently. Its activations are the widest of
a layer, and a gradient holds eight of them at once, so they decide how much memory a step takes. The forward pass
runs chunk by chunk. The backward pass runs each chunk forward again and then back, before the next chunk begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from .tiling import ceil_div, in_order

# (positions, width) arrays that a gradient holds: gate, up, their activation and product, and the gradients of all
# four. If there are several chunks, mlx's queue has not yet released the arrays of the last one or two.
ALONE, ARRAYS = 8, 24
SMALLEST = 64  # positions: smaller products are slow

PositionWise = Callable[[mx.array], mx.array]


def active_width(config: Mapping[str, Any]) -> int:
    """The width of a position's feed-forward part; for a mixture, those of its chosen and shared experts together."""
    dense = _dense(config)
    chosen, inner, shared = _experts(config, dense)
    return max(dense, chosen * inner + shared)


def width_of(config: Mapping[str, Any]) -> int:
    """The width of which a gradient holds `ALONE` arrays.

    mlx sorts a mixture's positions by expert, so a gradient holds 11 arrays as wide as an expert and 8 as wide as the
    hidden state, for each chosen expert (measured on the CPU).
    """
    dense = _dense(config)
    chosen, inner, shared = _experts(config, dense)
    return max(dense, chosen * (11 * inner // ALONE + int(config["hidden_size"])) + shared)


def kept_width(config: Mapping[str, Any]) -> int:
    """The numbers per position that a layer keeps of its feed-forward part if the backward pass does not run it again.

    Four arrays; for each chosen expert 1.75 as wide as the expert and 3.5 as wide as the hidden state (measured on
    the CPU).
    """
    dense = _dense(config)
    chosen, inner, shared = _experts(config, dense)
    experts = chosen * (7 * inner // 4 + 7 * int(config["hidden_size"]) // 2) + 4 * shared
    return experts if chosen else 4 * dense


def _dense(config: Mapping[str, Any]) -> int:
    """The width of the feed-forward part of a layer without experts. LFM2 makes two thirds of it a round number."""
    dense = int(config.get("intermediate_size") or 4 * int(config["hidden_size"]))
    if not config.get("block_auto_adjust_ff_dim"):
        return dense
    scaled = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * (2 * dense // 3))
    return ceil_div(scaled, int(config["block_multiple_of"])) * int(config["block_multiple_of"])


def _experts(config: Mapping[str, Any], dense: int) -> tuple[int, int, int]:
    """(experts chosen per position, the width of one, the width of the shared ones together); zeros without experts."""
    chosen = int(config.get("num_experts_per_tok") or 0)
    inner = int(config.get("moe_intermediate_size") or dense)
    shared = config.get("shared_expert_intermediate_size") or int(config.get("n_shared_experts") or 0) * inner
    return (chosen, inner, int(shared)) if chosen else (0, 0, 0)


def chunk_size(positions: int, width: int, size: int, workspace: int) -> int:
    """Positions per chunk: all, or as many as `workspace` bytes allow, in chunks of equal length.

    An activation has `width` numbers per position and `size` bytes per number.
    """
    if ALONE * positions * width * size <= workspace:
        return positions
    most = max(SMALLEST, workspace // (ARRAYS * width * size))
    return ceil_div(positions, ceil_div(positions, most))


def peak_bytes(positions: int, width: int, size: int, *, workspace: int) -> int:
    """The most memory that a gradient's activations hold, in bytes (measured on the CPU: 8.3 and up to 24.7 arrays)."""
    chunk = chunk_size(positions, width, size, workspace)
    return (ALONE if chunk >= positions else ARRAYS) * chunk * width * size


def in_chunks(feed_forward: PositionWise, width: int, workspace: int, *, recompute: bool = False) -> PositionWise:
    """`feed_forward`, a frozen function of (B, T, D), run forward and backward in chunks of positions.

    `recompute`: a single chunk too is run again in the backward pass. Several chunks always are.
    """

    def chunked(x: mx.array) -> mx.array:
        flat = x.reshape(1, -1, x.shape[-1])
        positions = flat.shape[1]
        chunk = chunk_size(positions, width, x.dtype.size, workspace)
        if chunk >= positions and not recompute:
            return feed_forward(x)
        slices = [slice(start, start + chunk) for start in range(0, positions, chunk)]

        @mx.custom_function
        def forward(flat: mx.array) -> mx.array:
            return mx.concatenate(list(_each(feed_forward, slices, flat)), axis=1)

        @forward.vjp
        def _(flat: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
            def back(x: mx.array, cotangent: mx.array) -> mx.array:
                return mx.vjp(feed_forward, [x], [cotangent])[1][0]

            # Not before the gradient has arrived: otherwise the activations of all layers would be in memory.
            (flat,) = in_order([flat], [cotangent])
            return mx.concatenate(list(_each(back, slices, flat, cotangent)), axis=1)

        out: Any = forward(flat)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    return chunked


def _each(function: Callable[..., mx.array], slices: list[slice], *arrays: mx.array) -> Iterator[mx.array]:
    """`function` of the (1, C, D) chunks of the arrays, one after another."""
    inputs, last = list(arrays), list[mx.array]()
    for at in slices:
        inputs = in_order(inputs, last)
        last = [function(*(a[:, at] for a in inputs))]
        yield last[0]
