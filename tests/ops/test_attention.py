"""Tiled attention against softmax attention in float64, forward and backward."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.machine import on_gpu
from mlx_linearard.ops import attention as module
from mlx_linearard.ops.attention import attention, attention_no_grad
from mlx_linearard.ops.tiling import scratch

TINY = 60_000  # a workspace so small that there are many tiles and blocks
SCALE = 0.3


def inputs(rows, columns, heads=(4, 2), dim=8, dim_v=12, dtype=mx.float32, std=1.0):
    shapes = [(2, heads[0], rows, dim), (2, heads[1], columns, dim), (2, heads[1], columns, dim_v)]
    return [(mx.random.normal(s, key=mx.random.key(i)) * std).astype(dtype) for i, s in enumerate(shapes)]


def allowed(kind, rows, columns, window=None):
    i, j = np.arange(rows)[:, None] + columns - rows, np.arange(columns)[None, :]
    causal = (j <= i) & (j > i - window) if window else j <= i
    return causal if kind == "causal" else np.ones_like(causal)


def exact(q, k, v, cotangent, bias=0.0, visible=True):
    """[output, dQ, dK, dV] in float64; a row that sees nothing gives zeros."""
    q, k, v, c = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (q, k, v, cotangent))
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    scores = np.where(visible, SCALE * q @ wide_k.swapaxes(-1, -2) + bias, -1e300)
    p = np.where(visible, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    out = p @ wide_v
    d_scores = p * (c @ wide_v.swapaxes(-1, -2) - (c * out).sum(-1, keepdims=True))
    d_k, d_v = SCALE * d_scores.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ c
    by_key_head = [a.reshape(a.shape[0], -1, group, *a.shape[2:]).sum(2) for a in (d_k, d_v)]
    return [out, SCALE * d_scores @ wide_k, *by_key_head]


def assert_exact(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        a = np.array(a.astype(mx.float32)).astype(np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6


def with_gradients(q, k, v, cotangent, **options):
    (output,), gradients = mx.vjp(lambda q, k, v: attention(q, k, v, scale=SCALE, **options), [q, k, v], [cotangent])
    return [output, *gradients]


def like_output(q, v):
    return mx.random.normal((*q.shape[:3], v.shape[-1]), key=mx.random.key(9)).astype(q.dtype)


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize(("kind", "window"), [(None, None), ("causal", None), ("causal", 9)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (17, 17), (97, 97), (256, 256), (40, 70)])
def test_forward_and_backward_against_float64(rows, columns, kind, window, workspace):
    q, k, v = inputs(rows, columns)
    c = like_output(q, v)
    got = with_gradients(q, k, v, c, mask=kind, window=window, workspace_bytes=workspace)
    assert_exact(got, exact(q, k, v, c, visible=allowed(kind, rows, columns, window)))


@pytest.mark.parametrize("length", [513, 1000])
def test_long_and_awkward_lengths(length):
    q, k, v = inputs(length, length, heads=(2, 1))
    c = like_output(q, v)
    got = with_gradients(q, k, v, c, mask="causal", workspace_bytes=2_000_000)
    assert_exact(got, exact(q, k, v, c, visible=allowed("causal", length, length)))


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (2, 4, 40, 70), (40, 70), (4, 1, 70), (1, 70)])
def test_array_masks_are_taken_tile_by_tile(shape, workspace):
    q, k, v = inputs(40, 70)
    c = like_output(q, v)
    seen = mx.random.uniform(shape=shape, key=mx.random.key(5)) > 0.4
    got = with_gradients(q, k, v, c, mask=seen, workspace_bytes=workspace)
    assert_exact(got, exact(q, k, v, c, visible=np.array(seen)))
    added = mx.random.normal(shape, key=mx.random.key(6))
    got = with_gradients(q, k, v, c, mask=added, workspace_bytes=workspace)
    assert_exact(got, exact(q, k, v, c, bias=np.array(added, dtype=np.float64)))


@pytest.mark.parametrize("nothing", [False, -np.inf])
def test_a_query_that_sees_nothing_gives_zeros(nothing):
    q, k, v = inputs(20, 20)
    c = like_output(q, v)
    seen = np.ones((20, 20), bool)
    seen[3:7] = False
    mask = mx.array(seen) if nothing is False else mx.array(np.where(seen, 0, nothing).astype(np.float32))
    got = with_gradients(q, k, v, c, mask=mask, workspace_bytes=TINY)
    assert all(mx.all(mx.isfinite(a)).item() for a in got)
    assert not mx.any(got[0][:, :, 3:7]).item()
    assert_exact(got, exact(q, k, v, c, visible=seen))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_inputs_are_rounded_once(dtype):
    q, k, v = inputs(97, 97, dtype=dtype)
    c = like_output(q, v)
    got = with_gradients(q, k, v, c, mask="causal", workspace_bytes=TINY)
    assert all(a.dtype == dtype for a in got)
    assert_exact(got, exact(q, k, v, c, visible=allowed("causal", 97, 97)), tolerance=4e-3)


def test_peaked_scores_stay_finite():
    q, k, v = inputs(97, 97, std=6.0)  # scores with a standard deviation of 30
    c = like_output(q, v)
    got = with_gradients(q, k, v, c, mask="causal", workspace_bytes=TINY)
    assert_exact(got, exact(q, k, v, c, visible=allowed("causal", 97, 97)))


@pytest.mark.usefixtures("compiling")
def test_inside_compile_and_checkpoint():
    q, k, v = inputs(33, 33)

    def loss(q, k, v):
        return 2.0 * mx.square(attention(q, k, v, scale=SCALE, mask="causal", workspace_bytes=TINY)).sum()

    want = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    for got in (
        mx.compile(mx.grad(loss, argnums=(0, 1, 2)))(q, k, v),
        mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2))(q, k, v),
    ):
        assert_exact(got, [np.array(a, dtype=np.float64) for a in want])


@pytest.mark.parametrize(("kind", "window"), [(None, None), ("causal", None), ("causal", 9)])
@pytest.mark.parametrize("gpu", [False, True])
def test_without_gradient(kind, window, gpu, monkeypatch):
    """Also as on a GPU: mlx's own attention, some rows at a time, in float32."""
    if gpu:
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    q, k, v = inputs(40, 70, dim_v=8)
    got = attention_no_grad(q, k, v, scale=SCALE, mask=kind, window=window, workspace_bytes=TINY)
    assert_exact([got], exact(q, k, v, like_output(q, v), visible=allowed(kind, 40, 70, window))[:1])
    gradient = mx.grad(lambda q: attention_no_grad(q, k, v, scale=SCALE, mask=kind, window=window).sum())(q)
    assert not mx.any(gradient).item()


