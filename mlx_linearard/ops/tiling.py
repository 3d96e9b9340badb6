"""Tiles of the quadratic computations: their sizes, and the order in which they run.

mlx is lazy: a loop over tiles only builds a graph, and its evaluation may hold all tiles at the same time. `in_order`
prevents that: the inputs of a tile depend on the outputs of the tile before. A GPU still accepts work, and so
memory, ahead of the work that is done: up to ten batches of operations. On Metal a batch reads about 50 MB. On a
large CUDA card mlx's default is a CUDA graph of 100 operations or 1000 MB, and so a batch is made as small as a few
operations here. Graphs of a few operations cost far more to launch than the operations, so they are switched off.
Measured on an H100, a compiled step of 4096 tokens: with graphs 83 ms and 0.79 GB, without graphs 69 ms and 4.3 GB
in batches of 100 operations, 71 ms and 0.92 GB in batches of 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

WORKSPACE_BYTES = 256 * 2**20
FLOAT32 = 4
MULTIPLIED_AT_ONCE = 1 << 20  # numbers that `multiply` holds in float32
GRAIN = 8  # the rows of a growing tile are a multiple of this
MASKED = -1e30  # a finite minus infinity: exp() of it is 0, differences of it are 0 and never NaN

SETTINGS = {
    "MLX_USE_CUDA_GRAPHS": "0",
    "MLX_MAX_OPS_PER_BUFFER": "3",  # operations in a batch
    "MLX_MAX_MB_PER_BUFFER": "5",  # what a batch reads at most, if a user switches graphs on
}

if not mx.metal.is_available():  # mlx reads these when the GPU is first used; values set by the user are kept
    if os.environ.get("MLX_USE_CUDA_GRAPHS", "0") != "0":
        del SETTINGS["MLX_MAX_OPS_PER_BUFFER"]
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def without_settings() -> None:
    """Let mlx run as it does in other programs; only before the GPU is first used in this process."""
    for name, value in SETTINGS.items():
        if os.environ.get(name) == value:
            del os.environ[name]


@dataclass(frozen=True)
class Tiles:
    """Tile sizes: `batch` x `heads` sequences, `rows` rows of their scores, `columns` columns per block.

    With `grow`, a tile further up in a causal triangle has fewer columns and, in proportion, more rows.
    """

    batch: int
    heads: int
    rows: int
    columns: int
    grow: bool = False

    def groups(self, batch: int, heads: int) -> Iterator[tuple[slice, slice]]:
        """The (batch, heads) index pairs, group by group."""
        for b in range(0, batch, self.batch):
            for h in range(0, heads, self.heads):
                yield slice(b, min(b + self.batch, batch)), slice(h, min(h + self.heads, heads))

    def row_tiles(self, length: int) -> Iterator[slice]:
        """Row tiles from the last to the first. Under a causal mask no later tile sees the columns that belong to a
        finished tile, so the gradient of these columns is final."""
        if not self.grow:
            for start in reversed(range(0, length, self.rows)):
                yield slice(start, min(start + self.rows, length))
            return
        stop = length
        while stop:
            start = max(0, stop - max(GRAIN, self.rows * length // stop // GRAIN * GRAIN))
            yield slice(start, stop)
            stop = start

    def column_blocks(self, end: int) -> list[slice]:
        """The column blocks of [0, end)."""
        return [slice(c, min(c + self.columns, end)) for c in range(0, end, self.columns)]


def untraced(arrays: Sequence[mx.array]) -> list[mx.array]:
    """`arrays` as constants, so that a compiled function stays fused.

    A compiled function runs operation by operation on arrays that a transformation such as `mx.grad` is tracing.
    The results of a finished transformation are no longer traced, so this takes the vjp of the identity.
    """
    return list(mx.vjp(lambda *a: list(a), list(arrays), list(arrays))[0])


def check_workspace(workspace_bytes: int | None) -> int:
    """The workspace in bytes: the default for None. Raises ValueError unless it is positive."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES
    if workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")
    return int(workspace_bytes)


def in_order(arrays: Sequence[mx.array], after: Sequence[mx.array]) -> list[mx.array]:
    """`arrays` unchanged, but evaluated only after `after`: lazily built tiles then run one after another."""
    return mx.depends(list(arrays), list(after)) if after else list(arrays)


def usable(workspace: int, gpu: bool) -> float:
    """The bytes of a workspace that are left for tiles."""
    return max(workspace - scratch(gpu), workspace / 4)


def scratch(gpu: bool) -> int:
    """The bytes that products take beside their results: on CUDA up to 32 MiB each, with several in flight."""
    return 96 * 2**20 if gpu and not mx.metal.is_available() else 0


def row_sizes(length: int, gpu: bool) -> list[int]:
    """The numbers of rows to try for a tile if there are `length` rows, smallest first."""
    sizes = [8, 16, 32, 64, *range(128, 2049, 64)] if gpu else [8, 16, 32, 64, 128, 256]
    return [r for r in sizes if r < 2 * length] or [1]


def best_tiles(
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    sizes: Sequence[tuple[int, int]],
    held: Callable[[int, int], float],
    budget: float,
    gpu: bool,
) -> Tiles:
    """The tiles that cost least among those that fit `budget`, for scores of `rows` x `columns`.

    Each head of a tile holds `held(tile rows, block columns)` numbers. If nothing fits, a small tile is taken. The
    cost is the elements computed above the diagonal plus the time to launch each block: as much as 7 million
    elements on an H200, very little on a CPU.
    """
    launch = 7e6 if gpu else 5e4

    def cost_of(tile: int, block: int) -> tuple[float, Tiles]:
        sequences = max(1, min(int(budget / held(tile, block)), batch * heads))
        b = max(1, sequences // heads)
        b = ceil_div(batch, ceil_div(batch, b))  # groups of equal size
        h = heads if sequences >= heads else ceil_div(heads, ceil_div(heads, sequences))
        blocks = ceil_div(batch, b) * ceil_div(heads, h) * ceil_div(rows, tile) * ceil_div(columns, block)
        return blocks * launch + batch * heads * rows * tile / 2, Tiles(b, h, tile, block)

    least = next((size for size in sizes if size[0] * columns >= 2**22), sizes[0])  # smaller is too slow
    fit = [size for size in sizes if held(*size) <= budget] or [least]
    return min((cost_of(*size) for size in fit), key=lambda pair: pair[0])[1]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def multiply(gradient: mx.array, cotangent: mx.array) -> mx.array:
    """cotangent * gradient, rounded once to the gradient's dtype; in parts, because the product is float32."""
    if gradient.size <= MULTIPLIED_AT_ONCE or gradient.dtype == mx.float32:
        return (gradient.astype(mx.float32) * cotangent).astype(gradient.dtype)
    flat = gradient.reshape(-1)
    (zero,) = in_order([mx.array(0, gradient.dtype)], [flat])  # else the result exists while `gradient` is computed
    result = mx.broadcast_to(zero, flat.shape)
    for start in range(0, flat.size, MULTIPLIED_AT_ONCE):
        # All parts are written into one array, in place because nothing else reads it: each waits for the one before.
        part = flat[start : start + MULTIPLIED_AT_ONCE].astype(mx.float32) * cotangent
        result[start : start + MULTIPLIED_AT_ONCE] = part.astype(gradient.dtype)
    return result.reshape(gradient.shape)


def first(outputs: Any) -> mx.array:
    """The first output of a custom function (mlx's stubs do not declare its type)."""
    return outputs[0]
