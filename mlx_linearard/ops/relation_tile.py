"""The arithmetic of the relation loss for one tile of rows: the scores S and R, the KL, E, and the products with X.

A tile is some rows of S and R with all the columns that these rows see, held as blocks of columns. The formulas
are in `relation`, which runs the tiles one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx

from .divergence import Blocks, kl_and_error
from .row_kernel import rows_kl
from .tiling import MASKED, in_order


@dataclass(frozen=True)
class Settings:
    """The values that all tiles of one call share."""

    scale_student: float
    scale_teacher: float
    mask: mx.array | None  # (B, T) bool
    causal: bool
    positions: mx.array  # (T,) int32
    half: bool  # the student or the teacher is in half precision
    gpu: bool
    kernel: bool  # the CUDA kernel computes tiles that are held in one block
    scales: mx.array  # (2,) float32, scale_student and scale_teacher: made once, because a GPU copies new arrays
    one: mx.array  # (1,) float32


class RowTile:
    """The rows `rows` of S and R for the vectors `x` and `y`, (b, h, T, D) each, in blocks of columns."""

    def __init__(
        self, settings: Settings, x: mx.array, y: mx.array, batch: slice, rows: slice, blocks: list[slice]
    ) -> None:
        self.settings, self.x, self.y, self.rows, self.blocks = settings, x, y, rows, blocks
        self.valid = None if settings.mask is None else settings.mask[batch]

    def kl_and_errors(self) -> tuple[mx.array, Blocks]:
        """The KL summed over the valid rows, and E block by block; E is 0 in the other rows."""
        if self.settings.kernel and len(self.blocks) == 1:
            return self._by_kernel()
        valid = mx.array(1.0)
        if self.valid is not None:
            valid = self.valid[:, None, self.rows, None].astype(mx.float32)
        s, r = self._scores()
        gpu, half = self.settings.gpu, self.settings.half
        pairs = kl_and_error(s, r, valid, gpu=gpu, by_lse=gpu and half)
        kl = reduce(mx.add, [terms.sum(axis=-1) for terms, _ in pairs])
        return kl.sum(), [error for _, error in pairs]

    def _by_kernel(self) -> tuple[mx.array, Blocks]:
        """`kl_and_errors` of a tile in one block, without a mask."""
        settings, (columns,) = self.settings, self.blocks
        s, r = self._products(self.x, columns), self._products(self.y, columns)
        kl, error = rows_kl(s, r, settings.one, settings.scales, causal=settings.causal)
        return kl.sum(), [error]

    def _products(self, v: mx.array, columns: slice) -> mx.array:
        """Rows of v v^T, float32, unscaled: bf16 inputs are exact in the TF32 of a GPU, scaled ones would not be."""
        rows, others = (v[:, :, at].astype(mx.float32) for at in (self.rows, columns))
        return rows @ others.swapaxes(-1, -2)

    def products(self, errors: Blocks, sums: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """E X, (b, h, rows, Ds), and `sums`, one for each column block, with E^T X of this tile added."""
        x_rows = self.x[:, :, self.rows].astype(mx.float32)
        row_part: mx.array | None = None
        new_sums: list[mx.array] = []
        for k, (columns, error) in enumerate(zip(self.blocks, errors, strict=True)):
            (x,) = in_order([self.x], new_sums[-1:])
            row_part = _add_product(row_part, error, x[:, :, columns].astype(mx.float32))
            new_sums.append(_add_product(sums[k] if sums else None, error.swapaxes(-1, -2), x_rows))
        assert row_part is not None
        return row_part, new_sums

    def _scores(self) -> tuple[Blocks, Blocks]:
        """S and R, block by block, float32, masked."""
        s: Blocks = []
        r: Blocks = []
        for columns in self.blocks:
            x, y = in_order([self.x, self.y], [*s[-1:], *r[-1:]])
            to_scores = self._to_scores(columns)
            for blocks, v, scale in ((s, x, self.settings.scale_student), (r, y, self.settings.scale_teacher)):
                blocks.append(to_scores(self._products(v, columns), mx.array(scale)))
        return s, r

    def _to_scores(self, columns: slice) -> Callable[[mx.array, mx.array], mx.array]:
        """The function from a block of products and a scale to scores, with MASKED where row i may not see column j."""
        gpu, bias = self.settings.gpu, mx.array(0.0)
        if self.valid is not None:
            bias = mx.where(self.valid[:, None, None, columns], 0.0, MASKED)
        if self.settings.causal and columns.stop > self.rows.start + 1:
            i, j = self.settings.positions[self.rows, None], self.settings.positions[columns]
            if gpu:
                return lambda products, scale: _fused_causal(products, scale, bias, i, j)
            bias = bias + mx.where(j <= i, 0.0, MASKED)
        stage = _fused_scaled if gpu else _scaled
        return lambda products, scale: stage(products, scale, bias)


def rounded_sum(
    row_part: mx.array, column_part: mx.array, factor: mx.array, settings: Settings, dtype: mx.Dtype
) -> mx.array:
    """dX in `dtype` from E X and E^T X, both in float32."""
    return (_fused_sum if settings.gpu else _sum)(row_part, column_part, factor).astype(dtype)


# The elementwise stages, fused on a GPU, which then reads and writes a tile once for each.


def _scaled(products, scale, bias):
    return products * scale + bias


def _causal(products, scale, bias, i, j):
    return products * scale + (bias + mx.where(j <= i, 0.0, MASKED))


def _sum(row_part, column_part, factor):
    return (row_part + column_part) * factor


_fused_scaled, _fused_causal, _fused_sum = (mx.compile(stage, shapeless=True) for stage in (_scaled, _causal, _sum))


def _add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    return a @ b if total is None else mx.addmm(total, a, b)
