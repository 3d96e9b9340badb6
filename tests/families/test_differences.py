"""Families that mlx-lm computes otherwise than transformers: a note says so, and the difference is small."""

from __future__ import annotations

from pathlib import Path

import family_models
import numpy as np
import pytest
from mlx_linearard.convert.hf import to_hf
from mlx_linearard.convert.verify import verify
from test_families import divergence, logits, torch_logits_of
from tiny import reload

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.plan import inspect_model, plan_run
from mlx_linearard.errors import UserError
from mlx_linearard.machine import Machine
from mlx_linearard.rope import FAMILIES, difference, disagreement, scale_rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 2.0, "beta_slow": 0.5}
UNROUNDED = {**YARN, "truncate": False}


def test_a_note_stands_where_something_differs() -> None:
    noted = {kind for kind in FAMILIES if difference(family_models.config(kind))}
    assert noted == {"gemma", "starcoder2", "internlm2"}
    gpt = family_models.config("gpt_oss", rope_scaling=UNROUNDED)
    assert "truncate" in str(difference(gpt))
    assert difference(family_models.config("gpt_oss", rope_scaling=YARN)) is None
    assert disagreement(gpt) is None  # served all the same, as its makers publish it
    assert scale_rope(gpt, "ntk", 2.0)["rope_parameters"]["truncate"] is False
    assert "truncate" in str(disagreement(family_models.config("llama", rope_scaling=UNROUNDED)))


@pytest.mark.parametrize(
    ("kind", "scaling"), [("gemma", None), ("starcoder2", None), ("internlm2", None), ("gpt_oss", UNROUNDED)]
)
def test_training_and_conversion_print_the_same_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, scaling: dict | None
) -> None:
    folder = family_models.write(tmp_path / "m", kind, rope_scaling=scaling)
    note = str(difference(family_models.config(kind, rope_scaling=scaling)))
    config = DistillConfig(model=str(folder), method="ntk", lora_rank=4)
    plan = plan_run(config, inspect_model(config, folder), Machine("test", False, 1 << 40, 1000.0))
    assert note.startswith("note: the result is") and note in plan.lines()
    if not FAMILIES[kind].architecture:
        with pytest.raises(UserError, match="transformers has no internlm2 model"):
            to_hf(folder, tmp_path / "theirs", progress=print)
        assert capsys.readouterr().out == ""
        return
    to_hf(folder, tmp_path / "theirs", progress=print)
    assert note in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "dtype", "noted"), [(4, None, True), (4, "float32", False), (None, None, False)])
def test_dequantizing_to_half_precision_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int | None, dtype: str | None, noted: bool
) -> None:
    folder = family_models.write(tmp_path / "m", "llama", bits=bits, dtype="bfloat16")
    to_hf(folder, tmp_path / "theirs", dtype=dtype, progress=print)
    assert ("rounded to bfloat16; --dtype float32 keeps" in capsys.readouterr().out) == noted
    if bits and not noted:
        same = verify(folder, tmp_path / "theirs", tokens=64)
        assert same.logits < 1e-4, "the values are kept"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "why"), [("gpt_oss", "does not fit"), ("qwen3_5", "as the text_config of qwen3_5")])
def test_what_mlx_lm_cannot_read_is_still_compared(tmp_path: Path, kind: str, why: str) -> None:
    """mlx-lm reads gpt-oss's experts from transformers' files only in mxfp4, and qwen3_5_text only inside qwen3_5."""
    folder = family_models.write(tmp_path / "m", kind)
    theirs = to_hf(folder, tmp_path / "theirs")
    assert verify(folder, theirs, tokens=64, reference=True).logits < 1e-3
    with pytest.raises(UserError, match=why):
        verify(folder, theirs, tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scaling"), [("gemma", None), ("starcoder2", None), ("gpt_oss", UNROUNDED)])
def test_the_difference_is_small(tmp_path: Path, kind: str, scaling: dict | None) -> None:
    folder = family_models.write(tmp_path / "m", kind, rope_scaling=scaling)
    ours, theirs = logits(reload(folder)), torch_logits_of(folder, tmp_path / "theirs")
    print(kind, np.abs(ours - theirs).max(), divergence(ours, theirs))
    assert np.abs(ours - theirs).max() > 1e-5
    assert divergence(ours, theirs) < (5e-3 if scaling else 1e-4)  # nats per token
