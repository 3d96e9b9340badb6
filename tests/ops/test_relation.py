"""The relation loss against float64: shapes, masks, dtypes and transformations."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_linearard.machine import on_gpu
from mlx_linearard.ops import divergence, relation, relation_tile, row_kernel
from mlx_linearard.ops.relation import relation_kl, relation_kl_dense, relation_kl_with_grad
from mlx_linearard.ops.tiling import scratch

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
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, y, causal=causal, workspace_bytes=workspace))(x)
    want, want_gradient = exact(x, y, causal=causal)
    assert abs(loss.item() - want) <= 1e-5 * want + 1e-7
    assert np.linalg.norm(np.array(gradient) - want_gradient) <= 1e-5 * np.linalg.norm(want_gradient) + 1e-7


def check(x, y, mask=None, tolerance=(1e-5, 1e-7, 1e-5), dense=True, **options):
    """Ours and the dense definition against float64: (relative loss, absolute loss per row, gradient)."""
    loss_rel, loss_abs, gradient_rel = tolerance
    workspace = options.pop("workspace_bytes", None)
    scales = {"scale_s": options.get("scale_student"), "scale_t": options.get("scale_teacher")}
    rest = {k: v for k, v in options.items() if not k.startswith("scale")}
    want, want_gradient = exact(x, y, mask=mask, **scales, **rest)
    ours, ours_gradient = mx.value_and_grad(
        lambda x: relation_kl(x, y, mask=mask, workspace_bytes=workspace, **options)
    )(x)
    naive, naive_gradient = mx.value_and_grad(lambda x: relation_kl_dense(x, y, mask=mask, **options))(x)
    allowed = max(loss_rel * want, loss_abs)
    error, gradient_error = abs(ours.item() - want), relative(ours_gradient, want_gradient)
    assert error <= allowed
    assert gradient_error <= gradient_rel or np.linalg.norm(want_gradient) < 1e-9
    if dense:  # never worse than the definition in the same dtype, beyond the last bits of float32
        assert error <= abs(naive.item() - want) + 2e-7 * max(want, 1)
        assert gradient_error <= relative(naive_gradient, want_gradient) + 1e-6
    return ours, ours_gradient


@pytest.mark.parametrize("length", [513, 1000])
def test_long_and_awkward_lengths(length):
    x, y = vectors((1, 2, length, 8))
    check(x, y, workspace_bytes=2_000_000)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_tiny_divergences(noise):
    """Below 1e-3 nats per row, loss and gradient (as a norm) are right within 1e-7."""
    x, y = vectors((1, 2, 97, 16), noise=noise)
    want, want_gradient = exact(x, y)
    assert want < 1e-3
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, y, workspace_bytes=TINY))(x)
    assert abs(loss.item() - want) <= 1e-7
    assert abs(loss.item() - want) <= abs(relation_kl_dense(x, y).item() - want) + 1e-8
    assert np.linalg.norm(np.array(gradient, dtype=np.float64) - want_gradient) <= 1e-7


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("workspace", [None, TINY])
def test_half_precision_inputs(dtype, workspace):
    x, y = vectors((2, 2, 97, 16), dtype=dtype)
    loss, gradient = check(x, y, tolerance=(1e-3, 1e-7, 4e-3), workspace_bytes=workspace)
    assert loss.dtype == mx.float32 and gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_peaked_relations_stay_finite(dtype, causal):
    """Scores with a standard deviation of 30."""
    x, y = vectors((1, 2, 97, 16), std=1.0, dtype=dtype)
    scales = {"scale_student": 30 / 4, "scale_teacher": 30 / 4}
    loss, gradient = check(x, y, tolerance=(1e-5, 1e-7, 4e-3), causal=causal, dense=False, **scales)
    assert mx.all(mx.isfinite(gradient)).item() and loss.item() > 0.1


def padding(kind):
    masks = {
        "right": [[True] * 30 + [False] * 10, [True] * 40],
        "left": [[False] * 15 + [True] * 25, [False] + [True] * 39],
        "one sequence has nothing": [[False] * 40, [True] * 40],
        "holes": [[i % 3 != 1 for i in range(40)], [i % 7 > 2 for i in range(40)]],
        "one row": [[False] * 39 + [True], [False] * 40],
    }
    return mx.array(masks[kind])


@pytest.mark.parametrize("workspace", [None, 20_000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["right", "left", "one sequence has nothing", "holes", "one row"])
def test_masks(kind, causal, workspace):
    x, y = vectors((2, 3, 40, 8))
    _, gradient = check(x, y, mask=padding(kind), causal=causal, workspace_bytes=workspace)
    assert not mx.any(gradient * ~padding(kind)[:, None, :, None]).item()  # invalid positions get no gradient


def test_no_valid_row_is_zero_and_not_nan():
    x, y = vectors((2, 3, 40, 8))
    nothing = mx.zeros((2, 40), dtype=mx.bool_)
    for function in (relation_kl, relation_kl_dense):
        loss, gradient = mx.value_and_grad(lambda x, f=function: f(x, y, mask=nothing))(x)
        assert loss.item() == 0 and not mx.any(gradient).item()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scales_reduction_and_head_sizes(reduction):
    x, y = vectors((2, 3, 33, 16), dim_teacher=24)
    check(x, y, scale_student=0.11, scale_teacher=0.4, reduction=reduction, workspace_bytes=TINY)


def test_cotangent_and_no_gradient_to_the_teacher():
    x, y = vectors((1, 2, 33, 16))
    once = mx.grad(relation_kl)(x, y)
    scaled, teacher = mx.grad(lambda x, y: -2.5 * relation_kl(x, y), argnums=(0, 1))(x, y)
    assert np.array(scaled) == pytest.approx(-2.5 * np.array(once), rel=1e-6)
    assert mx.any(once).item() and not mx.any(teacher).item()


def test_half_precision_gradient_is_rounded_once():
    x, y = vectors((1, 2, 33, 16), dtype=mx.bfloat16)
    full = mx.grad(lambda x: relation_kl(x.astype(mx.float32), y))(x.astype(mx.float32))
    got = mx.grad(lambda x: relation_kl(x, y))(x)
    assert mx.mean(got == full.astype(mx.bfloat16)).item() > 0.98  # up to ties moved by the last float32 bit


@pytest.mark.usefixtures("compiling")
def test_every_way_to_the_gradient_agrees():
    x, y = vectors((1, 2, 33, 8))

    def objective(x, y):
        return 0.7 * relation_kl(mx.tanh(x), y, workspace_bytes=20_000)

    want = np.array(mx.grad(objective)(x, y))
    assert np.array(mx.compile(mx.grad(objective))(x, y)) == pytest.approx(want, rel=1e-5, abs=1e-8)
    assert np.array(mx.grad(mx.checkpoint(objective))(x, y)) == pytest.approx(want, rel=1e-5, abs=1e-8)
    assert np.array(mx.grad(mx.compile(objective))(x, y)) == pytest.approx(want, rel=1e-5, abs=1e-8)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = x

    layer = Layer()
    loss, gradient = nn.value_and_grad(layer, lambda layer, y: objective(layer.x, y))(layer, y)
    assert np.array(gradient["x"]) == pytest.approx(want, rel=1e-5, abs=1e-8)
    assert loss.item() == pytest.approx(objective(x, y).item(), rel=1e-6)


def test_loss_alone_and_loss_with_its_gradient():
    x, y = vectors((2, 3, 33, 16))
    loss, gradient = relation_kl_with_grad(x, y, workspace_bytes=TINY)
    want, want_gradient = mx.value_and_grad(relation_kl)(x, y)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert np.array(gradient) == pytest.approx(np.array(want_gradient), rel=1e-4, abs=1e-8)
    assert relation_kl(x, y, needs_grad=False).item() == pytest.approx(want.item(), rel=1e-6)
    assert not mx.any(mx.grad(lambda x: relation_kl(x, y, needs_grad=False))(x)).item()


def test_transposed_views_are_accepted():
    """As attention gets them: (B, T, H, D) transposed."""
    x, y = vectors((2, 33, 3, 16))
    x, y = x.swapaxes(1, 2), y.swapaxes(1, 2)
    check(x, y, workspace_bytes=TINY)


def test_the_stages_of_a_gpu_compute_the_same(monkeypatch):
    """The arithmetic and the order of tiles on a GPU, here without fusing."""
    x, y = vectors((2, 3, 97, 16))
    mask = mx.arange(194).reshape(2, 97) % 5 > 0
    for module, names in (
        (divergence, ("from_lse", "from_exponentials")),
        (relation_tile, ("scaled", "causal", "sum")),
    ):
        for name in names:
            monkeypatch.setattr(module, f"_fused_{name}", getattr(module, f"_{name}"))
    monkeypatch.setattr(relation, "on_gpu", lambda: True)
    for causal in (True, False):
        check(x, y, mask=mask, causal=causal, workspace_bytes=TINY)
        check(x.astype(mx.bfloat16), y, (None), (1e-3, 1e-7, 4e-3), causal=causal, workspace_bytes=TINY)


@pytest.mark.usefixtures("compiling")
def test_the_stages_of_a_gpu_are_fused_under_a_gradient_too(monkeypatch, tmp_path):
    """A compiled function runs operation by operation on traced arrays, with several times the memory traffic."""
    monkeypatch.setattr(relation, "on_gpu", lambda: True)
    monkeypatch.setattr(row_kernel, "on_cuda", lambda: False)  # there a kernel takes the place of the stages
    x, y = vectors((1, 2, 64, 16))
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, y))(x)
    mx.export_to_dot(str(tmp_path / "graph.dot"), loss, gradient)  # nothing is evaluated
    assert (tmp_path / "graph.dot").read_text().count('"Compiled') >= 4


def extra_memory(workspace, *shape):
    """Peak memory of loss and gradient beyond inputs and results, in bytes."""
    x, y = vectors(shape)
    mx.eval(x, y)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = mx.value_and_grad(lambda x: relation_kl(x, y, workspace_bytes=workspace))(x)
    mx.eval(results)
    return mx.get_peak_memory() - before - sum(a.nbytes for a in results)


def allowed_memory(workspace, length, dim):
    """The workspace, or on a GPU that of the smallest tile, and what products take beside it."""
    planned = relation.peak_bytes(1, 2, length, dim, dim, workspace, False, on_gpu())
    return 1.15 * max(workspace, planned if on_gpu() else 0) + scratch(on_gpu())


@pytest.mark.parametrize("length", [1024, 2048])
def test_memory_beyond_the_results_is_the_workspace(length):
    """At most 1.15 x workspace; the dense definition needs several T x T."""
    assert extra_memory(8 * 2**20, 1, 2, length, 16) <= allowed_memory(8 * 2**20, length, 16)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 8192, 16384])
def test_memory_stays_the_workspace_at_length(length):
    assert extra_memory(32 * 2**20, 1, 2, length, 64) <= allowed_memory(32 * 2**20, length, 64)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("workspace", [2**20, 2**28, 2**30])
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 1, 1), (4, 8, 100), (1, 32, 4096), (2, 8, 131072)])
def test_tiles_cover_every_row_and_column_once(batch, heads, length, workspace, gpu):
    tiles, _ = relation.choose_tiles(batch, heads, length, 128, 128, workspace, True, gpu, causal=True)
    pairs = [(b, h) for bs, hs in tiles.groups(batch, heads) for b in range(batch)[bs] for h in range(heads)[hs]]
    assert sorted(pairs) == [(b, h) for b in range(batch) for h in range(heads)]
    rows = list(tiles.row_tiles(length))[::-1]
    assert rows[0].start == 0 and rows[-1].stop == length
    assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
    for tile in rows[:: max(1, len(rows) // 7)]:  # the order from the last tile to the first relies on this
        blocks = tiles.column_blocks(tile.stop)
        assert blocks[0].start == 0 and blocks[-1].stop == tile.stop and blocks[-1].start <= tile.start


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"student": mx.zeros((3, 4, 8))}, "student"),
        ({"teacher": mx.zeros((1, 2, 5, 8))}, "student and teacher"),
        ({"teacher": mx.zeros((1, 3, 4, 8))}, "student and teacher"),
        ({"student": mx.zeros((1, 2, 4, 8), dtype=mx.int32)}, "student"),
        ({"mask": mx.ones((1, 5), dtype=mx.bool_)}, "mask"),
        ({"mask": mx.ones((1, 4))}, "mask"),
        ({"reduction": "max"}, "reduction"),
        ({"workspace_bytes": 0}, "workspace_bytes"),
    ],
)
@pytest.mark.parametrize("function", [relation_kl, relation_kl_dense, relation_kl_with_grad])
def test_errors_name_what_is_wrong(function, arguments, named):
    fine = {"student": mx.zeros((1, 2, 4, 8)), "teacher": mx.zeros((1, 2, 4, 8))}
    with pytest.raises(ValueError, match=named):
        function(**(fine | arguments))
