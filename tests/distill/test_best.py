"""Which state is exported: the best one on held-out text, also after a resumption, or the last one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.__main__ import parse
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.best import judge, reference_length, score
from mlx_linearard.distill.step import TrainState
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.held_out import Fidelity

# A rate at which held-out text gets better, then worse, while no loss leaves the guard's bound.
ROUGH: dict[str, Any] = {"learning_rate": 6e-3, "steps": 12, "eval_every": 2, "warmup": 0}


def evaluations(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["kl"] for row in rows}


def facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def test_states_are_compared_where_the_teacher_is_a_reference() -> None:
    assert reference_length([32, 64, 512], native_window=128) == 64
    assert reference_length([256, 512], native_window=128) == 256


def test_the_score_is_the_kl_or_where_that_is_no_aim_the_perplexity() -> None:
    row = Fidelity({32: math.e}, kl=0.5, agreement=0.5)
    assert score(row, "relation", 32) == 0.5
    assert score(row, "ce", 32) == pytest.approx(1)
    assert score(Fidelity({32: math.e}), "relation", 32) == pytest.approx(1)
    assert score(Fidelity({32: 1.0}, kl=math.nan), "relation", 32) == math.inf


def test_the_best_so_far_counts_what_was_no_better() -> None:
    state = TrainState(0, [], None, None)  # type: ignore[arg-type]
    for step, value, improved in ((0, 1.0, True), (2, 1.0, False), (4, math.inf, False), (6, 0.5, True)):
        state.step = step
        assert judge(state, value, "text") is improved
        assert state.best is not None and state.best.evaluated == step
        assert state.best.misses == {0: 0, 2: 1, 4: 2, 6: 0}[step]
    assert (state.best.step, state.best.score) == (6, 0.5)


@pytest.fixture(scope="module")
def rough(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best evaluation is neither the first nor the last, and its two newest checkpoints."""
    run = tmp_path_factory.mktemp("rough") / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, save_every=1, **ROUGH))
    return run


def test_the_best_evaluation_is_exported(rough: Path) -> None:
    found, results = evaluations(rough), facts(rough)
    best = min(found, key=found.__getitem__)
    assert 0 < best < 12, f"the test needs a run that gets better and then worse: {found}"
    assert results["run"]["exported_step"] == best
    assert results["restored"]["kl"] == pytest.approx(found[best], rel=1e-5)
    saved = mx.load(str(rough / "checkpoints" / f"step-{best:07d}" / "state.safetensors"))
    adapters = mx.load(str(rough / "adapters" / "adapters.safetensors"))
    kept = [array for name, array in saved.items() if name.startswith("parameters.")]
    assert len(kept) == len(adapters)
    for name, array in adapters.items():
        inside = name.split(".layers.")[1].partition(".")
        assert mx.array_equal(array, saved[f"parameters.{inside[0]}.{inside[2]}"]).item()


def test_the_newest_checkpoints_and_the_best_stay(rough: Path) -> None:
    best = facts(rough)["run"]["exported_step"]
    assert {p.name for p in (rough / "checkpoints").iterdir()} == {f"step-{n:07d}" for n in (best, 11, 12)}


def test_the_last_state_is_exported_on_request(rough: Path, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, keep="last", keep_checkpoints=1, **ROUGH))
    assert facts(run)["run"]["exported_step"] == 12
    assert facts(run)["restored"]["kl"] == pytest.approx(evaluations(run)[12], rel=1e-5)
    assert facts(run)["restored"]["kl"] > facts(rough)["restored"]["kl"]
    best = facts(rough)["run"]["exported_step"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"step-{n:07d}" for n in (best, 12)}


def test_a_resumed_run_knows_the_best_and_evaluates_once(
    rough: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Stopped after steps before, at and after evaluations; checkpoints and evaluations are due at different steps."""
    run = tmp_path / "run"
    for number, step in enumerate((3, 4, 9, 10)):
        with pytest.raises(Stopped):
            mlx_linearard.distill(
                small(model_dir, text_file, run, save_every=3, resume=number > 0, **ROUGH), StopsAt(step)
            )
    mlx_linearard.distill(small(model_dir, text_file, run, save_every=3, resume=True, **ROUGH))
    assert same_adapters(rough, run) and evaluations(run) == evaluations(rough)
    assert facts(run)["run"]["exported_step"] == facts(rough)["run"]["exported_step"]


def test_patience_ends_a_run_early_and_a_resumption_does_not_go_on(
    rough: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    best = facts(rough)["run"]["exported_step"]
    mlx_linearard.distill(small(model_dir, text_file, run, patience=1, **ROUGH))
    assert metrics(run)[-1]["step"] == best + 2 == facts(run)["run"]["steps"]
    assert facts(run)["run"]["exported_step"] == best
    mlx_linearard.distill(small(model_dir, text_file, run, patience=1, resume=True, **ROUGH))
    assert metrics(run)[-1]["step"] == best + 2
    mlx_linearard.distill(small(model_dir, text_file, run, resume=True, **ROUGH))
    assert metrics(run)[-1]["step"] == 12


def test_without_evaluations_the_start_stands_against_the_end(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--model", str(model_dir), "--data", str(text_file), "--output", str(run), "--seq-len", "32"]
    arguments += ["--grad-accum", "1", "--steps", "3", "--learning-rate", "9", "--warmup", "0", "--eval-tokens", "64"]
    assert command(arguments) == 0
    results = facts(run)
    assert results["run"]["exported_step"] == 0
    assert results["restored"] == results["scaled"]
    assert "The state after step 0 of 3 is exported" in capsys.readouterr().out
    base, model = (load_model(run / name)[0] for name in ("base", "model"))
    tokens = mx.array([[5, 6, 7]])
    assert mx.abs(base(tokens) - model(tokens)).max().item() < 1e-5


def test_patience_needs_evaluations() -> None:
    with pytest.raises(UserError, match="--eval-every"):
        parse(["--patience", "2"])
    assert DistillConfig(patience=2, eval_every=5).patience == 2
