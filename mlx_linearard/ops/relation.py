"""The relation loss of LinearARD (arXiv 2604.00004): the definition, and the same value tile by tile.

For the student's vectors X (B, H, T, Ds) and the teacher's Y (B, H, T, Dt), the relations are

    S = scale_s X X^T,   R = scale_t Y Y^T,   p_s = softmax_j S[i, j],   p_t = softmax_j R[i, j]

over the valid columns j (j <= i when causal), and

    loss = sum over valid rows of KL(p_t[i] || p_s[i]),   E = p_s - p_t,   dX = scale_s (E + E^T) X.

S and R are (B, H, T, T) and never held whole by `relation_kl`: one computation of a tile of rows gives its
log-sum-exp, its KL and its E, so the gradient comes out of the same pass as the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import mlx.core as mx

from ..machine import on_gpu
from .tiling import (
    FLOAT32,
    MASKED,
    Tiles,
    ceil_div,
    check_workspace,
    first,
    fitting,
    in_order,
    row_sizes,
    times,
    untraced,
    usable,
)

REDUCTIONS = ("mean", "sum")


def relation_kl_dense(
    student: mx.array,
    teacher: mx.array,
    *,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    mask: mx.array | None = None,
    causal: bool = True,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
) -> mx.array:
    """The definition itself, with the (B, H, T, T) relations in memory. Arguments as in `relation_kl`.

    `workspace_bytes` is accepted and ignored: the oracle takes the memory that the definition takes.
    """
    call = _Relation.of(student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes)
    x, y = student.astype(mx.float32), mx.stop_gradient(teacher).astype(mx.float32)
    allowed = mx.ones((call.length, call.length), dtype=mx.bool_)
    allowed = mx.tril(allowed) if causal else allowed
    valid = call.valid_rows()
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    scores_s = mx.where(allowed, call.scale_student * (x @ x.swapaxes(-1, -2)), MASKED)
    scores_t = mx.where(allowed, call.scale_teacher * (y @ y.swapaxes(-1, -2)), MASKED)
    log_s = scores_s - mx.logsumexp(scores_s, axis=-1, keepdims=True)
    log_t = scores_t - mx.logsumexp(scores_t, axis=-1, keepdims=True)
    divergence = (mx.exp(log_t) * (log_t - log_s)).sum(axis=-1)
    return (divergence * valid[:, None, :]).sum(axis=-1).sum() * call.weight()


def relation_kl(
    student: mx.array,
    teacher: mx.array,
    *,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    mask: mx.array | None = None,
    causal: bool = True,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
    needs_grad: bool = True,
) -> mx.array:
    """KL of the teacher's attention relation to the student's, in a constant workspace.

    The relation loss of LinearARD (arXiv 2604.00004), exact: scores are accumulated and kept in float32
    whatever the dtype of the inputs.

    Args:
        student: X, (B, H, T, Ds), floating; queries, keys or values as attention takes them.
        teacher: Y, (B, H, T, Dt), floating. It gets no gradient.
        scale_student, scale_teacher: factors of the scores; None for Ds^-1/2 and Dt^-1/2.
        mask: (B, T) bool, True for a valid position. Invalid positions are neither rows nor columns.
        causal: whether row i sees only the columns j <= i.
        reduction: "mean" divides the sum by H * (number of valid rows), "sum" does not.
        workspace_bytes: what the tiles may hold beyond inputs, gradient and outputs; None for 256 MiB.
        needs_grad: False leaves the gradient out (half the time on a GPU); the result is then a constant.

    Returns:
        A float32 scalar in nats (a row, for "mean"); 0 when no row is valid.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit together, naming the one that is wrong.
    """
    call = _Relation.of(student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes)
    if not needs_grad:
        return call.run(mx.stop_gradient(student), mx.stop_gradient(teacher), gradient=False)[0]

    @mx.custom_function
    def loss_and_gradient(student: mx.array, teacher: mx.array):
        return call.run(student, teacher)

    @loss_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return times(outputs[1], cotangents[0]), mx.zeros_like(primals[1])

    return first(loss_and_gradient(student, mx.stop_gradient(teacher)))


def relation_kl_with_grad(
    student: mx.array,
    teacher: mx.array,
    *,
    scale_student: float | None = None,
    scale_teacher: float | None = None,
    mask: mx.array | None = None,
    causal: bool = True,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
) -> tuple[mx.array, mx.array]:
    """`relation_kl` and its gradient with respect to `student`, both from one pass and both constants.

    For layers that bring their own vjp. The arguments are those of `relation_kl`.

    Returns:
        (loss, gradient): a float32 scalar, and (B, H, T, Ds) in the student's dtype, accumulated in float32.

    Raises:
        ValueError: as `relation_kl`.
    """
    call = _Relation.of(student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes)
    loss, gradient = call.run(mx.stop_gradient(student), mx.stop_gradient(teacher))
    return loss, gradient


@dataclass(frozen=True)
class _Relation:
    """One call, checked: sizes, scales, mask and the tiles it runs in."""

    batch: int
    heads: int
    length: int
    scale_student: float
    scale_teacher: float
    mask: mx.array | None
    causal: bool
    reduction: str
    dtype: mx.Dtype
    tiles: Tiles
    cast: bool  # not both in float32
    cast_once: bool
    positions: mx.array  # (T,) int32

    @classmethod
    def of(cls, student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes):
        _check(student, teacher, mask, reduction)
        batch, heads, length, dim_s = student.shape
        dim_t = teacher.shape[-1]
        cast = student.dtype != mx.float32 or teacher.dtype != mx.float32
        workspace = check_workspace(workspace_bytes)
        tiles, cast_once = plan(batch, heads, length, dim_s, dim_t, workspace, cast, on_gpu(), causal)
        return cls(
            batch=batch,
            heads=heads,
            length=length,
            scale_student=dim_s**-0.5 if scale_student is None else float(scale_student),
            scale_teacher=dim_t**-0.5 if scale_teacher is None else float(scale_teacher),
            mask=mask,
            causal=causal,
            reduction=reduction,
            dtype=student.dtype,
            tiles=tiles,
            cast=cast,
            cast_once=cast_once,
            positions=mx.arange(length),
        )

    def valid_rows(self) -> mx.array:
        """(B, T) float32: 1 for valid rows, 0 for the rest."""
        if self.mask is None:
            return mx.ones((self.batch, self.length))
        return self.mask.astype(mx.float32)

    def weight(self) -> mx.array:
        """The factor of a row's KL in the loss, a float32 scalar."""
        if self.reduction == "sum":
            return mx.array(1.0)
        return 1.0 / (self.heads * mx.maximum(self.valid_rows().sum(), 1.0))

    def run(self, student: mx.array, teacher: mx.array, gradient: bool = True) -> list[mx.array]:
        """The loss and, where asked for, the gradient: [loss] or [loss, dX]."""
        student, teacher = untraced([student, teacher])
        total, weight = mx.array(0.0), self.weight()
        d_x = [mx.zeros_like(student)] if gradient else []
        for b, h in self.tiles.groups(self.batch, self.heads):
            x, y = in_order([student, teacher], [total, *d_x])
            x, y = x[b, h], y[b, h]
            if self.cast_once:
                x, y = x.astype(mx.float32), y.astype(mx.float32)
            total, parts = self._group(x, y, b, total, weight * self.scale_student, gradient)
            if gradient:  # once a group: an array that something else still reads is copied when written to
                d_x[0][b, h] = mx.concatenate(parts, axis=2)
        return [total * weight, *d_x]

    def _group(self, x, y, b, total, factor, gradient) -> tuple[mx.array, list[mx.array]]:
        """`total` with the KL of some heads added, and their dX in parts from the first rows to the last."""
        parts: list[mx.array] = []
        sums: list[mx.array] = []  # E^T X of the rows so far, (b, h, columns, Ds) for each column block
        for rows in self.tiles.row_tiles(self.length):
            x, y = in_order([x, y], [total, *parts[:1], *sums])
            tile = _Rows(self, x, y, b, rows)
            kl, errors = tile.kl_and_errors()
            total = total + kl
            if not gradient:
                continue
            row_part, sums = tile.products(errors, sums)
            if self.causal:  # no earlier row sees these columns: their sum is final
                column_part, sums = _split(sums, rows.start, self.tiles.columns)
                row_part = self._rounded(row_part, column_part, factor)
            parts.insert(0, row_part)
        if sums:
            row_part, column_part = (mx.concatenate(part, axis=2) for part in (parts, sums))
            parts = [self._rounded(row_part, column_part, factor)]
        return total, parts

    def _rounded(self, row_part: mx.array, column_part: mx.array, factor: mx.array) -> mx.array:
        """dX in the student's dtype from E X and E^T X."""
        return (_fused_sum if on_gpu() else _sum)(row_part, column_part, factor).astype(self.dtype)


