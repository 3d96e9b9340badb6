"""The chunked vocabulary losses against the same losses over all logits, in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.machine import on_gpu
from mlx_linearard.ops.logits import (
    compare_logits,
    cross_entropy,
    gain_cross_entropy,
    logits_kl,
    token_nll,
    token_scores,
)
from mlx_linearard.ops.tiling import scratch

SMALL = 20_000  # a workspace for a few positions: there are many chunks, and the last is shorter
VOCABULARY, SIZE = 101, 12


def hidden(seed, shape=(2, 23, SIZE)):
    return mx.random.normal(shape, key=mx.random.key(seed))


def weight(seed, rows=VOCABULARY):
    return mx.random.normal((rows, SIZE), key=mx.random.key(seed)) * 0.5


def linear(w):
    return lambda h: h @ w.T


def log_softmax(hidden, w, temperature=1.0):
    z = np.array(hidden, dtype=np.float64) @ np.array(w, dtype=np.float64).T / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def counted(mask, shape, reduction):
    mask = np.ones(shape) if mask is None else np.array(mask, dtype=np.float64)
    return mask / max(mask.sum(), 1) if reduction == "mean" else mask


MASK = mx.arange(46).reshape(2, 23) % 3 > 0


@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_logits_kl_against_float64(workspace, mask, reduction, temperature):
    x, y, w, v = hidden(0), hidden(1), weight(2), weight(3)
    loss, gradient = mx.value_and_grad(
        lambda x: (
            2.5
            * logits_kl(
                x,
                y,
                linear(w),
                linear(v),
                mask=mask,
                temperature=temperature,
                reduction=reduction,
                workspace_bytes=workspace,
            )
        )
    )(x)
    log_s, log_t = log_softmax(x, w, temperature), log_softmax(y, v, temperature)
    weights = counted(mask, (2, 23), reduction) * 2.5
    want = ((np.exp(log_t) * (log_t - log_s)).sum(-1) * weights).sum() * temperature**2
    error = (np.exp(log_s) - np.exp(log_t)) * weights[..., None] * temperature
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert np.array(gradient) == pytest.approx(error @ np.array(w, np.float64), rel=1e-4, abs=1e-5 * weights.max())


@pytest.mark.parametrize("workspace", [None, SMALL])
@pytest.mark.parametrize("mask", [None, MASK])
def test_cross_entropy_against_float64(workspace, mask):
    x, w = hidden(0), weight(2)
    targets = mx.random.randint(0, VOCABULARY, (2, 23), key=mx.random.key(4))
    loss, gradient = mx.value_and_grad(
        lambda x: cross_entropy(x, linear(w), targets, mask=mask, workspace_bytes=workspace)
    )(x)
    log_p = log_softmax(x, w)
    onehot = np.eye(VOCABULARY)[np.array(targets)]
    weights = counted(mask, (2, 23), "mean")
    assert loss.item() == pytest.approx(-((log_p * onehot).sum(-1) * weights).sum(), rel=1e-5)
    want = ((np.exp(log_p) - onehot) * weights[..., None]) @ np.array(w, np.float64)
    assert np.array(gradient) == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_comparison_at_each_position():
    x, w, targets = hidden(0), weight(2), mx.random.randint(0, VOCABULARY, (2, 23), key=mx.random.key(4))
    y, v = x + 0.2 * hidden(1), w
    got = compare_logits(x, y, linear(w), linear(v), targets, workspace_bytes=SMALL)
    log_s, log_t = log_softmax(x, w), log_softmax(y, v)
    nll = -np.take_along_axis(log_s, np.array(targets)[..., None], -1)[..., 0]
    assert np.array(got.nll) == pytest.approx(nll, rel=1e-5)
    assert np.array(got.kl) == pytest.approx((np.exp(log_t) * (log_t - log_s)).sum(-1), rel=1e-4, abs=1e-6)
    agreement = log_s.argmax(-1) == log_t.argmax(-1)
    assert 0 < agreement.sum() < agreement.size  # both values occur
    assert np.array_equal(np.array(got.agreement), agreement)
    assert np.array(token_nll(x, linear(w), targets, workspace_bytes=SMALL)) == pytest.approx(nll, rel=1e-5)
    assert compare_logits(x, y, linear(w), linear(v)).nll is None


@pytest.mark.parametrize("workspace", [None, SMALL])
def test_scores_of_tokens_against_float64(workspace):
    x, w = hidden(0), weight(1)
    logs = log_softmax(x, w)
    targets = mx.array(np.where(np.arange(46).reshape(2, 23) % 2, logs.argmax(-1), 7))
    scores = token_scores(x, linear(w), targets, workspace_bytes=workspace)
    own = np.array(targets)
    assert np.array(scores.nll) == pytest.approx(-np.take_along_axis(logs, own[..., None], -1)[..., 0], abs=1e-5)
    assert (np.array(scores.first) == (logs.argmax(-1) == own)).all() and scores.finite.all().item()
    x[1, 5, 3] = float("nan")
    finite = np.array(token_scores(x, linear(w), targets, workspace_bytes=workspace).finite)
    assert finite.sum() == 45 and not finite[1, 5]


def test_quantized_and_capped_heads_get_their_gradient():
    wide = (1, 9, 64)
    x, y, w = hidden(0, wide), hidden(1, wide), mx.random.normal((VOCABULARY, 64), key=mx.random.key(2))
    quantized = mx.quantize(w)

    def head(h):
        return 5 * mx.tanh(mx.quantized_matmul(h, *quantized) / 5)

    full = mx.dequantize(*quantized)
    got = mx.grad(lambda x: logits_kl(x, y, head, head, workspace_bytes=SMALL))(x)

    def dense(x):
        log_s, log_t = (z - mx.logsumexp(z, -1, keepdims=True) for z in (5 * mx.tanh(a @ full.T / 5) for a in (x, y)))
        return (mx.exp(log_t) * (log_t - log_s)).sum(-1).mean()

    assert np.array(got) == pytest.approx(np.array(mx.grad(dense)(x)), rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("transform", [mx.compile, mx.checkpoint], ids=["compile", "checkpoint"])
def test_inside_transformations(transform):
    x, y, w = hidden(0), hidden(1), weight(2)
    targets = mx.random.randint(0, VOCABULARY, (2, 23), key=mx.random.key(4))

    def loss(x, y):
        kl = logits_kl(x, y, linear(w), linear(w), workspace_bytes=SMALL)
        return kl + 0.5 * cross_entropy(x, linear(w), targets, mask=MASK, workspace_bytes=SMALL)

    want = mx.grad(loss)(x, y)
    inside = transform(loss)
    got = mx.grad(inside)(x, y) if transform is mx.checkpoint else mx.compile(mx.grad(loss))(x, y)
    assert np.array(got) == pytest.approx(np.array(want), rel=1e-5, abs=1e-7)


def test_half_precision_and_no_counted_position():
    x, y, w = (a.astype(mx.bfloat16) for a in (hidden(0), hidden(1), weight(2)))
    nothing = mx.zeros((2, 23), dtype=mx.bool_)
    loss, gradient = mx.value_and_grad(lambda x: logits_kl(x, y, linear(w), linear(w), mask=nothing))(x)
    assert loss.item() == 0 and not mx.any(gradient).item()
    assert loss.dtype == mx.float32 and gradient.dtype == mx.bfloat16
    assert mx.any(mx.grad(lambda x: logits_kl(x, y, linear(w), linear(w)))(x)).item()


@pytest.mark.parametrize("workspace", [None, SMALL])
def test_gain_cross_entropy_against_float64(workspace):
    x, w = hidden(0), weight(2)
    targets = mx.random.randint(0, VOCABULARY, (2, 23), key=mx.random.key(4))
    baseline = 4 + 2 * mx.random.normal((2, 23), key=mx.random.key(5))
    loss, gradient = mx.value_and_grad(
        lambda x: 2.5 * gain_cross_entropy(x, linear(w), targets, baseline, workspace_bytes=workspace)
    )(x)
    log_p, at = log_softmax(x, w), np.array(targets)[..., None]
    nll = -np.take_along_axis(log_p, at, -1)[..., 0]
    weights = np.minimum(np.exp(np.array(baseline, np.float64) - nll), 5.0)
    assert (weights == 5.0).any() and (weights < 1.0).any()
    weights /= weights.sum()
    assert loss.item() == pytest.approx(2.5 * (weights * nll).sum(), rel=1e-6)
    error = np.exp(log_p)
    np.put_along_axis(error, at, np.take_along_axis(error, at, -1) - 1, -1)
    expected = 2.5 * (error * weights[..., None]) @ np.array(w, np.float64)
    assert np.abs(np.array(gradient) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, h: logits_kl(x[0], x[0], h, h), "hidden"),
        (lambda x, h: logits_kl(x, x[:, :3], h, h), "teacher_hidden"),
        (lambda x, h: logits_kl(x, x, h, h, mask=MASK[:, :3]), "mask"),
        (lambda x, h: logits_kl(x, x, h, h, reduction="max"), "reduction"),
        (lambda x, h: logits_kl(x, x, h, h, temperature=0), "temperature"),
        (lambda x, h: logits_kl(x, x, h, h, workspace_bytes=0), "workspace_bytes"),
        (lambda x, h: cross_entropy(x, h, mx.zeros((2, 5), dtype=mx.int32)), "targets"),
        (lambda x, h: gain_cross_entropy(x, h, MASK.astype(mx.int32), mx.zeros((2, 5))), "baseline"),
        (lambda x, h: cross_entropy(x[:, :0], h, mx.zeros((2, 0), dtype=mx.int32)), "no positions"),
    ],
)
def test_errors_name_what_is_wrong(call, named):
    with pytest.raises(ValueError, match=named):
        call(hidden(0), linear(weight(2)))


def test_memory_is_the_workspace_and_not_the_logits():
    """Forward and backward over 700 positions and 20000 tokens: one array of logits is 53 MiB."""
    workspace = 16 * 2**20
    x, y = (mx.random.normal((1, 700, 16), key=mx.random.key(i)) for i in range(2))
    w = mx.random.normal((20_000, 16), key=mx.random.key(2))
    targets = mx.zeros((1, 700), dtype=mx.int32)
    calls = [
        lambda: mx.grad(lambda x: logits_kl(x, y, linear(w), linear(w), workspace_bytes=workspace))(x),
        lambda: mx.grad(lambda x: cross_entropy(x, linear(w), targets, workspace_bytes=workspace))(x),
        lambda: mx.grad(lambda x: gain_cross_entropy(x, linear(w), targets, targets * 1.0, workspace_bytes=workspace))(
            x
        ),
        lambda: list(compare_logits(x, y, linear(w), linear(w), targets, workspace_bytes=workspace)),
        lambda: token_nll(x, linear(w), targets, workspace_bytes=workspace),
    ]
    for call in calls:
        mx.eval(x, y, w, targets)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call())
        assert mx.get_peak_memory() - before <= 1.25 * workspace + scratch(on_gpu())
