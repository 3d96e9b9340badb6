"""The memory of a training step grows with the length, not with its square, on the device that runs this."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_memory import peak, planned
from tiny import CONFIG, tiny_model

from mlx_linearard.machine import on_gpu

pytestmark = pytest.mark.device
SHORT, LONG = (4096, 8192) if on_gpu() else (512, 1024)  # tokens: a GPU runs ahead, which hides small scores


@pytest.mark.parametrize("objective", ["relation", "logits"])
def test_memory_grows_by_far_less_than_one_matrix_of_scores(tmp_path: Path, objective: str) -> None:
    folder = tiny_model(tmp_path / "m", max_position_embeddings=LONG, num_hidden_layers=2)
    extra = []
    for length in (SHORT, LONG):
        options = {"seq_len": length, "grad_accum": 1, "objective": objective, "workspace": 1, "dtype": "float32"}
        plan = planned(folder, **options)
        extra.append(peak(folder, plan, **options) - plan.step.weights)
    scores = 4 * CONFIG["num_attention_heads"] * (LONG**2 - SHORT**2)  # bytes by which those of one layer grow
    assert extra[1] - extra[0] < scores / 2, extra
