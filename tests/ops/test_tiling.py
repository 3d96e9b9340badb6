"""What the tiled parts share: the product with a cotangent, in parts and without a copy in float32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.ops import tiling as tiles


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 97, 8), (2, 64)], ids=["tail", "even"])
def test_parts_of_a_product_are_the_whole_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    gradient, cotangent = mx.random.normal(shape, key=mx.random.key(5)).astype(dtype), mx.array(3.3)
    want = (gradient.astype(mx.float32) * cotangent).astype(dtype)
    monkeypatch.setattr(tiles, "TIMES_AT_ONCE", 64)
    got = tiles.times(gradient, cotangent)
    assert got.dtype == dtype and got.shape == gradient.shape
    np.testing.assert_array_equal(np.array(got.astype(mx.float32)), np.array(want.astype(mx.float32)))


def test_a_large_product_holds_little_in_float32() -> None:
    """Memory beyond gradient and result is that of a few parts, not two float32 copies of the whole."""
    gradient = mx.ones((64, tiles.TIMES_AT_ONCE), mx.bfloat16)
    mx.eval(gradient)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = tiles.times(gradient, mx.array(2.0))
    mx.eval(result)
    beyond = mx.get_peak_memory() - before - result.nbytes
    assert beyond < 0.4 * 4 * result.size, beyond / 1e6  # some twenty parts that mlx's queue has not released
