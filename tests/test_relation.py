"""The relation loss against float64, in every shape, mask, dtype and transformation it meets."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.relation import relation_kl

TINY = 100_000  # a workspace that forces many tiles


def vectors(shape, dim_teacher=None, seed=0, noise=0.5, std=1.0, dtype=mx.float32):
    """Student and teacher that are related, as in distillation; values exact in `dtype`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * std
    width = dim_teacher or shape[-1]
    y = np.resize(x, (*shape[:-1], width)) + noise * std * rng.standard_normal((*shape[:-1], width))
    return mx.array(x.astype(np.float32)).astype(dtype), mx.array(y.astype(np.float32)).astype(dtype)


def exact(student, teacher, scale_s=None, scale_t=None, mask=None, causal=True, reduction="mean"):
    """Loss and gradient by the definition, in float64."""
    x, y = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (student, teacher))
    length = x.shape[2]
    scale_s = x.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = y.shape[-1] ** -0.5 if scale_t is None else scale_t
    valid = np.ones((x.shape[0], length), bool) if mask is None else np.array(mask)
    allowed = np.tril(np.ones((length, length), bool)) if causal else np.ones((length, length), bool)
    allowed = allowed & valid[:, None, None, :]

    def log_softmax(v, scale):
        s = np.where(allowed, scale * (v @ v.swapaxes(-1, -2)), -1e300)
        s = s - s.max(-1, keepdims=True)
        return s - np.log(np.exp(s).sum(-1, keepdims=True))

    log_s, log_t = log_softmax(x, scale_s), log_softmax(y, scale_t)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    rows = valid[:, None, :, None].astype(float)
    weight = 1.0 if reduction == "sum" else 1.0 / (x.shape[1] * max(valid.sum(), 1))
    loss = (np.where(allowed, p_t * (log_t - log_s), 0) * rows).sum() * weight
    error = np.where(allowed, p_s - p_t, 0) * rows * weight
    return loss, scale_s * (error + error.swapaxes(-1, -2)) @ x


def relative(got, want):
    got = np.array(got.astype(mx.float32)).astype(np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 17, 97, 256])
def test_loss_and_gradient_against_float64(length, causal, workspace):
    x, y = vectors((2, 3, length, 16), dim_teacher=12)
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, y, causal=causal, workspace_bytes=workspace))(
        x
    )
    want, want_gradient = exact(x, y, causal=causal)
    assert abs(loss.item() - want) <= 1e-5 * want + 1e-7
    assert np.linalg.norm(np.array(gradient) - want_gradient) <= 1e-5 * np.linalg.norm(want_gradient) + 1e-7