class _Rows:
    """A tile of rows of S and R, held as blocks of columns."""

    def __init__(self, call: _Relation, x: mx.array, y: mx.array, b: slice, rows: slice):
        self.call, self.x, self.y, self.rows = call, x, y, rows
        self.blocks = call.tiles.column_blocks(rows.stop if call.causal else call.length)
        self.valid = None if call.mask is None else call.mask[b]

    def kl_and_errors(self) -> tuple[mx.array, list[mx.array]]:
        """The sum of the KL of the tile's valid rows, and their E, block by block; 0 for the other rows."""
        valid = mx.array(1.0)
        if self.valid is not None:
            valid = self.valid[:, None, self.rows, None].astype(mx.float32)
        s, r = self._scores()
        pairs = _by_lse(s, r, valid) if on_gpu() and self.call.cast else _by_exponentials(s, r, valid)
        kl = reduce(mx.add, [terms.sum(axis=-1) for terms, _ in pairs])
        return kl.sum(), [error for _, error in pairs]

    def products(self, errors: list[mx.array], sums: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """E X, (b, h, rows, Ds), and E^T X of each column block added to what `sums` has for it."""
        x_rows = self.x[:, :, self.rows].astype(mx.float32)
        row_part: mx.array | None = None
        new_sums: list[mx.array] = []
        for k, (columns, error) in enumerate(zip(self.blocks, errors, strict=True)):
            (x,) = in_order([self.x], new_sums[-1:])
            row_part = _plus_product(row_part, error, x[:, :, columns].astype(mx.float32))
            new_sums.append(_plus_product(sums[k] if sums else None, error.swapaxes(-1, -2), x_rows))
        assert row_part is not None
        return row_part, new_sums

    def _scores(self) -> tuple[list[mx.array], list[mx.array]]:
        """S and R, block by block, float32, masked."""
        s: list[mx.array] = []
        r: list[mx.array] = []
        for columns in self.blocks:
            x, y = in_order([self.x, self.y], [*s[-1:], *r[-1:]])
            as_scores = self._as_scores(columns)
            # Unscaled: bf16 inputs are exact in the TF32 of a GPU's products, scaled ones would not be.
            for blocks, v, scale in ((s, x, self.call.scale_student), (r, y, self.call.scale_teacher)):
                rows, others = (v[:, :, at].astype(mx.float32) for at in (self.rows, columns))
                blocks.append(as_scores(rows @ others.swapaxes(-1, -2), mx.array(scale)))
        return s, r

    def _as_scores(self, columns: slice) -> Callable[[mx.array, mx.array], mx.array]:
        """What turns a block of products into scores: scaled, with MASKED where row i must not see column j."""
        bias = mx.array(0.0)
        if self.valid is not None:
            bias = mx.where(self.valid[:, None, None, columns], 0.0, MASKED)
        if self.call.causal and columns.stop > self.rows.start + 1:
            i, j = self.call.positions[self.rows, None], self.call.positions[columns]
            if on_gpu():
                return lambda products, scale: _fused_causal(products, scale, bias, i, j)
            bias = bias + mx.where(j <= i, 0.0, MASKED)
        stage = _fused_scaled if on_gpu() else _scaled
        return lambda products, scale: stage(products, scale, bias)


def _by_exponentials(s: list[mx.array], r: list[mx.array], valid: mx.array) -> list[tuple[mx.array, mx.array]]:
    """(KL terms, E) of each block, with one exponential an element, the costly operation of a CPU.

    Rows are divided by their own sums, so that p_s and p_t are as exact as the dense definition's.
    """
    differences = [a - b for a, b in zip(s, r, strict=True)]
    u_s, z_s, top_s = _exponentials(s)
    u_t, z_t, top_t = _exponentials(r)
    shift = (top_s + mx.log(z_s)) - (top_t + mx.log(z_t))  # lse_s - lse_t
    w_s, w_t = valid / z_s, valid / z_t
    stage = _fused_from_exponentials if on_gpu() else _from_exponentials
    return [stage(a, b, d, w_s, w_t, shift) for a, b, d in zip(u_s, u_t, differences, strict=True)]


def _exponentials(scores: list[mx.array]) -> tuple[list[mx.array], mx.array, mx.array]:
    """exp(scores - top) block by block, their row sums, and top, the row maxima."""
    top = reduce(mx.maximum, [s.max(axis=-1, keepdims=True) for s in scores])
    exps = [mx.exp(s - top) for s in scores]
    return exps, reduce(mx.add, [u.sum(axis=-1, keepdims=True) for u in exps]), top


def _by_lse(s: list[mx.array], r: list[mx.array], valid: mx.array) -> list[tuple[mx.array, mx.array]]:
    """(KL terms, E) of each block, with the fewest passes over memory, the costly operation of a GPU.

    The rounding of the log-sum-exps is an error of p_s and p_t each, not of E: some 2e-6 of the gradient, which
    half-precision results round away.
    """
    lse_s, lse_t = (reduce(mx.logaddexp, [mx.logsumexp(b, -1, keepdims=True) for b in v]) for v in (s, r))
    return [_fused_from_lse(a, b, lse_s, lse_t, valid) for a, b in zip(s, r, strict=True)]


def _terms(p_s: mx.array, p_t: mx.array, log_ratio: mx.array) -> tuple[mx.array, mx.array]:
    """The terms of KL(p_t || p_s), and E. That E sums to zero makes errors of the lse second order."""
    error = p_s - p_t
    return error - p_t * log_ratio, error


# The elementwise stages. A GPU reads and writes a tile once for each of the fused ones; compiling for the CPU
# would need a C++ compiler at run time and gain little. A stage with one output can work in place.


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


def _plus_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    return a @ b if total is None else mx.addmm(total, a, b)


def _split(sums: list[mx.array], start: int, columns: int) -> tuple[mx.array, list[mx.array]]:
    """The column sums from `start` on, all in the last block, and those before."""
    *before, last = sums
    local = start - len(before) * columns
    return last[:, :, local:], [*before, last[:, :, :local]] if local else before


def plan(
    batch: int, heads: int, length: int, dim_s: int, dim_t: int, workspace: int, cast: bool, gpu: bool, causal: bool
) -> tuple[Tiles, bool]:
    """The tiles of one call, and whether a group of heads is cast to float32 once rather than block by block."""
    budget, dims = usable(workspace, gpu) / FLOAT32, dim_s + dim_t
    cast_once = cast and 4 * length * dims < budget

    def held(rows: int, columns: int) -> float:
        return held_by_head(rows, columns, length, dim_s, dim_t, cast, cast_once, gpu)

    one_block = gpu and (cast_once or not cast)
    width = length if one_block else 8192 if gpu else 2048
    sizes = [(rows, rows * ceil_div(width, rows)) for rows in row_sizes(length, gpu)]
    tiles = fitting(batch, heads, length, length, sizes, held, budget, gpu)
    return replace(tiles, grow=one_block and causal), cast_once


def held_by_head(
    rows: int, columns: int, length: int, dim_s: int, dim_t: int, cast: bool, cast_once: bool, gpu: bool
) -> float:
    """float32 numbers that the workspace holds for each head of a group, with tiles of `rows` and `columns`.

    Its finished gradient, its float32 copy where it is cast once, the running sums of E^T X (old and new), the
    float32 copies of a block of X and Y, and the tiles of rows: on the CPU one with S, R and their exponentials;
    on a GPU two, being done and being launched, of S, R, E and the terms of the KL each, and what is not yet
    released of a third (measured: up to 9.3 arrays together); in float32 also of S - R.
    """
    dims, columns = dim_s + dim_t, min(columns, length)
    tile = (9.5 if cast else 12) * rows * length if gpu else 7 * rows * length + 2 * rows * columns
    copies = (length if cast_once else 3 * columns if cast else 0) * dims
    return tile + 3 * rows * dims + copies + 3 * length * dim_s


def _check(student: mx.array, teacher: mx.array, mask: mx.array | None, reduction: str) -> None:
    for name, array in (("student", student), ("teacher", teacher)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be (B, H, T, D), got shape {tuple(array.shape)}")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if student.shape[:3] != teacher.shape[:3]:
        raise ValueError(f"student and teacher must agree in B, H, T: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if mask is not None and (mask.dtype != mx.bool_ or tuple(mask.shape) != (student.shape[0], student.shape[2])):
        wanted = (student.shape[0], student.shape[2])
        raise ValueError(f"mask must be bool of shape (B, T) = {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
