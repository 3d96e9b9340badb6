"""Feed-forward parts in chunks of positions: the same numbers as in one piece, within a workspace."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, mixtral

from mlx_linearard.machine import on_gpu
from mlx_linearard.models.layers import FEED_FORWARD
from mlx_linearard.ops.mlp import ALONE, ARRAYS, SMALLEST, active_width, chunk_size, in_chunks, peak_bytes, width_of
from mlx_linearard.ops.tiling import scratch

WIDTH = 384
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
}
MIXTURE = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": WIDTH // 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def part_of(config: dict) -> nn.Module:
    """The feed-forward part of a layer of a random model."""
    module = {"llama": llama, "mixtral": mixtral}[config["model_type"]]
    mx.random.seed(3)
    layer = module.Model(module.ModelArgs.from_dict(config)).layers[0]
    (name,) = [name for name in FEED_FORWARD if name in layer]
    layer.freeze()
    return layer[name]


def test_the_width_counts_the_chosen_experts() -> None:
    assert width_of(DENSE) == WIDTH
    assert active_width(MIXTURE) == WIDTH // 2 * 2
    assert width_of(MIXTURE) == 2 * (11 * (WIDTH // 2) // 8 + MIXTURE["hidden_size"])
    assert width_of({"hidden_size": 64}) == 256
    assert active_width({**MIXTURE, "moe_intermediate_size": 100}) == 200
    assert active_width({**MIXTURE, "moe_intermediate_size": 100, "n_shared_experts": 2}) == 400
    assert active_width({**MIXTURE, "moe_intermediate_size": 100, "shared_expert_intermediate_size": 50}) == 250


@pytest.mark.parametrize("positions", [1, SMALLEST, SMALLEST + 1, 1000])
def test_chunks_are_of_equal_length_and_fit(positions: int) -> None:
    workspace = ARRAYS * WIDTH * 4 * 200
    chunk = chunk_size(positions, WIDTH, 4, workspace)
    assert peak_bytes(positions, WIDTH, 4, workspace=workspace) <= workspace
    assert chunk == positions or ALONE * positions * WIDTH * 4 > workspace  # chunks only if needed
    assert chunk >= min(positions, SMALLEST)
    assert -(-positions // chunk) * chunk - positions < -(-positions // chunk)  # no chunk is shorter by more than one
    assert chunk_size(positions, WIDTH, 4, 1) == min(positions, chunk_size(positions, WIDTH, 4, 1)) <= SMALLEST


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("shape", [(1, 300), (2, 131)], ids=["one", "batch"])
def test_values_and_gradients_are_those_of_one_piece(config: dict, shape: tuple[int, int]) -> None:
    """Chunks against one piece, and for the dense part both against float64."""
    part = part_of(config)
    x, cotangent = (mx.random.normal((*shape, 64), key=mx.random.key(i)) for i in range(2))
    chunked = in_chunks(part, WIDTH, 1)  # SMALLEST positions per chunk
    (whole,), (whole_gradient,) = mx.vjp(part, [x], [cotangent])
    (out,), (gradient,) = mx.vjp(chunked, [x], [cotangent])
    assert out.shape == whole.shape and gradient.dtype == x.dtype
    np.testing.assert_allclose(np.array(out), np.array(whole), rtol=0, atol=2e-6 * float(mx.abs(whole).max()))
    np.testing.assert_allclose(
        np.array(gradient), np.array(whole_gradient), rtol=0, atol=2e-6 * float(mx.abs(whole_gradient).max())
    )
    if config is DENSE:
        want, want_gradient = exact(part, x, cotangent)
        assert relative(out, want) <= relative(whole, want) + 1e-7
        assert relative(gradient, want_gradient) <= relative(whole_gradient, want_gradient) + 1e-7


def test_one_chunk_is_computed_again_only_if_asked() -> None:
    part, (x, cotangent) = part_of(DENSE), (mx.random.normal((1, 50, 64), key=mx.random.key(i)) for i in range(2))
    results = []
    for recompute, runs in ((False, 1), (True, 2)):
        calls = []
        counted = in_chunks(lambda x, c=calls: c.append(x) or part(x), WIDTH, 1 << 30, recompute=recompute)
        results.append(mx.vjp(counted, [x], [cotangent]))
        assert len(calls) == runs
    for one, other in zip(*results, strict=True):
        assert mx.array_equal(one[0], other[0])


def exact(part: nn.Module, x: mx.array, cotangent: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """down(silu(gate x) * up x) and its gradient in float64."""
    gate, up, down = (np.array(part[name].weight, np.float64) for name in ("gate_proj", "up_proj", "down_proj"))
    x64, c64 = np.array(x, np.float64), np.array(cotangent, np.float64)
    g, u = x64 @ gate.T, x64 @ up.T
    s = 1 / (1 + np.exp(-g))
    d = c64 @ down
    return (g * s * u) @ down.T, (d * u * (s + g * s * (1 - s))) @ gate + (d * g * s) @ up


def relative(got: mx.array, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.array(got, np.float64) - want) / np.linalg.norm(want))


def test_a_gradient_holds_a_chunk_and_not_the_sequence() -> None:
    """Memory beyond input, output and gradient grows far more slowly with length than in one piece."""

    def peak(function, length: int) -> int:
        x = mx.random.normal((1, length, 64))
        mx.eval(x)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.vjp(function, [x], [x]))
        return mx.get_peak_memory() - before

    part = part_of(DENSE)
    mx.eval(part.parameters())
    chunked = in_chunks(part, WIDTH, ARRAYS * WIDTH * 4 * 512)
    slopes = [(peak(f, 8192) - peak(f, 4096)) / (4096 * WIDTH * 4) for f in (part, chunked)]
    assert slopes[0] > ALONE  # the activations of the sequence
    assert slopes[1] < 1.5  # inputs, results and their parts, six of 64 to WIDTH = 384
    beyond = peak(chunked, 4096) - 6 * 4096 * 64 * 4
    assert beyond < 1.15 * ARRAYS * WIDTH * 4 * 512 + scratch(on_gpu())
