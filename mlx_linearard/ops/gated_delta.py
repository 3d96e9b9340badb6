"""The gated delta rule of linear attention, chunk by chunk, with a gradient in linear memory.

A layer of gated delta attention (Qwen3-Next, Qwen3.5) has no scores between positions. It keeps one matrix S (Dk, Dv)
per head, which every position decays, corrects and reads:

    S <- e^g S;  S <- S + beta k (v - S^T k)^T;  y = S^T q

mlx-lm trains it position by position, which holds a copy of S for each. Here a chunk of positions is a few matrix
products (arXiv 2412.06464, section 3.3), and its backward pass computes the chunk again, so a gradient holds one S per
chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from .tiling import FLOAT32, ceil_div, in_order

CHUNK = 64  # positions, a power of two


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, log_decay: mx.array, beta: mx.array, *, chunk: int = CHUNK
) -> mx.array:
    """The output of the rule from an empty state, (B, T, Hv, Dv) in the dtype of `queries`.

    Args:
        queries, keys: (B, T, Hk, Dk), normalized; the scale is part of the queries. Hk divides Hv.
        values: (B, T, Hv, Dv).
        log_decay: (B, T, Hv), the g above, at most 0.
        beta: (B, T, Hv).
        chunk: positions per chunk, a power of two.
    """
    length = values.shape[1]

    @mx.custom_function
    def forward(*inputs: mx.array) -> mx.array:
        outputs = [output for _, output in _outputs(inputs, chunk)]
        return _joined(outputs, length).astype(queries.dtype)

    @forward.vjp
    def _(inputs: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        return [g.astype(a.dtype) for g, a in zip(_backward(inputs, cotangent, chunk), inputs, strict=True)]

    result: Any = forward(queries, keys, values, log_decay, beta)
    return result


def peak_bytes(batch: int, length: int, heads: int, key_dim: int, value_dim: int, *, chunk: int = CHUNK) -> int:
    """The most memory that a gradient holds beside its inputs and their gradients, in bytes.

    A state per chunk, and the arrays of one chunk (measured on the CPU with C = Dk = Dv = 64: 50 of them).
    """
    states = ceil_div(length, chunk) * key_dim * value_dim
    one = 17 * chunk * chunk + 12 * chunk * (key_dim + value_dim) + 9 * key_dim * value_dim
    return FLOAT32 * batch * heads * (states + one)


def _outputs(inputs: Sequence[mx.array], chunk: int) -> Iterator[tuple[mx.array, mx.array]]:
    """(state before it, outputs (B, Hv, C, Dv)) of each chunk, one after another."""
    keys, values = inputs[1:3]
    state = mx.zeros((values.shape[0], values.shape[2], keys.shape[3], values.shape[3]))
    outputs = state
    for arrays in zip(*(_chunks(a, chunk) for a in inputs), strict=True):
        before, (outputs, state) = state, _chunk(state, *in_order(list(arrays), [state, outputs]))
        yield before, outputs


def _backward(inputs: Sequence[mx.array], cotangent: mx.array, chunk: int) -> list[mx.array]:
    """The gradients in the inputs, in float32, from the last chunk to the first."""
    length = cotangent.shape[1]
    states = [state for state, _ in _outputs(inputs, chunk)]
    chunks = list(zip(*(_chunks(a, chunk) for a in inputs), strict=True))
    later = mx.zeros_like(states[0])  # the gradient in the state after a chunk
    later = in_order([later], states[-1:])[0]
    found: list[list[mx.array]] = []
    for state, arrays, arriving in zip(
        reversed(states), reversed(chunks), reversed(_chunks(cotangent, chunk)), strict=True
    ):
        primals = [a.astype(mx.float32) for a in in_order([state, *arrays], [later, *(found[-1] if found else [])])]
        _, (later, *gradients) = mx.vjp(_chunk, primals, [arriving.astype(mx.float32), later])
        found.append(gradients)
    return [_joined(list(reversed(one)), length) for one in zip(*found, strict=True)]


def _joined(chunks: list[mx.array], length: int) -> mx.array:
    """(B, T, H, ...) of chunks (B, H, C, ...), without the zeros at the end."""
    return mx.concatenate(chunks, axis=2)[:, :, :length].swapaxes(1, 2)


def _chunks(array: mx.array, chunk: int) -> list[mx.array]:
    """(B, T, H, ...) as float32 chunks (B, H, C, ...); zeros at the end change nothing."""
    array = array.swapaxes(1, 2)
    length = array.shape[2]
    padding = ceil_div(length, chunk) * chunk - length
    if padding:
        array = mx.pad(array, [(0, 0), (0, 0), (0, padding), *[(0, 0)] * (array.ndim - 3)])
    return list(mx.split(array, ceil_div(length, chunk), axis=2))


def _chunk(
    state: mx.array, queries: mx.array, keys: mx.array, values: mx.array, log_decay: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """(outputs (B, Hv, C, Dv), state after them) of one chunk, in float32."""
    queries, keys, values, log_decay, beta = (a.astype(mx.float32) for a in (queries, keys, values, log_decay, beta))
    shared = values.shape[1] // keys.shape[1]
    if shared > 1:
        queries, keys = mx.repeat(queries, shared, axis=1), mx.repeat(keys, shared, axis=1)
    size = values.shape[2]
    since = mx.cumsum(log_decay, axis=2)  # the decay since the chunk began
    causal, strict = _triangles(size)
    between = mx.exp(mx.where(causal, since[..., None] - since[..., None, :], -mx.inf))
    begun, rest, whole = mx.exp(since)[..., None], mx.exp(since[..., -1:] - since)[..., None], mx.exp(since[..., -1])
    written = keys * beta[..., None]
    solved = _inverse(mx.where(strict, (written @ keys.swapaxes(2, 3)) * between, 0.0))
    new = solved @ (values * beta[..., None] - (written * begun) @ state)  # what each position adds, corrected
    outputs = (queries * begun) @ state + ((queries @ keys.swapaxes(2, 3)) * between) @ new
    return outputs, state * whole[..., None, None] + (keys * rest).swapaxes(2, 3) @ new


def _inverse(lower: mx.array) -> mx.array:
    """(I + lower)^-1 of strictly lower triangular matrices (..., C, C), from blocks of one row to the whole.

    The inverse of [[A, 0], [E, B]] is [[A^-1, 0], [-B^-1 E A^-1, B^-1]].
    """
    result = mx.eye(lower.shape[-1])
    for corners in _corners(lower.shape[-1]):
        result = result - result @ (lower * corners) @ result
    return result


@cache
def _triangles(size: int) -> tuple[mx.array, mx.array]:
    causal = mx.tril(mx.ones((size, size), dtype=mx.bool_))
    strict = mx.tril(mx.ones((size, size), dtype=mx.bool_), -1)
    mx.eval(causal, strict)
    return causal, strict


@cache
def _corners(size: int) -> tuple[mx.array, ...]:
    """For blocks of 1, 2, 4, ... rows: 1 in the lower left quarter of each pair of blocks, (C, C)."""
    rows, masks, block = mx.arange(size), [], 1
    while block < size:
        pair, half = rows // (2 * block), rows // block % 2
        same = pair[:, None] == pair[None]
        masks.append((same & (half[:, None] == 1) & (half[None] == 0)).astype(mx.float32))
        block *= 2
    mx.eval(masks)
    return tuple(masks)
