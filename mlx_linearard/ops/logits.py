"""Losses and comparisons over the vocabulary, some positions at a time, so that few of the (T, V) logits exist at once.

A `head` is any callable from hidden states (1, C, D) to logits (1, C, V): final norm, output projection, soft
cap, quantized or not. It is frozen: only the hidden states get a gradient. The gradient of a chunk of positions is
computed together with its loss, so the backward pass only multiplies by the cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from ..machine import on_gpu
from . import row_kernel
from .divergence import HALF, kl_and_error, kl_terms
from .tiling import FLOAT32, ceil_div, check_workspace, first, in_order, multiply, untraced

Head = Callable[[mx.array], mx.array]
REDUCTIONS = ("mean", "sum")


class Arrays(NamedTuple):
    """How many float32 arrays of (chunk, vocabulary) an operation holds at its fullest moment."""

    assumed: float  # for the size of a chunk
    several: float  # measured with several chunks, of which two or three are in flight
    one: float  # measured with one chunk


def kl_arrays(*, half: bool, gpu: bool) -> Arrays:
    """For `logits_kl`, with logits in half precision or in float32."""
    if not (gpu and half):
        return Arrays(15, 13.5, 7)
    return Arrays(7, 6, 3) if row_kernel.on_cuda() else Arrays(9, 9, 5)


def cross_entropy_arrays(*, half: bool, gpu: bool) -> Arrays:
    """For `cross_entropy`, with logits in half precision or in float32."""
    return Arrays(4, 3.5, 2) if gpu and half else Arrays(10, 9.7, 4)


def _compared_arrays(*, half: bool, gpu: bool) -> Arrays:
    return kl_arrays(half=half, gpu=gpu)


def _nll_arrays(*, half: bool, gpu: bool) -> Arrays:
    return Arrays(3, 2.5, 1) if gpu and half else Arrays(8, 6, 2)


class TokenScores(NamedTuple):
    """The results of `token_scores`, one per position, each (B, T)."""

    nll: mx.array  # float32
    first: mx.array  # bool
    finite: mx.array  # bool


class LogitsDifference(NamedTuple):
    """The results of `compare_logits`, one per position, each (B, T)."""

    nll: mx.array | None  # float32
    kl: mx.array  # float32
    agreement: mx.array  # bool


def logits_kl(
    student_hidden: mx.array,
    teacher_hidden: mx.array,
    student_head: Head,
    teacher_head: Head,
    *,
    mask: mx.array | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
) -> mx.array:
    """KL(teacher || student) of the next-token distributions; only `student_hidden` gets a gradient.

    Args:
        student_hidden, teacher_hidden: (B, T, D) and (B, T, D'), the inputs of the heads.
        student_head, teacher_head: functions from hidden states to logits over the same vocabulary.
        mask: (B, T) bool, True for a position that counts.
        temperature: both logits are divided by it. The KL is multiplied by its square, which keeps the size of the
            gradient.
        reduction: "mean" divides by the number of positions that count, "sum" does not.
        workspace_bytes: the most memory for chunks; None for 256 MiB. A chunk has at least one position.

    Returns:
        A float32 scalar in nats, per position for "mean"; 0 if no position counts.

    Raises:
        ValueError: if shapes or options are wrong or do not fit together.
    """
    _check_positions(student_hidden, teacher_hidden=teacher_hidden, mask=mask)
    _check_options(reduction, temperature)
    positions = _Positions.of(student_hidden, student_head, kl_arrays, workspace_bytes)
    weights, scales = positions.weights(mask, reduction), mx.array([1 / temperature, 1 / temperature])

    @mx.custom_function
    def loss_and_gradient(student: mx.array, teacher: mx.array):
        def of_chunk(student, teacher, weights):
            loss, error = _kl(student_head(student), teacher_head(teacher), weights, temperature, scales)
            return loss, mx.vjp(student_head, [student], [error])[1][0]

        return positions.sum_with_gradient(of_chunk, student, teacher, weights)

    @loss_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return multiply(outputs[1], cotangents[0]), mx.zeros_like(primals[1])

    return first(loss_and_gradient(student_hidden, mx.stop_gradient(teacher_hidden)))


def cross_entropy(
    hidden: mx.array,
    head: Head,
    targets: mx.array,
    *,
    mask: mx.array | None = None,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
) -> mx.array:
    """Negative log-likelihood of `targets` (B, T) under head(hidden); `hidden` (B, T, D) gets a gradient.

    mask may also hold float32 weights; with reduction "sum" they multiply the positions. The other arguments, the
    result and the errors are those of `logits_kl`.
    """
    _check_positions(hidden, targets=targets, mask=mask)
    _check_options(reduction)
    positions = _Positions.of(hidden, head, cross_entropy_arrays, workspace_bytes)
    weights = positions.weights(mask, reduction)

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array):
        def of_chunk(hidden, targets, weights):
            loss, error = _cross_entropy(head(hidden), targets, weights)
            return loss, mx.vjp(head, [hidden], [error])[1][0]

        return positions.sum_with_gradient(of_chunk, hidden, targets, weights)

    @loss_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return multiply(outputs[1], cotangents[0])

    return first(loss_and_gradient(hidden))


def gain_cross_entropy(
    hidden: mx.array,
    head: Head,
    targets: mx.array,
    baseline: mx.array,
    *,
    limit: float = 5.0,
    workspace_bytes: int | None = None,
) -> mx.array:
    """Cross-entropy with more weight on tokens that gain over a baseline: sum(w nll) / sum(w).

    w = min(exp(baseline - nll), limit) is a constant for the gradient: a token is worth the number of times that it
    is more likely than under the baseline (LongCE, arXiv 2410.23771, which does not divide by sum(w)).

    Args:
        hidden, head, targets, workspace_bytes: those of `cross_entropy`.
        baseline: (B, T) float32, another negative log-likelihood of each target.
        limit: the largest weight.
    """
    _check_positions(hidden, targets=targets, baseline=baseline)
    positions = _Positions.of(hidden, head, cross_entropy_arrays, workspace_bytes)

    @mx.custom_function
    def sums_and_gradient(hidden: mx.array):
        def of_chunk(hidden, targets, baseline):
            logits = head(hidden)
            weights = mx.minimum(mx.exp(baseline - _nll(logits, targets)), limit)
            loss, error = _cross_entropy(logits, targets, weights)
            return mx.stack([loss, weights.sum()]), mx.vjp(head, [hidden], [error])[1][0]

        sums, gradient = positions.sum_with_gradient(of_chunk, hidden, targets, baseline)
        total = mx.maximum(sums[1], 1e-30)
        return sums[0] / total, gradient, total

    @sums_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return multiply(outputs[1], cotangents[0] / outputs[2])

    return first(sums_and_gradient(hidden))


def token_nll(hidden: mx.array, head: Head, targets: mx.array, *, workspace_bytes: int | None = None) -> mx.array:
    """Negative log-likelihood of each of `targets` (B, T), in nats, float32 (B, T); no gradient."""
    _check_positions(hidden, targets=targets)

    def of_chunk(hidden, targets):
        return [_nll(head(hidden), targets)]

    positions = _Positions.of(hidden, head, _nll_arrays, workspace_bytes)
    return positions.each(of_chunk, [mx.float32], hidden, targets)[0]


def token_scores(hidden: mx.array, head: Head, targets: mx.array, *, workspace_bytes: int | None = None) -> TokenScores:
    """How likely each of `targets` (B, T) is; no gradient.

    Returns:
        nll: its negative log-likelihood in nats.
        first: whether it is the most likely token.
        finite: whether the largest logit is a finite number.
    """
    _check_positions(hidden, targets=targets)

    def of_chunk(hidden, targets):
        logits = head(hidden)
        first = mx.argmax(logits, axis=-1) == targets
        return [_nll(logits, targets), first, mx.isfinite(logits.max(axis=-1))]

    positions = _Positions.of(hidden, head, _nll_arrays, workspace_bytes)
    return TokenScores(*positions.each(of_chunk, [mx.float32, mx.bool_, mx.bool_], hidden, targets))


def compare_logits(
    student_hidden: mx.array,
    teacher_hidden: mx.array,
    student_head: Head,
    teacher_head: Head,
    targets: mx.array | None = None,
    *,
    workspace_bytes: int | None = None,
) -> LogitsDifference:
    """Student against teacher at each position, without a gradient.

    Returns:
        nll: the student's negative log-likelihood of `targets` in nats; None without targets.
        kl: KL(teacher || student) in nats.
        agreement: whether both have the same most likely token (top-1 agreement).
    """
    _check_positions(student_hidden, teacher_hidden=teacher_hidden, targets=targets)

    def of_chunk(student, teacher, *targets):
        student, teacher = student_head(student), teacher_head(teacher)
        same = mx.argmax(student, axis=-1) == mx.argmax(teacher, axis=-1)
        return [_kl_each(student, teacher), same, *(_nll(student, t) for t in targets)]

    inputs = [student_hidden, teacher_hidden] + ([] if targets is None else [targets])
    dtypes = [mx.float32, mx.bool_] + ([] if targets is None else [mx.float32])
    positions = _Positions.of(student_hidden, student_head, _compared_arrays, workspace_bytes)
    kl, same, *nll = positions.each(of_chunk, dtypes, *inputs)
    return LogitsDifference(nll[0] if nll else None, kl, same)


def peak_bytes(arrays: Arrays, positions: int, vocabulary: int, *, workspace: int) -> int:
    """The most memory that the chunks of an operation with a gradient hold, in bytes."""
    chunk = _chunk_size(workspace, arrays.assumed, vocabulary, positions)
    held = arrays.several if chunk < positions else arrays.one
    return int(chunk * held * vocabulary * FLOAT32)


def _chunk_size(workspace: int, arrays: float, vocabulary: int, positions: int) -> int:
    """Positions per chunk: as many as `arrays` float32 arrays over the vocabulary allow, in equal chunks."""
    most = max(1, int(workspace / (arrays * vocabulary * FLOAT32)))
    return ceil_div(positions, ceil_div(positions, most))


class _Positions(NamedTuple):
    """The positions of a call, as one row, and the number of positions per chunk."""

    batch: int
    length: int
    chunk: int

    @classmethod
    def of(cls, hidden: mx.array, head: Head, arrays: Callable[..., Arrays], workspace_bytes: int | None) -> _Positions:
        """Chunks so small that the arrays of the operation fit the workspace."""
        batch, length = hidden.shape[:2]
        if batch * length == 0:
            raise ValueError(f"there are no positions in hidden states of shape {tuple(hidden.shape)}")
        logits = head(hidden[:1, :1])  # mlx knows shape and dtype without computing
        held = arrays(half=logits.dtype in HALF, gpu=on_gpu()).assumed
        workspace = check_workspace(workspace_bytes)
        return cls(batch, length, _chunk_size(workspace, held, logits.shape[-1], batch * length))

    def weights(self, mask: mx.array | None, reduction: str) -> mx.array:
        """(B, T) float32: the factor of each position in the loss."""
        counted = mx.ones((self.batch, self.length)) if mask is None else mask.astype(mx.float32)
        return counted if reduction == "sum" else counted / mx.maximum(counted.sum(), 1.0)

    def slices(self):
        for start in range(0, self.batch * self.length, self.chunk):
            yield slice(start, min(start + self.chunk, self.batch * self.length))

    def flat(self, arrays) -> list[mx.array]:
        """(B, T, ...) to (1, B * T, ...)."""
        return [a.reshape(1, -1, *a.shape[2:]) for a in arrays]

    def sum_with_gradient(self, of_chunk, hidden: mx.array, *others: mx.array) -> tuple[mx.array, mx.array]:
        """The sum of the losses of the chunks, and their gradients with respect to `hidden`, joined."""
        arrays = self.flat(_constants([hidden, *others]))
        loss, gradients = mx.array(0.0), list[mx.array]()
        for at in self.slices():
            arrays = in_order(arrays, [loss, *gradients[-1:]])
            part, gradient = of_chunk(*(a[:, at] for a in arrays))
            loss = loss + part
            gradients.append(gradient)
        return loss, mx.concatenate(gradients, axis=1).reshape(hidden.shape)

    def each(self, of_chunk, dtypes, *arrays: mx.array) -> list[mx.array]:
        """The results of `of_chunk` at every position, (B, T) each, without a gradient."""
        inputs = self.flat([mx.stop_gradient(a) for a in arrays])
        results = [mx.zeros((1, self.batch * self.length), dtype=dtype) for dtype in dtypes]
        for at in self.slices():
            inputs = in_order(inputs, results)
            for result, part in zip(results, of_chunk(*(a[:, at] for a in inputs)), strict=True):
                result[:, at] = part
        return [r.reshape(self.batch, self.length) for r in results]


def _constants(arrays: list[mx.array]) -> list[mx.array]:
    """`arrays` without the tracing of an outer transformation, so that compiled stages stay fused."""
    floating = iter(untraced([a for a in arrays if mx.issubdtype(a.dtype, mx.floating)]))
    return [next(floating) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]


def _kl(
    logits_s: mx.array, logits_t: mx.array, weights: mx.array, temperature: float, scales: mx.array
) -> tuple[mx.array, mx.array]:
    """The sum of the weighted KLs of a chunk, and its gradient with respect to the student's logits.

    `scales` is 1 / temperature twice, as the CUDA kernel takes it.
    """
    weights = weights * temperature
    if logits_s.dtype == logits_t.dtype and row_kernel.usable(logits_s.shape[-1], logits_s.dtype):
        kl, error = row_kernel.rows_kl(logits_s, logits_t, weights.reshape(-1), scales)
        return kl.sum() * temperature, error
    by_lse = _by_lse(logits_s, logits_t)
    s, t = (_tempered(z, temperature, by_lse) for z in (logits_s, logits_t))
    ((terms, error),) = kl_and_error([s], [t], weights[..., None], gpu=on_gpu(), by_lse=by_lse)
    return terms.sum(axis=-1).sum() * temperature, error.astype(logits_s.dtype)


def _kl_each(logits_s: mx.array, logits_t: mx.array) -> mx.array:
    """KL(t || s) of each position."""
    columns, dtype = logits_s.shape[-1], logits_s.dtype
    if dtype == logits_t.dtype and row_kernel.usable(columns, dtype, error=False):
        return row_kernel.rows_kl(logits_s, logits_t, mx.array([1.0]), mx.array([1.0, 1.0]), error=False)[0]
    by_lse = _by_lse(logits_s, logits_t)
    s, t = (_tempered(z, 1.0, by_lse) for z in (logits_s, logits_t))
    return kl_terms(s, t, gpu=on_gpu(), by_lse=by_lse).sum(axis=-1)


def _by_lse(logits_s: mx.array, logits_t: mx.array) -> bool:
    """Whether the way with the fewest passes over memory is used: on a GPU in half precision."""
    return on_gpu() and logits_s.dtype in HALF and logits_t.dtype in HALF


def _tempered(logits: mx.array, temperature: float, by_lse: bool) -> mx.array:
    """logits / temperature, in float32 if the next stage does not convert by itself."""
    if by_lse and temperature == 1:
        return logits
    logits = logits.astype(mx.float32)
    return logits if temperature == 1 else logits / temperature


def _nll(logits: mx.array, targets: mx.array) -> mx.array:
    """The negative log-likelihood of each of `targets`, float32."""
    if on_gpu():
        return mx.fast.cross_entropy(logits, targets)
    logits = logits.astype(mx.float32)
    return mx.logsumexp(logits, axis=-1) - _chosen(logits, targets)


def _cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """The sum of the weighted negative log-likelihoods of a chunk, and its gradient with respect to the logits."""
    if on_gpu():  # one fused kernel each for the value and for the gradient
        (nll,), (error,) = mx.vjp(lambda z: mx.fast.cross_entropy(z, targets), [logits], [weights])
        return (nll * weights).sum(), error
    z = logits.astype(mx.float32)
    top, at = z.max(axis=-1, keepdims=True), targets[..., None]
    u = mx.exp(z - top)
    total = u.sum(axis=-1, keepdims=True)
    nll = (top + mx.log(total))[..., 0] - _chosen(z, targets)
    p = u * (weights[..., None] / total)
    error = mx.put_along_axis(p, at, mx.take_along_axis(p, at, axis=-1) - weights[..., None], axis=-1)
    return (nll * weights).sum(), error.astype(logits.dtype)


def _chosen(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _check_positions(hidden: mx.array, **others: mx.array | None) -> None:
    if hidden.ndim != 3:
        raise ValueError(f"hidden states must be (B, T, D), got shape {tuple(hidden.shape)}")
    for name, array in others.items():
        if array is not None and array.shape[:2] != hidden.shape[:2]:
            got, wanted = tuple(array.shape), tuple(hidden.shape[:2])
            raise ValueError(f"{name} must cover the positions (B, T) = {wanted}, got shape {got}")


def _check_options(reduction: str, temperature: float = 1.0) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
