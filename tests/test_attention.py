"""Tiled attention against softmax attention in float64, forward and backward."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.attention import attention


def test_causal_attention_is_softmax_attention():
    q, k, v = (mx.random.normal((1, h, 33, 8), key=mx.random.key(i)) for i, h in enumerate((4, 2, 2)))
    got = np.array(attention(q, k, v, scale=0.3, mask="causal", workspace_bytes=20_000))
    q, k, v = (np.array(a, dtype=np.float64) for a in (q, k, v))
    k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
    scores = np.where(np.tril(np.ones((33, 33), bool)), 0.3 * q @ k.swapaxes(-1, -2), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    assert got == pytest.approx(p / p.sum(-1, keepdims=True) @ v, abs=1e-6)
