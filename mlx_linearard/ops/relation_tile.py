"""The arithmetic of the relation loss for one tile of rows: the scores S and R, the KL, E, and the products with X.

A tile is some rows of S and R with all the columns that these rows see, held as blocks of columns. The formulas
are in `relation`, which runs the tiles one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import mlx.core as mx

from .tiling import MASKED, in_order

Blocks = list[mx.array]  # of one tile, (b, h, rows, columns) each


@dataclass(frozen=True)
class Settings:
    """What all tiles of one call share."""

    scale_student: float
    scale_teacher: float
    mask: mx.array | None  # (B, T) bool
    causal: bool
    positions: mx.array  # (T,) int32
    half: bool  # the student or the teacher is in half precision
    gpu: bool


class RowTile:
    """The rows `rows` of S and R for the vectors `x` and `y`, (b, h, T, D) each, in blocks of columns."""

    def __init__(
        self, settings: Settings, x: mx.array, y: mx.array, batch: slice, rows: slice, blocks: list[slice]
    ) -> None:
        self.settings, self.x, self.y, self.rows, self.blocks = settings, x, y, rows, blocks
        self.valid = None if settings.mask is None else settings.mask[batch]

    def kl_and_errors(self) -> tuple[mx.array, Blocks]:
        """The KL summed over the valid rows, and E block by block; E is 0 in the other rows."""
        valid = mx.array(1.0)
        if self.valid is not None:
            valid = self.valid[:, None, self.rows, None].astype(mx.float32)
        s, r = self._scores()
        if self.settings.gpu and self.settings.half:
            pairs = _by_lse(s, r, valid)
        else:
            pairs = _by_exponentials(s, r, valid, self.settings.gpu)
        kl = reduce(mx.add, [terms.sum(axis=-1) for terms, _ in pairs])
        return kl.sum(), [error for _, error in pairs]

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
            # The products are taken unscaled: bf16 inputs are exact in the TF32 of a GPU, scaled ones would not be.
            for blocks, v, scale in ((s, x, self.settings.scale_student), (r, y, self.settings.scale_teacher)):
                rows, others = (v[:, :, at].astype(mx.float32) for at in (self.rows, columns))
                blocks.append(to_scores(rows @ others.swapaxes(-1, -2), mx.array(scale)))
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


def _by_exponentials(s: Blocks, r: Blocks, valid: mx.array, gpu: bool) -> list[tuple[mx.array, mx.array]]:
    """(KL terms, E) of each block, with one exponential per element, the costly operation of a CPU.

    Each row is divided by its own sum, so p_s and p_t are as exact as those of the dense definition.
    """
    differences = [a - b for a, b in zip(s, r, strict=True)]
    u_s, z_s, top_s = _exponentials(s)
    u_t, z_t, top_t = _exponentials(r)
    shift = (top_s + mx.log(z_s)) - (top_t + mx.log(z_t))  # lse_s - lse_t
    w_s, w_t = valid / z_s, valid / z_t
    stage = _fused_from_exponentials if gpu else _from_exponentials
    return [stage(a, b, d, w_s, w_t, shift) for a, b, d in zip(u_s, u_t, differences, strict=True)]


def _exponentials(scores: Blocks) -> tuple[Blocks, mx.array, mx.array]:
    """exp(scores - top) block by block, their row sums, and top, the row maxima."""
    top = reduce(mx.maximum, [s.max(axis=-1, keepdims=True) for s in scores])
    exps = [mx.exp(s - top) for s in scores]
    return exps, reduce(mx.add, [u.sum(axis=-1, keepdims=True) for u in exps]), top


def _by_lse(s: Blocks, r: Blocks, valid: mx.array) -> list[tuple[mx.array, mx.array]]:
    """(KL terms, E) of each block, with the fewest passes over memory, the costly operation of a GPU.

    The rounding of a log-sum-exp changes p_s or p_t as a whole, which is about 2e-6 of the gradient. The rounding
    of half-precision results is larger.
    """
    lse_s, lse_t = (reduce(mx.logaddexp, [mx.logsumexp(b, -1, keepdims=True) for b in v]) for v in (s, r))
    return [_fused_from_lse(a, b, lse_s, lse_t, valid) for a, b in zip(s, r, strict=True)]


def _terms(p_s: mx.array, p_t: mx.array, log_ratio: mx.array) -> tuple[mx.array, mx.array]:
    """The terms of KL(p_t || p_s), and E. E sums to zero, so an error of the lse is of second order in the KL."""
    error = p_s - p_t
    return error - p_t * log_ratio, error


# The elementwise stages. A GPU reads and writes a tile once for each fused stage. Compiling for the CPU would need
# a C++ compiler at run time and gain little. A stage with one output can work in place.


def _from_exponentials(u_s, u_t, difference, w_s, w_t, shift):
    return _terms(u_s * w_s, u_t * w_t, difference - shift)


def _from_lse(s, r, lse_s, lse_t, valid):
    log_s, log_t = s - lse_s, r - lse_t
    return _terms(mx.exp(log_s) * valid, mx.exp(log_t) * valid, log_s - log_t)


def _scaled(products, scale, bias):
    return products * scale + bias


def _causal(products, scale, bias, i, j):
    return products * scale + (bias + mx.where(j <= i, 0.0, MASKED))


def _sum(row_part, column_part, factor):
    return (row_part + column_part) * factor


_fused_from_exponentials, _fused_from_lse, _fused_scaled, _fused_causal, _fused_sum = (
    mx.compile(stage, shapeless=True) for stage in (_from_exponentials, _from_lse, _scaled, _causal, _sum)
)


def _add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    return a @ b if total is None else mx.addmm(total, a, b)
