"""The memory plan against what loading really takes, and its parts against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from tiny import CONFIG, tiny_model

from mlx_linearard.memory import Shape, plan_memory
from mlx_linearard.pair import load_pair

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 4096}
PLAIN = {
    "tokens": 64, "seq_len": 64, "dtype": "float32", "fine_tune_type": "lora", "rank": 8, "logits": False,
    "workspace_bytes": 1 << 28,
}  # fmt: skip


@pytest.mark.parametrize("bits", [None, 4, 8], ids=["bf16", "4-bit", "8-bit"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_and_adapters_are_what_loading_takes(tmp_path: Path, bits: int | None, kind: str) -> None:
    folder = tiny_model(tmp_path / "m", dtype="bfloat16", bits=bits, **WIDE)
    pair = load_pair(folder, method="linear", factor=4.0, lora_rank=8, fine_tune_type=kind)
    config = json.loads((folder / "config.json").read_text())
    plan = plan_memory(config, **{**PLAIN, "dtype": "bfloat16", "fine_tune_type": kind})
    weights = sum(a.nbytes for _, a in tree_flatten(pair.teacher.parameters()))
    adapters = sum(a.nbytes for _, a in tree_flatten(pair.student.trainable_parameters()))
    assert plan.weights == pytest.approx(weights, rel=0.01)
    assert plan.adapters == 4 * adapters


def test_what_grows_with_length_is_linear_and_tiles_are_bounded() -> None:
    one, two = (plan_memory(CONFIG, **{**PLAIN, "tokens": n, "seq_len": n}) for n in (100_000, 200_000))
    assert two.hidden == 2 * one.hidden and two.layer == 2 * one.layer
    assert one.tiles == two.tiles == 1 << 28
    assert (two.weights, two.adapters) == (one.weights, one.adapters)


def test_shape_fills_in_what_a_config_leaves_out() -> None:
    bare = {k: CONFIG[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")}
    shape = Shape.of(bare)
    assert (shape.kv_heads, shape.head_dim, shape.ffn, shape.tied) == (4, 16, 256, False)
