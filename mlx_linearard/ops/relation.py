"""The relation loss of LinearARD (arXiv 2604.00004): the definition, and the same value tile by tile.

For the student's vectors X (B, H, T, Ds) and the teacher's Y (B, H, T, Dt), the relations are

    S = scale_s X X^T,   R = scale_t Y Y^T,   p_s = softmax_j S[i, j],   p_t = softmax_j R[i, j]

over the valid columns j (j <= i when causal), and

    loss = sum over valid rows of KL(p_t[i] || p_s[i]),   E = p_s - p_t,   dX = scale_s (E + E^T) X.

S and R are (B, H, T, T). `relation_kl` never holds all of them: one computation of a tile of rows gives its
log-sum-exp, its KL and its E, so one pass gives the loss and the gradient. `relation_tile` is the arithmetic of
a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from ..machine import on_gpu
from . import row_kernel
from .relation_tile import RowTile, Settings, rounded_sum
from .tiling import (
    FLOAT32,
    MASKED,
    Tiles,
    best_tiles,
    ceil_div,
    check_workspace,
    first,
    in_order,
    multiply,
    row_sizes,
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
    """The definition itself, with the (B, H, T, T) relations in memory. The arguments are those of `relation_kl`.

    `workspace_bytes` is accepted and ignored.
    """
    call = _Relation.of(student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes)
    x, y = student.astype(mx.float32), mx.stop_gradient(teacher).astype(mx.float32)
    allowed = mx.ones((call.length, call.length), dtype=mx.bool_)
    allowed = mx.tril(allowed) if causal else allowed
    valid = call.valid_rows()
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    scores_s = mx.where(allowed, call.settings.scale_student * (x @ x.swapaxes(-1, -2)), MASKED)
    scores_t = mx.where(allowed, call.settings.scale_teacher * (y @ y.swapaxes(-1, -2)), MASKED)
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

    The relation loss of LinearARD (arXiv 2604.00004), exact: scores are computed and kept in float32 for inputs
    of every dtype.

    Args:
        student: X, (B, H, T, Ds), floating; queries, keys or values as attention takes them.
        teacher: Y, (B, H, T, Dt), floating. It gets no gradient.
        scale_student, scale_teacher: factors of the scores; None for Ds^-1/2 and Dt^-1/2.
        mask: (B, T) bool, True for a valid position. Invalid positions are neither rows nor columns.
        causal: whether row i sees only the columns j <= i.
        reduction: "mean" divides the sum by H * (number of valid rows), "sum" does not.
        workspace_bytes: the most memory for tiles, beyond inputs, gradient and outputs; None for 256 MiB.
        needs_grad: False computes no gradient, in half the time on a GPU; the result is then a constant.

    Returns:
        A float32 scalar in nats, per row for "mean"; 0 if no row is valid.

    Raises:
        ValueError: if shapes, dtypes or options are wrong or do not fit together; the message names the wrong one.

    >>> teacher = mx.random.normal((1, 2, 64, 16), key=mx.random.key(0))
    >>> relation_kl(teacher, teacher).item()
    0.0
    >>> relation_kl(teacher * 2, teacher).item() > 0
    True
    """
    call = _Relation.of(student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes)
    if not needs_grad:
        return call.run(mx.stop_gradient(student), mx.stop_gradient(teacher), gradient=False)[0]

    @mx.custom_function
    def loss_and_gradient(student: mx.array, teacher: mx.array):
        return call.run(student, teacher)

    @loss_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return multiply(outputs[1], cotangents[0]), mx.zeros_like(primals[1])

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
    """`relation_kl` and its gradient with respect to `student`, from one pass. Both are constants.

    For a layer that has a vjp of its own. The arguments are those of `relation_kl`.

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
    """One call, checked: its sizes, its settings and its tiles."""

    batch: int
    heads: int
    length: int
    reduction: str
    dtype: mx.Dtype  # of the student
    settings: Settings
    tiles: Tiles
    cast_once: bool

    @classmethod
    def of(cls, student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes):
        _check(student, teacher, mask, reduction)
        batch, heads, length, dim_s = student.shape
        dim_t = teacher.shape[-1]
        scale_student = dim_s**-0.5 if scale_student is None else float(scale_student)
        scale_teacher = dim_t**-0.5 if scale_teacher is None else float(scale_teacher)
        settings = Settings(
            scale_student=scale_student,
            scale_teacher=scale_teacher,
            mask=mask,
            causal=causal,
            positions=mx.arange(length),
            half=student.dtype != mx.float32 or teacher.dtype != mx.float32,
            gpu=on_gpu(),
            kernel=mask is None and row_kernel.usable(length, mx.float32, causal=causal),
            scales=mx.array([scale_student, scale_teacher]),
            one=mx.array([1.0]),
        )
        workspace = check_workspace(workspace_bytes)
        sizes = (batch, heads, length, dim_s, dim_t)
        tiles, cast_once = choose_tiles(*sizes, workspace, settings.half, settings.gpu, causal, settings.kernel)
        return cls(batch, heads, length, reduction, student.dtype, settings, tiles, cast_once)

    def valid_rows(self) -> mx.array:
        """(B, T) float32: 1 for valid rows, 0 for the rest."""
        if self.settings.mask is None:
            return mx.ones((self.batch, self.length))
        return self.settings.mask.astype(mx.float32)

    def weight(self) -> mx.array:
        """The factor of a row's KL in the loss, a float32 scalar."""
        if self.reduction == "sum":
            return mx.array(1.0)
        return 1.0 / (self.heads * mx.maximum(self.valid_rows().sum(), 1.0))

    def run(self, student: mx.array, teacher: mx.array, gradient: bool = True) -> list[mx.array]:
        """[loss, dX], or [loss] without `gradient`."""
        student, teacher = untraced([student, teacher])
        total, weight = mx.array(0.0), self.weight()
        d_x = [mx.zeros_like(student)] if gradient else []
        for b, h in self.tiles.groups(self.batch, self.heads):
            x, y = in_order([student, teacher], [total, *d_x])
            x, y = x[b, h], y[b, h]
            if self.cast_once:
                x, y = x.astype(mx.float32), y.astype(mx.float32)
            total, parts = self._group(x, y, b, total, weight * self.settings.scale_student, gradient)
            if gradient:  # once per group: mlx copies an array that is written to while something still reads it
                d_x[0][b, h] = mx.concatenate(parts, axis=2)
        return [total * weight, *d_x]

    def _group(self, x, y, b, total, factor, gradient) -> tuple[mx.array, list[mx.array]]:
        """`total` plus the KL of some heads, and the dX of these heads in parts, from the first rows to the last."""
        parts: list[mx.array] = []
        sums: list[mx.array] = []  # E^T X of the rows so far, (b, h, columns, Ds) for each column block
        for rows in self.tiles.row_tiles(self.length):
            x, y = in_order([x, y], [total, *parts[:1], *sums])
            seen = rows.stop if self.settings.causal else self.length
            tile = RowTile(self.settings, x, y, b, rows, self.tiles.column_blocks(seen))
            kl, errors = tile.kl_and_errors()
            total = total + kl
            if not gradient:
                continue
            row_part, sums = tile.products(errors, sums)
            if self.settings.causal:  # no earlier row sees these columns: their sum is final
                column_part, sums = _split(sums, rows.start, self.tiles.columns)
                row_part = self._rounded(row_part, column_part, factor)
            parts.insert(0, row_part)
        if sums:
            row_part, column_part = (mx.concatenate(part, axis=2) for part in (parts, sums))
            parts = [self._rounded(row_part, column_part, factor)]
        return total, parts

    def _rounded(self, row_part: mx.array, column_part: mx.array, factor: mx.array) -> mx.array:
        return rounded_sum(row_part, column_part, factor, self.settings, self.dtype)


