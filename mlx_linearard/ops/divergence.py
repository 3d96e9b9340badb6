"""KL(p_t || p_s) of rows, and E = p_s - p_t, from the rows before their softmax: scores S and R, or logits.

A row may be held in blocks of columns. All results are weighted by `weight`, a factor per row. Two ways of
computing exist because different operations are costly: exponentials on a CPU, passes over memory on a GPU.
"""

from __future__ import annotations

from functools import reduce

import mlx.core as mx

Blocks = list[mx.array]  # blocks of columns of the same rows, (..., rows, columns) each
HALF = (mx.float16, mx.bfloat16)


def kl_and_error(s: Blocks, r: Blocks, weight: mx.array, *, gpu: bool, by_lse: bool) -> list[tuple[mx.array, mx.array]]:
    """(KL terms, E) of each block, for the student's rows `s` and the teacher's rows `r`.

    The KL of a row is the sum of its terms over all blocks. Terms are float32. With `by_lse`, s and r may be in
    half precision; E then has the dtype of s.
    """
    if by_lse:
        lse_s, lse_t = _lse(s), _lse(r)
        return [_fused_from_lse(a, b, lse_s, lse_t, weight) for a, b in zip(s, r, strict=True)]
    u_s, u_t, differences, w_s, w_t, shift = _by_exponentials(s, r, weight)
    stage = _fused_from_exponentials if gpu else _from_exponentials
    return [stage(a, b, d, w_s, w_t, shift) for a, b, d in zip(u_s, u_t, differences, strict=True)]


def kl_terms(s: mx.array, r: mx.array, *, gpu: bool, by_lse: bool) -> mx.array:
    """The terms alone, without a weight, of rows in one block."""
    if by_lse:
        return _fused_terms_from_lse(s, r, _lse([s]), _lse([r]))
    (u_s,), (u_t,), (difference,), w_s, w_t, shift = _by_exponentials([s], [r], mx.array(1.0))
    return (_fused_terms_from_exponentials if gpu else _terms_from_exponentials)(u_s, u_t, difference, w_s, w_t, shift)


def _by_exponentials(
    s: Blocks, r: Blocks, weight: mx.array
) -> tuple[Blocks, Blocks, Blocks, mx.array, mx.array, mx.array]:
    """One exponential per element, the costly operation of a CPU: exp(s - top), exp(r - top), s - r, by block.

    Each row is divided by its own sum, so p_s and p_t are as exact as those of the dense definition. The other three
    results are these factors, times `weight`, and lse_s - lse_t.
    """
    differences = [a - b for a, b in zip(s, r, strict=True)]
    u_s, z_s, top_s = _exponentials(s)
    u_t, z_t, top_t = _exponentials(r)
    shift = (top_s - top_t) + mx.log(z_s / z_t)  # lse_s - lse_t, without their rounding
    return u_s, u_t, differences, weight / z_s, weight / z_t, shift


def _exponentials(rows: Blocks) -> tuple[Blocks, mx.array, mx.array]:
    """exp(rows - top) block by block, their sums, and top, the maxima of the rows."""
    top = reduce(mx.maximum, [s.max(axis=-1, keepdims=True) for s in rows])
    exps = [mx.exp(s - top) for s in rows]
    return exps, reduce(mx.add, [u.sum(axis=-1, keepdims=True) for u in exps]), top


def _lse(rows: Blocks) -> mx.array:
    """The log-sum-exp of each row, (..., rows, 1) float32.

    The rounding of a log-sum-exp scales all of p_s or p_t, by about 2e-6 of the gradient. The rounding of
    half-precision results is larger.
    """
    return reduce(mx.logaddexp, [row_lse(block) for block in rows])


def row_lse(block: mx.array) -> mx.array:
    """The log-sum-exp of the last axis, kept as an axis of length 1, float32 for every dtype."""
    if block.dtype not in HALF:
        return mx.logsumexp(block, axis=-1, keepdims=True)
    # mlx's cross-entropy accumulates in float32 and makes no float32 copy; against token 0 it is lse - block[..., 0].
    nll = mx.fast.cross_entropy(block, mx.zeros(block.shape[:-1], mx.int32))
    return (nll + block[..., 0].astype(mx.float32))[..., None]


def _terms(p_s: mx.array, p_t: mx.array, log_ratio: mx.array) -> tuple[mx.array, mx.array]:
    """The terms of KL(p_t || p_s), and E. E sums to zero, so an error of the lse is of second order in the KL."""
    error = p_s - p_t
    return error - p_t * log_ratio, error


# The elementwise stages. A GPU reads and writes a block once for each fused stage. Compiling for the CPU would need
# a C++ compiler at run time and gain little. A stage with one output can work in place.


def _from_exponentials(u_s, u_t, difference, w_s, w_t, shift):
    return _terms(u_s * w_s, u_t * w_t, difference - shift)


def _from_lse(s, r, lse_s, lse_t, weight):
    log_s, log_t = s - lse_s, r - lse_t
    terms, error = _terms(mx.exp(log_s) * weight, mx.exp(log_t) * weight, log_s - log_t)
    return terms, error.astype(s.dtype)


def _terms_from_exponentials(u_s, u_t, difference, w_s, w_t, shift):
    return _from_exponentials(u_s, u_t, difference, w_s, w_t, shift)[0]


def _terms_from_lse(s, r, lse_s, lse_t):
    log_s, log_t = s - lse_s, r - lse_t
    return _terms(mx.exp(log_s), mx.exp(log_t), log_s - log_t)[0]


_fused_from_exponentials, _fused_from_lse, _fused_terms_from_exponentials, _fused_terms_from_lse = (
    mx.compile(stage, shapeless=True)
    for stage in (_from_exponentials, _from_lse, _terms_from_exponentials, _terms_from_lse)
)
