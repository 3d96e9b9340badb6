"""The CUDA kernel's place in the losses, with its definition in its place; and the kernel itself on a CUDA GPU."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.ops import divergence, logits, relation, relation_tile, row_kernel
from mlx_linearard.ops.logits import compare_logits, cross_entropy, logits_kl, token_nll
from mlx_linearard.ops.relation import relation_kl

CUDA = mx.cuda.is_available()
TINY = 100_000  # a workspace that forces many tiles


def normal(shape, seed, dtype=mx.float32):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def exact(s, r, weight, scales, causal):
    """[KL, E] of the rows in float64."""
    s, r = (np.array(v.astype(mx.float32), np.float64) * c for v, c in zip((s, r), scales.tolist(), strict=True))
    rows, columns = s.shape[-2:]
    seen = np.arange(columns) <= np.arange(columns - rows, columns)[:, None] if causal else np.ones((rows, columns))
    logs = []
    for z in (s, r):
        z = np.where(seen, z, -1e300)
        z = z - z.max(-1, keepdims=True)
        logs.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    p_s, p_t = np.exp(logs[0]), np.exp(logs[1])
    weight = np.broadcast_to(np.array(weight, np.float64), s.size // columns).reshape(s.shape[:-1])
    kl = np.where(seen, p_t * (logs[1] - logs[0]), 0).sum(-1) * weight
    return kl, (p_s - p_t) * weight[..., None]


CASES = [(1, 8, False), (7, 100, True), (5, 101, True), (3, 4099, False), (64, 64, True)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "causal"), CASES)
@pytest.mark.parametrize("each", [False, True], ids=["one weight", "a weight per row"])
@pytest.mark.parametrize(
    "function",
    [
        lambda *a, causal: row_kernel.definition(*a, causal),
        pytest.param(row_kernel.rows_kl, marks=pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")),
    ],
    ids=["definition", "kernel"],
)
def test_kl_and_error_of_rows_against_float64(function, rows, columns, causal, each, dtype):
    s, r = normal((2, rows, columns), 0, dtype), normal((2, rows, columns), 1, dtype)
    weight, scales = (mx.arange(2 * rows) + 0.5) if each else mx.array([2.0]), mx.array([0.7, 1.3])
    kl, error = function(s, r, weight, scales, causal=causal)
    want, want_error = exact(s, r, weight, scales, causal)
    assert np.array(kl) == pytest.approx(want, rel=2e-5, abs=2e-6 * weight.max().item())
    tolerance = 1e-5 if error.dtype == mx.float32 else 4e-3
    got = np.array(error.astype(mx.float32), np.float64)
    assert np.linalg.norm(got - want_error) <= tolerance * np.linalg.norm(want_error) + 1e-7


@pytest.fixture
def stand_in(monkeypatch):
    """The kernel's definition in its place, as on a CUDA GPU; counts the calls."""
    calls = []

    def rows_kl(s, r, weight, scales, *, causal=False, error=True):
        calls.append(s.shape)
        kl, e = row_kernel.definition(s, r, weight, scales, causal)
        return kl, e.astype(s.dtype)

    monkeypatch.setattr(row_kernel, "usable", lambda *_, **__: True)
    monkeypatch.setattr(row_kernel, "rows_kl", rows_kl)
    monkeypatch.setattr(relation_tile, "rows_kl", rows_kl)
    return calls


def relative(got, want):
    got, want = (np.array(a.astype(mx.float32), np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 17, 97, 256])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_relation_loss_by_the_kernel_is_that_by_operations(stand_in, monkeypatch, length, causal, gpu):
    for name in ("scaled", "causal", "sum"):
        monkeypatch.setattr(relation_tile, f"_fused_{name}", getattr(relation_tile, f"_{name}"))
    x, noise = normal((2, 3, length, 16), 0), normal((2, 3, length, 16), 1)

    def both():
        return mx.value_and_grad(lambda x: relation_kl(x, x + 0.3 * noise, causal=causal, workspace_bytes=TINY))(x)

    with monkeypatch.context() as patch:
        patch.setattr(row_kernel, "usable", lambda *_, **__: False)
        want, want_gradient = both()
        assert not stand_in
    monkeypatch.setattr(relation, "on_gpu", lambda: gpu)
    loss, gradient = both()
    assert stand_in  # on a GPU tiles have one block; in many blocks the operations run
    assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    assert length == 1 or relative(gradient, want_gradient) < 2e-5