def test_the_stages_of_a_gpu_compute_the_same(monkeypatch):
    monkeypatch.setattr(module, "fused_probabilities", module.probabilities)
    monkeypatch.setattr(module, "fused_d_scores", module.d_scores)
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    q, k, v = inputs(97, 97)
    c = like_output(q, v)
    got = with_gradients(q, k, v, c, mask="causal", workspace_bytes=TINY)
    assert_exact(got, exact(q, k, v, c, visible=allowed("causal", 97, 97)))


@pytest.mark.usefixtures("compiling")
def test_the_stages_of_a_gpu_arefused_under_a_gradient_too(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    q, k, v = inputs(97, 97)
    results = with_gradients(q, k, v, like_output(q, v), mask="causal", workspace_bytes=TINY)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *results)  # nothing is evaluated
    assert (tmp_path / "graph.dot").read_text().count('"Compiled') >= 3


@pytest.mark.parametrize("length", [1024, 2048])
def test_memory_beyond_the_results_is_the_workspace(length):
    workspace = 8 * 2**20
    q, k, v = (mx.random.normal((1, h, length, 16)) for h in (2, 1, 1))
    c = mx.ones_like(q)
    mx.eval(q, k, v, c)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = with_gradients(q, k, v, c, mask="causal", workspace_bytes=workspace)
    mx.eval(results)
    extra = mx.get_peak_memory() - before - sum(a.nbytes for a in results)
    assert extra <= 1.15 * workspace + scratch(on_gpu())


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"queries": mx.zeros((2, 4, 8))}, {}, "queries"),
        ({"queries": mx.zeros((2, 4, 5, 9))}, {}, "queries and keys"),
        ({"keys": mx.zeros((2, 2, 6, 8))}, {}, "keys and values"),
        ({"queries": mx.zeros((2, 3, 5, 8))}, {}, "query heads"),
        ({"values": mx.zeros((2, 2, 5, 8), dtype=mx.int32)}, {}, "values"),
        ({"queries": mx.zeros((2, 4, 6, 8))}, {"mask": "causal"}, "more queries"),
        ({}, {"mask": "full"}, "mask"),
        ({}, {"mask": mx.zeros((5, 4))}, "mask"),
        ({}, {"mask": mx.zeros((5, 5), dtype=mx.int32)}, "mask"),
        ({}, {"window": 3}, "window"),
        ({}, {"mask": "causal", "window": 0}, "window"),
        ({}, {"workspace_bytes": -1}, "workspace_bytes"),
    ],
)
@pytest.mark.parametrize("function", [attention, attention_no_grad])
def test_errors_name_what_is_wrong(function, change, options, named):
    zeros = {name: mx.zeros((2, 4 if name == "queries" else 2, 5, 8)) for name in ("queries", "keys", "values")}
    with pytest.raises(ValueError, match=named):
        function(**(zeros | change), scale=1.0, **options)
