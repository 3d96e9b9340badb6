"""The product of a gradient and its cotangent, in parts and without a float32 copy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.ops import tiling


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 97, 8), (2, 64)], ids=["tail", "even"])
def test_a_product_in_parts_is_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    gradient, cotangent = mx.random.normal(shape, key=mx.random.key(5)).astype(dtype), mx.array(3.3)
    want = (gradient.astype(mx.float32) * cotangent).astype(dtype)
    monkeypatch.setattr(tiling, "MULTIPLIED_AT_ONCE", 64)
    got = tiling.multiply(gradient, cotangent)
    assert got.dtype == dtype and got.shape == gradient.shape
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32)))


def test_a_large_product_holds_little_in_float32() -> None:
    """Memory beyond gradient and result is that of a few parts, not two float32 copies."""
    gradient = mx.ones((64, tiling.MULTIPLIED_AT_ONCE), mx.bfloat16)
    mx.eval(gradient)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = tiling.multiply(gradient, mx.array(2.0))
    mx.eval(result)
    beyond = mx.get_peak_memory() - before - result.nbytes
    assert beyond < 0.4 * 4 * result.size, beyond / 1e6  # mlx's queue has not yet released some twenty parts
