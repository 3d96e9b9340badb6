"""One copy of the weights, frozen; and what may be adapted."""

from __future__ import annotations

import gc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model

from mlx_linearard.data import Blocks
from mlx_linearard.distill.objective import resolve_objective
from mlx_linearard.distill.step import Schedule, TrainState, train
from mlx_linearard.errors import UserError
from mlx_linearard.models.pair import fingerprint, load_pair

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 4096}


def array_bytes(model) -> int:
    return sum(a.nbytes for _, a in tree_flatten(model.parameters()))


@pytest.mark.parametrize("bits", [None, 4], ids=["bf16", "4-bit"])
def test_loading_adds_no_second_copy(tmp_path: Path, bits: int | None) -> None:
    folder = tiny_model(tmp_path / "m", dtype="bfloat16", bits=bits, **WIDE)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pair = load_pair(folder, method="linear", factor=4.0, lora_rank=4)
    gc.collect()
    added = mx.get_active_memory() - before
    adapters = sum(a.nbytes for _, a in tree_flatten(pair.student.trainable_parameters()))
    weights = array_bytes(pair.teacher)
    assert weights > 2e6 / (4 if bits else 1)
    assert added <= 1.05 * weights + adapters
    assert mx.get_peak_memory() - before <= 1.2 * weights + adapters  # not for a moment either


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "4-bit"])
def test_the_teacher_is_the_same_before_and_after_training(tmp_path: Path, bits: int | None) -> None:
    pair = load_pair(tiny_model(tmp_path / "m", bits=bits), method="linear", factor=4.0, lora_rank=4)
    before = fingerprint(pair.teacher)
    start = pair.parameters()
    schedule = Schedule(3, 2, 1, 1e-2, 1, 0.0, 1.0, 0)
    state = TrainState.start(pair, schedule)
    blocks = Blocks((np.arange(2000) * 7919 % 251).astype(np.int32), 32, 0)
    records = list(train(pair, resolve_objective(pair.student, "relation"), schedule, blocks, state))
    pair.set_parameters(state.parameters)
    assert fingerprint(pair.teacher) == before
    assert [r.step for r in records] == [1, 2, 3]
    assert all(
        not mx.array_equal(new[name], old[name]).item()
        for new, old in zip(state.parameters, start, strict=True)
        for name in new
    )


def test_the_student_is_the_scaled_model(model_dir: Path) -> None:
    """With adapters at their start, the student's logits are those of stock mlx-lm under the scaled config."""
    from mlx_lm.utils import load_model

    pair = load_pair(model_dir, method="yarn", factor=4.0, lora_rank=4)
    stock, _ = load_model(model_dir, model_config=pair.scaled_config)
    tokens = mx.array([[i * 5 % 256 for i in range(200)]])
    assert mx.abs(pair.student(tokens) - stock(tokens)).max().item() < 1e-5
    assert mx.abs(pair.student(tokens) - pair.teacher(tokens)).max().item() > 1e-2


def test_full_fine_tuning_of_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full cannot train"):
        load_pair(tiny_model(tmp_path / "m", bits=4), method="linear", factor=4.0, fine_tune_type="full")


def test_architectures_without_the_seam_are_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_linearard.models.layers.SEAM", "another_function")
    with pytest.raises(UserError, match="no layer of llama calls scaled_dot_product_attention"):
        load_pair(model_dir, method="ntk", factor=2.0)


@pytest.mark.parametrize(("bits", "name"), [(None, "mlp.down_proj.weight"), (4, "self_attn.q_proj.scales")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named_before_training(
    tmp_path: Path, bits: int | None, name: str, value: float
) -> None:
    folder = tiny_model(tmp_path / "m", bits=bits)
    file = str(folder / "model.safetensors")
    weights = dict(mx.load(file))
    name = f"model.layers.2.{name}"
    weights[name][-1, -1] = value
    mx.save_safetensors(file, weights)
    with pytest.raises(UserError, match=f"weights that are not finite: {name}"):
        load_pair(folder, method="linear", factor=4.0)
