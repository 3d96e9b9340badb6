"""Attention with sinks and soft caps: tiles, the plain definition, and both in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.ops.attention import attention, attention_in_training, attention_no_grad

TINY = 60_000  # many tiles and blocks
SCALE = 0.3
CASES = [{"sinks": True}, {"softcap": 2.0}, {"sinks": True, "softcap": 2.0}]


def inputs(rows=97, heads=(4, 2), dim=8, dtype=mx.float32):
    shapes = [(2, heads[0], rows, dim), (2, heads[1], rows, dim), (2, heads[1], rows, dim), (heads[0],)]
    arrays = [mx.random.normal(s, key=mx.random.key(i)) * 2 for i, s in enumerate(shapes)]
    return [a.astype(dtype) for a in arrays], mx.random.normal(shapes[0], key=mx.random.key(9)).astype(dtype)


def exact(q, k, v, sinks, cotangent, softcap):
    """[output, dQ, dK, dV, dSinks] by the definition, in float64; sinks None for none."""
    q, k, v, c = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (q, k, v, cotangent))
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    wide_k, wide_v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    s = SCALE * q @ wide_k.swapaxes(-1, -2)
    slope = np.ones_like(s)
    if softcap:
        s = softcap * np.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    e = np.where(np.tril(np.ones((length, length), bool)), np.exp(s), 0)
    share = 0.0 if sinks is None else np.exp(np.array(sinks.astype(mx.float32)).astype(np.float64))[:, None, None]
    total = e.sum(-1, keepdims=True) + share
    p = e / total
    out = p @ wide_v
    delta = (c * out).sum(-1, keepdims=True)
    d_s = p * (c @ wide_v.swapaxes(-1, -2) - delta) * slope * SCALE
    by_key_head = [
        a.reshape(a.shape[0], -1, group, *a.shape[2:]).sum(2)
        for a in (d_s.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ c)
    ]
    return [out, d_s @ wide_k, *by_key_head, -(share / total * delta).sum((0, 2, 3))]


def naive(q, k, v, sinks, softcap):
    """The definition in float32, with all scores."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (mx.repeat(a.astype(mx.float32), group, axis=1) for a in (k, v))
    s = SCALE * q.astype(mx.float32) @ k.swapaxes(-1, -2)
    s = softcap * mx.tanh(s / softcap) if softcap else s
    s = mx.where(mx.tril(mx.ones((length, length), dtype=mx.bool_)), s, -1e30)
    if sinks is not None:
        s = mx.concatenate([mx.broadcast_to(sinks.astype(mx.float32)[None, :, None, None], (*s.shape[:3], 1)), s], -1)
    return (mx.softmax(s, axis=-1)[..., -length:] @ v).astype(q.dtype)


def results(function, arrays, cotangent):
    (output,), gradients = mx.vjp(function, arrays, [cotangent])
    return [np.array(a.astype(mx.float32)).astype(np.float64) for a in (output, *gradients)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("case", CASES, ids=["sinks", "softcap", "both"])
def test_as_exact_as_the_definition(case, workspace, dtype):
    softcap, (arrays, c) = case.get("softcap"), inputs(dtype=dtype)
    arrays = arrays if case.get("sinks") else arrays[:3]
    rest = lambda sinks: {"sinks": sinks[0] if sinks else None, "softcap": softcap}  # noqa: E731
    options = {"scale": SCALE, "mask": "causal", "workspace_bytes": workspace}
    ours = results(lambda q, k, v, *s: attention(q, k, v, **rest(s), **options), arrays, c)
    plain = results(lambda q, k, v, *s: naive(q, k, v, **rest(s)), arrays, c)
    truth = exact(*arrays[:3], arrays[3] if len(arrays) > 3 else None, c, softcap)
    for a, b, want in zip(ours, plain, truth, strict=False):
        size = np.linalg.norm(want)
        if dtype == mx.float32:
            assert np.linalg.norm(a - want) <= np.linalg.norm(b - want) * 1.1 + 1e-6 * size
        assert np.linalg.norm(a - want) <= (1e-5 if dtype == mx.float32 else 4e-3) * size  # bfloat16 rounds by 2^-9


@pytest.mark.parametrize("function", [attention_no_grad, attention_in_training])
def test_the_other_entrances_compute_the_same(function):
    (q, k, v, sinks), c = inputs()
    got = function(q, k, v, scale=SCALE, mask="causal", sinks=sinks, softcap=3.0, workspace_bytes=TINY)
    want = exact(q, k, v, sinks, c, 3.0)[0]
    assert np.linalg.norm(np.array(got) - want) <= 1e-5 * np.linalg.norm(want)


def test_mlx_has_the_same_sinks():
    (q, k, v, sinks), _ = inputs()
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask="causal", sinks=sinks)
    ours = attention(q, k, v, scale=SCALE, mask="causal", sinks=sinks)
    assert mx.abs(ours - theirs).max().item() < 1e-5


def test_a_masked_row_with_a_soft_cap_has_finite_gradients():
    (q, k, v, sinks), c = inputs(rows=8)
    mask = mx.zeros((8, 8), dtype=mx.bool_)  # nothing is seen
    got = results(lambda *a: attention(*a[:3], scale=SCALE, mask=mask, sinks=a[3], softcap=1.0), [q, k, v, sinks], c)
    assert all(np.array_equal(a, np.zeros_like(a)) for a in got)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sinks": mx.zeros((3,))}, "sinks"),
        ({"sinks": mx.zeros((4,), mx.int32)}, "sinks"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_errors_name_what_is_wrong(options, named):
    (q, k, v, _), _ = inputs(rows=4)
    with pytest.raises(ValueError, match=named):
        attention(q, k, v, scale=1.0, **options)


def test_memory_stays_within_the_workspace():
    workspace, length = 8 * 2**20, 2048
    q, k, v = (mx.random.normal((1, h, length, 16)) for h in (2, 1, 1))
    sinks, c = mx.zeros((2,)), mx.ones((1, 2, length, 16))
    mx.eval(q, k, v, c, sinks)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    got = mx.vjp(
        lambda *a: attention(*a[:3], scale=1.0, mask="causal", sinks=a[3], softcap=5.0, workspace_bytes=workspace),
        [q, k, v, sinks],
        [c],
    )
    mx.eval(got)
    extra = mx.get_peak_memory() - before - sum(a.nbytes for part in got for a in part)
    assert extra <= 1.6 * workspace  # a soft cap keeps two more tiles