def test_a_mask_is_for_the_operations(stand_in):
    x, y = normal((1, 2, 40, 8), 0), normal((1, 2, 40, 8), 1)
    relation_kl(x, y, mask=mx.arange(40)[None] > 3)
    assert not stand_in


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_vocabulary_losses_by_the_kernel_are_those_by_operations(stand_in, monkeypatch, dtype, temperature):
    x, y, w = (normal(shape, i, dtype) for i, shape in enumerate([(2, 23, 12), (2, 23, 12), (101, 12)]))
    mask = mx.arange(46).reshape(2, 23) % 3 > 0

    def run():
        def head(h):
            return h @ w.T

        def loss(x):
            return logits_kl(x, y, head, head, mask=mask, temperature=temperature, workspace_bytes=40_000)

        value, gradient = mx.value_and_grad(loss)(x)
        return [value, gradient, compare_logits(x, y, head, head, workspace_bytes=40_000).kl]

    with monkeypatch.context() as patch:
        patch.setattr(row_kernel, "usable", lambda *_, **__: False)
        want = run()
        assert not stand_in
    got = run()
    assert len(stand_in) > 4
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and relative(a, b) < (1e-5 if dtype == mx.float32 else 1e-2)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The code for a GPU without the kernel (Metal), on which mlx's cross-entropy accumulates in float32."""
    on_cpu = mx.fast.cross_entropy
    monkeypatch.setattr(mx.fast, "cross_entropy", lambda z, targets: on_cpu(z.astype(mx.float32), targets))
    monkeypatch.setattr(logits, "on_gpu", lambda: True)
    monkeypatch.setattr(row_kernel, "on_cuda", lambda: False)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_stages_of_a_gpu_compute_the_same(as_on_a_gpu, monkeypatch, dtype):
    """The arithmetic of a GPU without the kernel (Metal), here without fusing."""
    names = ("from_lse", "from_exponentials", "terms_from_lse", "terms_from_exponentials")
    for name in names:
        monkeypatch.setattr(divergence, f"_fused_{name}", getattr(divergence, f"_{name}"))
    x, y, w = (normal(shape, i, dtype) for i, shape in enumerate([(1, 30, 12), (1, 30, 12), (101, 12)]))
    targets = mx.random.randint(0, 101, (1, 30), key=mx.random.key(4))

    def head(h):
        return h @ w.T

    def run():
        kl, d_kl = mx.value_and_grad(lambda x: logits_kl(x, y, head, head, workspace_bytes=9000))(x)
        ce, d_ce = mx.value_and_grad(lambda x: cross_entropy(x, head, targets, workspace_bytes=9000))(x)
        each = compare_logits(x, y, head, head, targets, workspace_bytes=9000)
        return [kl, d_kl, ce, d_ce, each.kl, each.nll, token_nll(x, head, targets, workspace_bytes=9000)]

    got = run()
    monkeypatch.setattr(logits, "on_gpu", lambda: False)
    for a, b in zip(got, run(), strict=True):
        assert relative(a, b) < (1e-5 if dtype == mx.float32 else 1e-2)


@pytest.mark.usefixtures("compiling")
def test_the_stages_are_fused_under_a_gradient_too(as_on_a_gpu, tmp_path):
    """A compiled function runs operation by operation on traced arrays."""
    x, y, w = (normal(shape, i, mx.bfloat16) for i, shape in enumerate([(1, 30, 12), (1, 30, 12), (101, 12)]))

    def head(h):
        return h @ w.T

    results = mx.value_and_grad(lambda x: logits_kl(x, y, head, head))(x)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *results)  # nothing is evaluated
    assert '"Compiled' in (tmp_path / "graph.dot").read_text()


def test_a_kernel_that_fails_or_is_wrong_is_not_used(monkeypatch):
    def agrees(rows_kl):
        monkeypatch.setattr(row_kernel, "rows_kl", rows_kl)
        return row_kernel._agrees.__wrapped__(4, mx.float32, True, True)

    def right(s, r, weight, scales, *, causal, error):
        return row_kernel.definition(s, r, weight, scales, causal)

    def wrong(*arguments, **options):
        kl, error = right(*arguments, **options)
        return kl, error * 1.001

    def not_a_number(*arguments, **options):
        kl, error = right(*arguments, **options)
        return kl * mx.nan, error

    def fails(*_, **__):
        raise RuntimeError("cannot compile")

    assert agrees(right)
    assert not any(agrees(function) for function in (wrong, not_a_number, fails))


@pytest.mark.skipif(CUDA, reason="there is a CUDA GPU")
def test_without_cuda_the_kernel_is_not_tried():
    assert not row_kernel.usable(100, mx.float32)
