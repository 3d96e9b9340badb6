"""Experts in half precision: computed where the device cannot, and exported as they are."""

from __future__ import annotations

from pathlib import Path

import family_models
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear
from test_families import KL, TOKENS, distilled, divergence, logits
from tiny import reload

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.plan import inspect_model, plan_run
from mlx_linearard.export.fuse import write_fused
from mlx_linearard.export.verify import student_logits, verify_export
from mlx_linearard.machine import Machine, on_gpu
from mlx_linearard.models.experts import Float32Experts, multiplies_halves

HALVES = ["bfloat16", "float16"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_the_product_is_that_of_float32_rounded_once(dtype: str, bias: bool) -> None:
    kind = getattr(mx, dtype)
    plain = SwitchLinear(8, 6, 4, bias=bias)
    if bias:
        plain.bias = mx.random.normal((4, 6))
    x, chosen = mx.random.normal((10, 1, 1, 8)).astype(kind), mx.random.randint(0, 4, (10, 2))
    plain.set_dtype(kind)
    found = Float32Experts(plain)(x, chosen)
    assert found.dtype == kind
    weights, rows = np.array(plain.weight.astype(mx.float32)), np.array(x.astype(mx.float32))
    expected = np.einsum("tabi,tkoi->tkbo", rows, weights[np.array(chosen)].astype(np.float64))
    expected = mx.array(expected.astype(np.float32)).astype(kind)
    if bias:
        expected = expected + plain.bias[chosen][..., None, :]
    assert mx.allclose(found.astype(mx.float32), expected.astype(mx.float32), rtol=1e-5, atol=1e-5).item() or (
        kind != mx.float32 and (found != expected).sum().item() <= 2  # a sum in another order may round the other way
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_mixture_is_trained_in_half_precision_and_exported_so(tmp_path: Path, family: str, dtype: str) -> None:
    folder = family_models.write(tmp_path / "native", family, dtype=dtype)
    pair, losses = distilled(folder, family, "logits")
    assert losses[-1] < losses[0]
    write_fused(pair, tmp_path / "fused")
    before, after = (mx.load(str(place / "model.safetensors")) for place in (folder, tmp_path / "fused"))
    assert {array.dtype for array in after.values()} == {getattr(mx, dtype)}
    experts = [name for name in before if "experts" in name or "switch_mlp" in name]
    assert experts and all(mx.array_equal(before[name], after[name]).item() for name in experts)
    exported = reload(tmp_path / "fused")
    exported.set_dtype(mx.float32)  # stock mlx-lm, in a dtype that every device multiplies
    assert divergence(logits(pair.student), logits(exported)) < KL
    verify_export(tmp_path / "fused", TOKENS, student_logits(pair.student, TOKENS)).check(tmp_path / "fused")


def test_a_run_says_that_it_computes_experts_in_float32(tmp_path: Path) -> None:
    folder = family_models.write(tmp_path / "native", "qwen3_moe", dtype="bfloat16")
    machine = Machine("test", on_gpu(), 1 << 40, 1000.0)

    def lines(dtype: str, folder: Path = folder) -> tuple[str, int]:
        config = DistillConfig(model=str(folder), method="ntk", lora_rank=4, dtype=dtype)
        plan = plan_run(config, inspect_model(config, folder), machine)
        return "\n".join(plan.lines()), plan.step.copied

    told, copied = lines("bfloat16")
    assert ("experts: this device multiplies them in float32 only" in told) == (not multiplies_halves())
    assert copied == (0 if multiplies_halves() else 3 * 4 * 64 * 64 * 4)  # three projections of four experts, 64 wide
    quantized = family_models.write(tmp_path / "quantized", "qwen3_moe", dtype="bfloat16", bits=4)
    for told, copied in (lines("float32"), lines("bfloat16", quantized)):
        assert "experts:" not in told and copied == 0
