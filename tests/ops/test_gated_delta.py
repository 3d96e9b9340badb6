"""The gated delta rule in chunks: the rule itself in float64, mlx-lm's gradient, and memory linear in the length."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_ops, normalize_qk

from mlx_linearard.machine import on_gpu
from mlx_linearard.ops.gated_delta import CHUNK, gated_delta, peak_bytes

Inputs = list[mx.array]


def inputs(length: int, *, batch: int = 2, heads: tuple[int, int] = (2, 4), dims: tuple[int, int] = (16, 8)) -> Inputs:
    """Normalized queries and keys, values, log decay and beta."""
    mx.random.seed(0)
    shape = (batch, length, heads[0], dims[0])
    queries, keys = normalize_qk(mx.random.normal(shape), mx.random.normal(shape), inv_scale=dims[0] ** -0.5, eps=1e-6)
    gates = (batch, length, heads[1])
    decay, beta = -mx.exp(mx.random.normal(gates) - 2), mx.sigmoid(mx.random.normal(gates))
    return [queries, keys, mx.random.normal((*gates, dims[1])), decay, beta]


def alike(length: int) -> Inputs:
    """One key everywhere, written almost whole and hardly forgotten: the hardest case of the inverse."""
    queries, keys, values, decay, beta = inputs(length)
    return [queries, mx.broadcast_to(keys[:, :1], keys.shape), values, 0.01 * decay, 0.9 + 0.1 * beta]


def definition(arrays: Inputs) -> np.ndarray:
    """(B, T, Hv, Dv), position by position in float64."""
    queries, keys, values, decay, beta = (np.array(a, np.float64) for a in arrays)
    shared = values.shape[2] // keys.shape[2]
    queries, keys = queries.repeat(shared, 2), keys.repeat(shared, 2)
    state, out = np.zeros((*values.shape[::2], keys.shape[3], values.shape[3])), np.zeros_like(values)
    for t in range(values.shape[1]):
        state = state * np.exp(decay[:, t])[..., None, None]
        seen = np.einsum("bhkv,bhk->bhv", state, keys[:, t])
        state = state + np.einsum("bhk,bhv->bhkv", keys[:, t], beta[:, t, :, None] * (values[:, t] - seen))
        out[:, t] = np.einsum("bhkv,bhk->bhv", state, queries[:, t])
    return out


@pytest.mark.parametrize("made", [inputs, alike])
@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_the_output_is_that_of_the_rule(length: int, made) -> None:
    arrays = made(length)
    expected = definition(arrays)
    found = np.array(gated_delta(*arrays))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("made", [inputs, alike])
@pytest.mark.parametrize("length", [5, CHUNK + 9])
def test_the_gradient_is_that_of_mlx_lm_s_positions(length: int, made) -> None:
    arrays = made(length)
    weights = mx.random.normal(arrays[2].shape)

    def own(*a: mx.array) -> mx.array:
        return (gated_delta(*a) * weights).sum()

    def theirs(*a: mx.array) -> mx.array:
        return (gated_delta_ops(*a[:3], mx.exp(a[3]), a[4])[0] * weights).sum()

    for one, other in zip(*(mx.grad(f, argnums=range(5))(*arrays) for f in (own, theirs)), strict=True):
        assert mx.abs(one - other).max().item() < 2e-4 * mx.abs(other).max().item()


def test_half_precision_is_computed_in_float32() -> None:
    arrays = [a.astype(mx.bfloat16) for a in inputs(CHUNK + 1)]
    found = gated_delta(*arrays)
    assert found.dtype == mx.bfloat16
    expected = definition([a.astype(mx.float32) for a in arrays])
    assert np.abs(np.array(found.astype(mx.float32)) - expected).max() < 4e-3 * np.abs(expected).max()
    gradients = mx.grad(lambda *a: gated_delta(*a).astype(mx.float32).sum(), argnums=range(5))(*arrays)
    assert {g.dtype for g in gradients} == {mx.bfloat16}


def test_a_gradient_takes_memory_in_proportion_to_the_length() -> None:
    def peak(length: int) -> tuple[int, int]:
        sizes = {"batch": 1, "heads": (4, 8), "dims": (64, 64)}
        arrays = inputs(length, **sizes)
        mx.eval(arrays)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda *a: gated_delta(*a).sum(), argnums=range(5))(*arrays))
        allowed = peak_bytes(1, length, 8, 64, 64) + 3 * sum(a.nbytes for a in arrays)
        return mx.get_peak_memory() - before, allowed

    for length in (512, 2048):
        measured, allowed = peak(length)
        assert measured < allowed or on_gpu()  # a GPU's queue holds more, and the bound was measured on the CPU
    assert peak(2048)[0] < 4.4 * peak(512)[0]
