"""Losses and comparisons over the vocabulary, some positions at a time, so that few of the (T, V) logits exist at once.

A `head` is any callable from hidden states (1, C, D) to logits (1, C, V): final norm, output projection, soft
cap, quantized or not. It is frozen: only the hidden states get a gradient. The gradient of a chunk of positions is
computed together with its loss, so the backward pass only multiplies by the cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from .tiling import FLOAT32, check_workspace, first, in_order, multiply

Head = Callable[[mx.array], mx.array]
REDUCTIONS = ("mean", "sum")


class Held(NamedTuple):
    """How many float32 arrays of (chunk, vocabulary) an operation holds at its fullest moment."""

    assumed: int  # for the size of a chunk
    several: int  # measured with several chunks, of which two or three are in flight
    one: int  # measured with one chunk


KL, CROSS_ENTROPY = Held(20, 20, 11), Held(10, 7, 4)
COMPARED, NLL = 15, 8  # assumed for the operations without a gradient


class Comparison(NamedTuple):
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
    positions = _Positions.of(student_hidden, student_head, KL.assumed, workspace_bytes)
    weights = positions.weights(mask, reduction)

    @mx.custom_function
    def loss_and_gradient(student: mx.array, teacher: mx.array):
        def of_chunk(student, teacher, weights):
            logits_t = teacher_head(teacher)
            return mx.value_and_grad(lambda s: _weighted_kl(student_head(s), logits_t, weights, temperature))(student)

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

    The other arguments, the result and the errors are those of `logits_kl`.
    """
    _check_positions(hidden, targets=targets, mask=mask)
    _check_options(reduction)
    positions = _Positions.of(hidden, head, CROSS_ENTROPY.assumed, workspace_bytes)
    weights = positions.weights(mask, reduction)

    @mx.custom_function
    def loss_and_gradient(hidden: mx.array):
        def of_chunk(hidden, targets, weights):
            return mx.value_and_grad(lambda h: _weighted_nll(head(h), targets, weights))(hidden)

        return positions.sum_with_gradient(of_chunk, hidden, targets, weights)

    @loss_and_gradient.vjp
    def _(primals, cotangents, outputs):
        return multiply(outputs[1], cotangents[0])

    return first(loss_and_gradient(hidden))


def token_nll(hidden: mx.array, head: Head, targets: mx.array, *, workspace_bytes: int | None = None) -> mx.array:
    """Negative log-likelihood of each of `targets` (B, T), in nats, float32 (B, T); no gradient."""
    _check_positions(hidden, targets=targets)

    def of_chunk(hidden, targets):
        return [_nll(head(hidden), targets)]

    positions = _Positions.of(hidden, head, NLL, workspace_bytes)
    return positions.each(of_chunk, [mx.float32], hidden, targets)[0]


def compare_logits(
    student_hidden: mx.array,
    teacher_hidden: mx.array,
    student_head: Head,
    teacher_head: Head,
    targets: mx.array | None = None,
    *,
    workspace_bytes: int | None = None,
) -> Comparison:
    """Student against teacher at each position, without a gradient.

    Returns:
        nll: the student's negative log-likelihood of `targets` in nats; None without targets.
        kl: KL(teacher || student) in nats.
        agreement: whether both have the same most likely token (top-1 agreement).
    """
    _check_positions(student_hidden, teacher_hidden=teacher_hidden, targets=targets)

    def of_chunk(student, teacher, *targets):
        student, teacher = student_head(student), teacher_head(teacher)
        kl = _kl(_log_softmax(student), _log_softmax(teacher))
        same = mx.argmax(student, axis=-1) == mx.argmax(teacher, axis=-1)
        return [kl, same, *(_nll(student, t) for t in targets)]

    inputs = [student_hidden, teacher_hidden] + ([] if targets is None else [targets])
    dtypes = [mx.float32, mx.bool_] + ([] if targets is None else [mx.float32])
    positions = _Positions.of(student_hidden, student_head, COMPARED, workspace_bytes)
    kl, same, *nll = positions.each(of_chunk, dtypes, *inputs)
    return Comparison(nll[0] if nll else None, kl, same)


def peak_bytes(held: Held, positions: int, vocabulary: int, *, workspace: int) -> int:
    """The most memory that the chunks of an operation with a gradient hold, in bytes: `KL` or `CROSS_ENTROPY`."""
    chunk = _chunk_size(workspace, held.assumed, vocabulary)
    arrays = held.several if chunk < positions else held.one
    return min(chunk, positions) * arrays * vocabulary * FLOAT32


def _chunk_size(workspace: int, held: int, vocabulary: int) -> int:
    """The number of positions for which `held` float32 arrays over the vocabulary fit `workspace`; at least one."""
    return max(1, workspace // (held * vocabulary * FLOAT32))


class _Positions(NamedTuple):
    """The positions of a call, as one row, and the number of positions per chunk."""

    batch: int
    length: int
    chunk: int

    @classmethod
    def of(cls, hidden: mx.array, head: Head, held: int, workspace_bytes: int | None) -> _Positions:
        """Chunks so small that `held` float32 arrays over the vocabulary fit the workspace."""
        batch, length = hidden.shape[:2]
        if batch * length == 0:
            raise ValueError(f"there are no positions in hidden states of shape {tuple(hidden.shape)}")
        vocabulary = head(hidden[:1, :1]).shape[-1]  # mlx knows the shape without computing
        chunk = _chunk_size(check_workspace(workspace_bytes), held, vocabulary)
        return cls(batch, length, min(chunk, batch * length))

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
        arrays = self.flat([hidden, *others])
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


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _kl(log_s: mx.array, log_t: mx.array) -> mx.array:
    """KL(t || s) of each position. p_s - p_t sums to zero, so an error of the lse is of second order."""
    p_t = mx.exp(log_t)
    return (mx.exp(log_s) - p_t - p_t * (log_s - log_t)).sum(axis=-1)


def _nll(logits: mx.array, targets: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return mx.logsumexp(logits, axis=-1) - chosen


def _weighted_kl(logits_s: mx.array, logits_t: mx.array, weights: mx.array, temperature: float) -> mx.array:
    """The sum of the weighted KLs of a chunk; its gradient with respect to the logits is written out: p_s - p_t."""

    @mx.custom_function
    def kl(logits_s: mx.array):
        log_s, log_t = (_log_softmax(z.astype(mx.float32) / temperature) for z in (logits_s, logits_t))
        loss = (_kl(log_s, log_t) * weights).sum() * temperature**2
        error = (mx.exp(log_s) - mx.exp(log_t)) * (weights * temperature)[..., None]
        return loss, error.astype(logits_s.dtype)

    @kl.vjp
    def _(primals, cotangents, outputs):
        return outputs[1] * cotangents[0].astype(outputs[1].dtype)  # the cotangent is 1 here

    return first(kl(logits_s))


def _weighted_nll(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """The sum of the weighted negative log-likelihoods of a chunk; its gradient is written out: p - onehot."""

    @mx.custom_function
    def nll(logits: mx.array):
        p = mx.exp(_log_softmax(logits))
        hit = mx.arange(logits.shape[-1]) == targets[..., None]
        return (_nll(logits, targets) * weights).sum(), ((p - hit) * weights[..., None]).astype(logits.dtype)

    @nll.vjp
    def _(primals, cotangents, outputs):
        return outputs[1] * cotangents[0].astype(outputs[1].dtype)  # the cotangent is 1 here

    return first(nll(logits))


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