def _split(sums: list[mx.array], start: int, columns: int) -> tuple[mx.array, list[mx.array]]:
    """The column sums from `start` on, which are all in the last block, and the sums before `start`."""
    *before, last = sums
    local = start - len(before) * columns
    return last[:, :, local:], [*before, last[:, :, :local]] if local else before


def choose_tiles(
    batch: int,
    heads: int,
    length: int,
    dim_s: int,
    dim_t: int,
    workspace: int,
    half: bool,
    gpu: bool,
    causal: bool,
    kernel: bool = False,
) -> tuple[Tiles, bool]:
    """The tiles of one call, and whether a group of heads is cast to float32 once instead of block by block."""
    budget, dims = usable(workspace, gpu) / FLOAT32, dim_s + dim_t
    cast_once = half and 4 * length * dims < budget

    def held(rows: int, columns: int) -> float:
        return _numbers_per_head(rows, columns, length, dim_s, dim_t, half, cast_once, gpu, kernel)

    one_block = gpu and (cast_once or not half)
    width = length if one_block else 8192 if gpu else 2048
    sizes = [(rows, rows * ceil_div(width, rows)) for rows in row_sizes(length, gpu)]
    tiles = best_tiles(batch, heads, length, length, sizes, held, budget, gpu)
    return replace(tiles, grow=one_block and causal), cast_once


def peak_bytes(
    batch: int, heads: int, length: int, dim_s: int, dim_t: int, workspace: int, half: bool, gpu: bool
) -> int:
    """The most memory that the tiles of one causal call hold, in bytes. `half`: an input is in half precision."""
    kernel = gpu and row_kernel.usable(length, mx.float32, causal=True)
    tiles, cast_once = choose_tiles(batch, heads, length, dim_s, dim_t, workspace, half, gpu, True, kernel)
    rows = min(tiles.rows, length)
    numbers = _numbers_per_head(rows, tiles.columns, length, dim_s, dim_t, half, cast_once, gpu, kernel)
    return int(FLOAT32 * tiles.batch * tiles.heads * numbers)


def _numbers_per_head(
    rows: int,
    columns: int,
    length: int,
    dim_s: int,
    dim_t: int,
    half: bool,
    cast_once: bool,
    gpu: bool,
    kernel: bool,
) -> float:
    """How many float32 numbers each head of a group holds, with tiles of `rows` rows and `columns` columns.

    These are the finished gradient, the running sums of E^T X (old and new), the float32 copies of X and Y (of all
    positions if cast once, else of a block), and the tiles of rows. On the CPU one tile is held: S, R and their
    exponentials.
    """
    dims, columns = dim_s + dim_t, min(columns, length)
    tile = _gpu_arrays(half, kernel) * rows * length if gpu else 7 * rows * length + 2 * rows * columns
    copies = (length if cast_once else 3 * columns if half else 0) * dims
    return tile + 3 * rows * dims + copies + 3 * length * dim_s


def _gpu_arrays(half: bool, kernel: bool) -> float:
    """How many arrays as large as a tile a GPU holds.

    These are two tiles, one running and one being launched, and arrays that are not yet released. A tile is S, R and
    E, without the CUDA kernel also the KL terms (9.3 arrays together were measured), and in float32 also S - R. With
    the kernel mlx runs further ahead: on an H100 15 to 20 arrays were measured where there are many tiles.
    """
    return 16 if kernel else 9.5 if half else 12


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
