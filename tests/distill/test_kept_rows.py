"""A second run on the same weights and text does not measure native and scaled again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import small

import mlx_linearard
from mlx_linearard.distill import run as run_module


def test_a_second_run_reads_the_rows(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_LINEARARD_CACHE", str(tmp_path / "cache"))
    measured: list[bool] = []
    own = run_module.measure
    monkeypatch.setattr(
        run_module, "measure", lambda *a, native, **k: measured.append(native) or own(*a, native=native, **k)
    )
    rows = []
    for number, change in enumerate([{}, {"learning_rate": 1e-3}, {"factor": 2.0}]):
        out = tmp_path / str(number)
        mlx_linearard.distill(small(model_dir, text_file, out, steps=1, **change))
        rows.append(json.loads((out / "results.json").read_text()))
    assert measured == [True, False, False, True, False]  # native with scaled, then restored
    assert [rows[1][name] for name in ("native", "scaled")] == [rows[0][name] for name in ("native", "scaled")]
    assert rows[2]["scaled"] != rows[0]["scaled"]
