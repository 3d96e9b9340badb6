"""Tiles of the quadratic parts: how large they are, and that they run one behind another.

mlx is lazy: a loop over tiles only builds a graph, and its evaluation may hold every tile at once. `in_order`
keeps it from that: the inputs of a tile depend on the outputs of the one before. A GPU still accepts work, and so
memory, ahead of what it has done: up to ten batches of operations. On Metal a batch reads some 50 MB, but mlx's
default for a large CUDA card is 1000 MB, so here it is lowered (measured on an H200, a step of 32768 tokens:
14.3 GB by default, 4.1 GB with 50 MB, and faster; on an H100 the relation loss at 4096 tokens took 1039 MiB with
20 MB and 704 with 5, and was faster too).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

WORKSPACE_BYTES = 256 * 2**20
FLOAT32 = 4
AHEAD_MB = 5  # what a batch of operations may read on CUDA
TIMES_AT_ONCE = 1 << 20  # numbers that `times` holds in float32
GRAIN = 8  # rows of a growing tile come in multiples of this
MASKED = -1e30  # a finite minus infinity: exp() of it is 0, differences of it are 0 and never NaN

if not mx.metal.is_available():  # read when the GPU is first used; a value that the user gave stays
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(AHEAD_MB))


@dataclass(frozen=True)
class Tiles:
    """Tile sizes: `batch` x `heads` sequences, `rows` rows of their scores, `columns` columns a block.

    Where they `grow`, tiles further up in a causal triangle, which have fewer columns, get as many more rows.
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
        """Row tiles from the last to the first: under a causal mask the columns of a tile that is done
        are touched by no later one, so their gradient is final."""
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
    """`arrays` as constants that `mx.compile` compiles for.

    On arrays that a transformation such as `mx.grad` is tracing, a compiled function runs operation by operation.
    What a finished transformation returns is not traced any more, hence this one of the identity.
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
    """`arrays` unchanged, but evaluated only after `after`: keeps lazily built tiles one behind another."""
    return mx.depends(list(arrays), list(after)) if after else list(arrays)


def usable(workspace: int, gpu: bool) -> float:
    """The bytes of a workspace that are left for tiles.

    Measured on CUDA: beside the tiles, cuBLAS takes up to 32 MiB for a product, with several in flight.
    """
    scratch = 96 * 2**20 if gpu and not mx.metal.is_available() else 0
    return max(workspace - scratch, workspace / 4)


def row_sizes(length: int, gpu: bool) -> list[int]:
    """The numbers of rows worth trying for a tile of `length` rows, smallest first."""
    sizes = [8, 16, 32, 64, *range(128, 2049, 64)] if gpu else [8, 16, 32, 64, 128, 256]
    return [r for r in sizes if r < 2 * length] or [1]


def fitting(
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    sizes: Sequence[tuple[int, int]],
    held: Callable[[int, int], float],
    budget: float,
    gpu: bool,
) -> Tiles:
    """For scores of `rows` x `columns`: of the tiles that fit `budget`, those that cost least.

    A head of a tile holds `held(tile rows, block columns)`; if nothing fits, a small tile is taken all the
    same. Cost are the elements computed above the diagonal, and the time to launch a block: on an H200 that
    of 7 million elements, on a CPU very little.
    """
    launch = 7e6 if gpu else 5e4

    def of(tile: int, block: int) -> tuple[float, Tiles]:
        sequences = max(1, min(int(budget / held(tile, block)), batch * heads))
        b = max(1, sequences // heads)
        b = ceil_div(batch, ceil_div(batch, b))  # groups of one size
        h = heads if sequences >= heads else ceil_div(heads, ceil_div(heads, sequences))
        blocks = ceil_div(batch, b) * ceil_div(heads, h) * ceil_div(rows, tile) * ceil_div(columns, block)
        return blocks * launch + batch * heads * rows * tile / 2, Tiles(b, h, tile, block)

    least = next((size for size in sizes if size[0] * columns >= 2**22), sizes[0])  # smaller ones would take ages
    fit = [size for size in sizes if held(*size) <= budget] or [least]
    return min((of(*size) for size in fit), key=lambda pair: pair[0])[1]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def times(gradient: mx.array, cotangent: mx.array) -> mx.array:
    """cotangent * gradient, rounded once to the gradient's dtype; in parts, for the product is float32."""
    if gradient.size <= TIMES_AT_ONCE or gradient.dtype == mx.float32:
        return (gradient.astype(mx.float32) * cotangent).astype(gradient.dtype)
    flat = gradient.reshape(-1)
    (zero,) = in_order([mx.array(0, gradient.dtype)], [flat])  # or the result would exist while `gradient` is computed
    result = mx.broadcast_to(zero, flat.shape)
    for start in range(0, flat.size, TIMES_AT_ONCE):
        # Each part waits for the one before by being written to the same array, in place as nothing else reads it.
        part = flat[start : start + TIMES_AT_ONCE].astype(mx.float32) * cotangent
        result[start : start + TIMES_AT_ONCE] = part.astype(gradient.dtype)
    return result.reshape(gradient.shape)


def first(outputs: Any) -> mx.array:
    """The first of a custom function's outputs (mlx's stubs do not tell their type)."""
    return outputs[0]
