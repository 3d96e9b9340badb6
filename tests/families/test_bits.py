"""Bases of every dtype and bit width, with every kind of training: it works, or it is refused where mlx-lm cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_models
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model, save_model
from test_families import CLOSE, KL, distilled, divergence, logits
from tiny import reload

from mlx_linearard.errors import UserError
from mlx_linearard.export.fuse import write_fused

BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    **{f"{bits}-bit": {"bits": bits} for bits in (8, 6, 5, 4, 3)},
    "mixture": {"bits": 4, "others": 6},  # as mlx-lm's mixed_4_6: more bits for v and down
    "mxfp4": {"bits": 4, "mode": "mxfp4"},
}
KINDS = ("lora", "dora", "full")
REFUSED = {("dora", bits) for bits in (6, 5, 3)} | {("full", bits) for bits in (8, 6, 5, 4, 3)}


def base(
    folder: Path, kind: str, *, dtype: str = "float32", bits: int = 0, others: int = 0, mode: str = "affine"
) -> Path:
    """The tiny model of a family, quantized by mlx-lm itself."""
    family_models.write(folder, kind, dtype=dtype)
    if not bits:
        return folder
    model, config = load_model(folder)

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        more = others and any(name in path for name in ("v_proj", "down_proj"))
        return {"group_size": 32, "bits": others, "mode": mode} if more else hasattr(module, "to_quantized")

    model, config = quantize_model(model, config, 32, bits, mode=mode, quant_predicate=predicate)
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_a_base_is_trained_and_served(tmp_path: Path, name: str, kind: str) -> None:
    settings = BASES[name]
    folder = base(tmp_path / "native", "qwen3", **settings)
    widths = {settings.get("bits", 0), settings.get("others", settings.get("bits", 0))}
    if any((kind, bits) in REFUSED for bits in widths):
        with pytest.raises(UserError, match=f"--fine-tune-type {kind} cannot"):
            distilled(folder, "qwen3", "relation", fine_tune_type=kind)
        return
    pair, losses = distilled(folder, "qwen3", "relation", fine_tune_type=kind)
    assert losses[-1] < losses[0]
    write_fused(pair, tmp_path / "fused")
    student, served = logits(pair.student), logits(reload(tmp_path / "fused"))
    if settings.get("dtype") in ("bfloat16", "float16"):
        assert divergence(student, served) < KL
    else:
        assert np.abs(student - served).max() < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BASES if BASES[name].get("bits")])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_quantized_experts_stay_as_they_are(tmp_path: Path, family: str, name: str) -> None:
    """Distillation trains attention only: every other array of the export is that of the base, bit for bit."""
    folder = base(tmp_path / "native", family, **BASES[name])
    pair, _ = distilled(folder, family, "logits")
    write_fused(pair, tmp_path / "fused")
    before, after = (dict(mx.load(str(place / "model.safetensors"))) for place in (folder, tmp_path / "fused"))
    kept = [key for key in before if not any(part in key for part in ("q_proj", "k_proj", "v_proj"))]
    assert any("experts" in key or "switch_mlp" in key for key in kept)
    assert all(mx.array_equal(before[key], after[key]).item() for key in kept)
