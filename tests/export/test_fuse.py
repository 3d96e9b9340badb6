"""The fused model's files: the dtype that the config names is the dtype of the weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model

from mlx_linearard.export.fuse import write_base, write_fused
from mlx_linearard.models.dtypes import FLOAT_NAMES
from mlx_linearard.models.pair import load_pair

STATED = {"torch_dtype": "float16"}


def dtypes(folder: Path) -> Counter[str]:
    """Numbers by floating dtype in a directory's weights."""
    counts = Counter[str]()
    for _, array in tree_flatten(mx.load(str(folder / "model.safetensors"))):
        if array.dtype in FLOAT_NAMES:
            counts[FLOAT_NAMES[array.dtype]] += array.size
    return counts


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("memory", [None, "float32", "bfloat16"])
def test_the_config_names_the_dtype_of_the_weights(tmp_path: Path, kind: str, memory: str | None) -> None:
    base = tiny_model(tmp_path / "base", dtype="float16", **STATED)
    pair = load_pair(base, method="linear", factor=4.0, fine_tune_type=kind, lora_rank=4, dtype=memory)
    write_fused(pair, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert set(dtypes(tmp_path / "model")) == {memory or "float16"}
    assert config["torch_dtype"] == config["dtype"] == (memory or "float16")
    write_base(pair, tmp_path / "scaled")  # linked weights: the base's own dtype
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and set(dtypes(tmp_path / "scaled")) == {"float16"}


@pytest.mark.parametrize("memory", [None, "float32"])
def test_a_quantized_base_keeps_its_bits_and_names_the_dtype_of_the_rest(tmp_path: Path, memory: str | None) -> None:
    base = tiny_model(tmp_path / "base", dtype="float16", bits=4, **STATED)
    pair = load_pair(base, method="linear", factor=4.0, lora_rank=4, dtype=memory)
    write_fused(pair, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    assert config["torch_dtype"] == dtypes(tmp_path / "model").most_common(1)[0][0] == (memory or "float16")
