"""The relation loss of LinearARD (arXiv 2604.00004): the definition, and the same value tile by tile.

For the student's vectors X (B, H, T, Ds) and the teacher's Y (B, H, T, Dt), the relations are

    S = scale_s X X^T,   R = scale_t Y Y^T,   p_s = softmax_j S[i, j],   p_t = softmax_j R[i, j]

over the valid columns j (j <= i when causal), and

    loss = sum over valid rows of KL(p_t[i] || p_s[i]),   E = p_s - p_t,   dX = scale_s (E + E^T) X.

S and R are (B, H, T, T) and never held whole by `relation_kl`: one computation of a tile of rows gives its
log-sum-exp, its KL and its E, so the gradient comes out of the same pass as the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .tiles import FLOAT32, MASKED, Tiles, check_workspace, first, in_order, power_of_two, times

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
    call = _Relation.of(
        student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes
    )
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
        needs_grad: False leaves the gradient out, at less than half the time; the result is then a constant.

    Returns:
        A float32 scalar in nats (a row, for "mean"); 0 when no row is valid.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit together, naming the one that is wrong.
    """
    call = _Relation.of(
        student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes
    )
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
    call = _Relation.of(
        student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes
    )
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
    tiles: Tiles

    @classmethod
    def of(cls, student, teacher, scale_student, scale_teacher, mask, causal, reduction, workspace_bytes):
        _check(student, teacher, mask, reduction)
        batch, heads, length, dim_s = student.shape
        dim_t = teacher.shape[-1]
        return cls(
            batch=batch,
            heads=heads,
            length=length,
            scale_student=dim_s**-0.5 if scale_student is None else float(scale_student),
            scale_teacher=dim_t**-0.5 if scale_teacher is None else float(scale_teacher),
            mask=mask,
            causal=causal,
            reduction=reduction,
            tiles=plan(batch, heads, length, dim_s, dim_t, check_workspace(workspace_bytes)),
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
        done = [mx.array(0.0)] + ([mx.zeros_like(student)] if gradient else [])
        weight = self.weight()
        for b, h in self.tiles.groups(self.batch, self.heads):
            sums: list[mx.array] = []  # column parts of dX, (b, h, columns, Ds) each
            for rows in self.tiles.row_tiles(self.length):
                student, teacher = in_order([student, teacher], [*done, *sums])
                tile = _Tile(self, student[b, h], teacher[b, h], b, rows)
                done, sums = tile.add_to(done, sums, weight, (b, h))
            for columns, part in zip(self.tiles.column_blocks(self.length), sums, strict=False):
                done[1][b, h, columns] = part.astype(student.dtype)
        return done


class _Tile:
    """A tile of rows of S and R, held as blocks of columns."""

    def __init__(self, call: _Relation, x: mx.array, y: mx.array, b: slice, rows: slice):
        self.call, self.x, self.rows = call, x, rows
        self.blocks = call.tiles.column_blocks(rows.stop if call.causal else call.length)
        self.valid = None if call.mask is None else call.mask[b]
        self.x_rows = x[:, :, rows].astype(mx.float32)
        masks = [self._bias(columns) for columns in self.blocks]
        self.scores_s = self._scores(x, self.x_rows, call.scale_student, masks)
        self.scores_t = self._scores(y, y[:, :, rows].astype(mx.float32), call.scale_teacher, masks)

    def _bias(self, columns: slice) -> mx.array | None:
        """What is added to the scores of a block: MASKED where row i must not see column j, else 0."""
        allowed = None
        if self.call.causal and columns.stop > self.rows.start + 1:
            i = mx.arange(self.rows.start, self.rows.stop)[:, None]
            allowed = mx.arange(columns.start, columns.stop)[None, :] <= i
        if self.valid is not None:
            valid = self.valid[:, None, None, columns]
            allowed = valid if allowed is None else allowed & valid
        return None if allowed is None else mx.where(allowed, 0.0, MASKED)

    def _scores(self, v: mx.array, v_rows: mx.array, scale: float, masks: list) -> list[mx.array]:
        """The tile's scores scale * v_rows v^T, block by block, float32."""
        v_rows = v_rows * scale
        scores = [v_rows @ v[:, :, c].astype(mx.float32).swapaxes(-1, -2) for c in self.blocks]
        return [s if bias is None else s + bias for s, bias in zip(scores, masks, strict=True)]

    def add_to(self, done, sums, weight, where) -> tuple[list[mx.array], list[mx.array]]:
        """Add the tile's loss and gradient to what is `done`, and its column parts to `sums`."""
        row_weight = weight if self.valid is None else weight * self.valid[:, None, self.rows, None]
        u_s, z_s, top_s = _exponentials(self.scores_s)
        u_t, z_t, top_t = _exponentials(self.scores_t)
        shift = (top_s + mx.log(z_s)) - (top_t + mx.log(z_t))  # lse_s - lse_t
        kl, errors = mx.array(0.0), []
        for s, r, us, ut in zip(self.scores_s, self.scores_t, u_s, u_t, strict=True):
            p_t = ut / z_t
            error = us / z_s - p_t
            # E sums to zero, so adding it changes nothing but makes errors of lse second order.
            kl = kl + (error - p_t * ((s - r) - shift)).sum(axis=-1, keepdims=True)
            errors.append(error)
        loss = done[0] + (kl * row_weight).sum(axis=(2, 3)).sum()
        if len(done) == 1:
            return [loss], []
        gradient, sums = self._gradient(errors, done[1], sums, row_weight * self.call.scale_student, where)
        return [loss, gradient], sums

    def _gradient(self, errors, gradient, sums, factor, where):
        """Adds this tile's E^T X to the column sums and writes the rows of dX that are final."""
        weighted = self.x_rows * factor
        row_part = mx.array(0.0)
        new_sums = []
        for k, (columns, error) in enumerate(zip(self.blocks, errors, strict=True)):
            row_part = row_part + error @ self.x[:, :, columns].astype(mx.float32)
            part = error.swapaxes(-1, -2) @ weighted
            new_sums.append(sums[k] + part if sums else part)
        row_part = row_part * factor
        if not self.call.causal:  # later tiles still add to these rows
            return gradient, _add_rows(new_sums, self.blocks, self.rows, row_part)
        start = self.rows.start - self.blocks[-1].start
        row_part = row_part + new_sums[-1][:, :, start:]
        new_sums[-1] = new_sums[-1][:, :, :start]
        gradient[(*where, self.rows)] = row_part.astype(gradient.dtype)
        return gradient, new_sums if start else new_sums[:-1]


def _add_rows(sums: list[mx.array], blocks: list[slice], rows: slice, part: mx.array) -> list[mx.array]:
    """Adds `part` to the rows `rows` of a matrix held as the blocks `sums`."""
    k = next(k for k, block in enumerate(blocks) if rows.start < block.stop)
    local = slice(rows.start - blocks[k].start, rows.stop - blocks[k].start)
    return [s.at[:, :, local].add(part) if i == k else s for i, s in enumerate(sums)]


def _exponentials(scores: list[mx.array]) -> tuple[list[mx.array], mx.array, mx.array]:
    """exp(scores - top) block by block, their row sums z, and top, the row maxima."""
    tops = [s.max(axis=-1, keepdims=True) for s in scores]
    top = tops[0]
    for other in tops[1:]:
        top = mx.maximum(top, other)
    exps = [mx.exp(s - top) for s in scores]
    total = exps[0].sum(axis=-1, keepdims=True)
    for other in exps[1:]:
        total = total + other.sum(axis=-1, keepdims=True)
    return exps, total, top


def plan(batch: int, heads: int, length: int, dim_s: int, dim_t: int, workspace: int) -> Tiles:
    """The tiles of one call, so that what they hold at a time stays within `workspace` bytes."""
    budget = workspace / 4
    columns = min(power_of_two(2 * length - 1), 2048)

    def held(rows: int) -> float:
        """float32 numbers that one head holds: scores, exponentials and E; blocks of X and Y; column sums."""
        return (
            5.0 * rows * min(length, 1 << 30)
            + 2.0 * rows * columns
            + (dim_s + dim_t) * (columns + 2 * rows)
            + length * dim_s
        )

    rows = min(columns, 256)
    while rows > 8 and held(rows) * FLOAT32 > budget:
        rows //= 2
    sequences = max(1, int(budget / (held(rows) * FLOAT32)))
    if sequences < heads:
        return Tiles(1, sequences, rows, columns)
    return Tiles(min(batch, sequences // heads), heads, rows, columns)


def _check(student: mx.array, teacher: mx.array, mask: mx.array | None, reduction: str) -> None:
    for name, array in (("student", student), ("teacher", teacher)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be (B, H, T, D), got shape {tuple(array.shape)}")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{name} must be floating, got {array.dtype}")
    if student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            f"student and teacher must agree in B, H, T: {tuple(student.shape)}, {tuple(teacher.shape)}"
        )
    if mask is not None and (
        mask.dtype != mx.bool_ or tuple(mask.shape) != (student.shape[0], student.shape[2])
    ):
        wanted = (student.shape[0], student.shape[2])
        raise ValueError(
            f"mask must be bool of shape (B, T) = {wanted}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
