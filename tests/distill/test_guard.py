"""The guard: which steps are bad, what a bad step costs, and that a resumed run decides as an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import tiny_model
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
import mlx_linearard.distill.gradient
from mlx_linearard.distill.guard import LIMIT, RECENT, RECOVERY, Guard
from mlx_linearard.errors import UserError


def after(*losses: float) -> Guard:
    guard = Guard()
    for loss in losses:
        guard.accept(loss)
    return guard


def test_the_first_loss_is_good_unless_it_is_not_finite() -> None:
    assert Guard().complaint(1e9, 1.0) is None
    assert Guard().complaint(math.nan, 1.0) == "loss not finite"
    assert Guard().complaint(math.inf, 1.0) == "loss not finite"
    assert Guard().complaint(1.0, math.inf) == "gradient not finite"


def test_the_bound_is_three_medians() -> None:
    assert after(2.0).bound == 6
    steady = after(*[1.0] * RECENT, 2.9)  # one outlier moves it nowhere
    assert steady.bound == 3 and steady.complaint(3.1, 1.0) == "loss 3.1 above 3"


def test_the_bound_follows_a_loss_down_and_not_a_slow_climb() -> None:
    assert after(*[8.0] * RECENT, *[1.0] * RECENT).bound == 3
    climbing = after(*[1.0] * RECENT, *[2.5] * RECENT)
    assert climbing.bound == 3


def test_a_lone_not_finite_loss_leaves_the_weights_and_a_second_takes_them_back() -> None:
    guard = after(1.0)
    assert not guard.reject(math.nan) and guard.factor == 0.5
    assert guard.reject(math.nan) and guard.factor == 0.25
    guard.accept(1.0)
    assert not guard.reject(math.nan)


def test_a_loss_above_the_bound_takes_the_weights_back_at_once() -> None:
    assert after(1.0).reject(4.0)


def test_good_steps_raise_the_rate_again_one_lowering_at_a_time() -> None:
    guard = after(1.0)
    guard.reject(math.nan), guard.reject(math.nan)
    for _ in range(RECOVERY - 1):
        guard.accept(1.0)
    assert guard.factor == 0.25
    guard.accept(1.0)
    assert guard.factor == 0.5
    for _ in range(RECOVERY):
        guard.accept(1.0)
    assert guard.factor == 1


def test_it_gives_up_after_so_many_lowerings() -> None:
    guard = after(1.0)
    for _ in range(LIMIT):
        guard.reject(math.nan)
        assert not guard.exhausted
    guard.reject(math.nan)
    assert guard.exhausted and guard.factor == 0.5**LIMIT


def test_its_state_goes_through_json() -> None:
    guard = after(1.0, 2.0)
    guard.reject(math.nan)
    assert Guard.from_json(json.loads(json.dumps(guard.as_json()))) == guard


@pytest.mark.parametrize(
    "change",
    [{"recent": [None]}, {"recent": [math.nan]}, {"lowest": math.inf}, {"lowered": -1}, {"lowered": True}, {"more": 1}],
    ids=str,
)
def test_another_state_is_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        Guard.from_json({**after(1.0).as_json(), **change})


# ---------------------------------------------------------------------------------------------------
# In a run


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The forward passes, counted from 0, whose loss becomes NaN; a test adds their numbers."""
    numbers: set[int] = set()
    count = -1
    real = mlx_linearard.distill.gradient.objective_loss

    def loss(*arguments: object, **keywords: object) -> object:
        nonlocal count
        count += 1
        total, parts = real(*arguments, **keywords)  # type: ignore[arg-type]
        return (total * math.nan if count in numbers else total), parts

    monkeypatch.setattr(mlx_linearard.distill.gradient, "objective_loss", loss)
    return numbers


def test_a_nan_in_one_batch_costs_one_step(
    model_dir: Path, text_file: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    poisoned.add(5)  # the second batch of step 3
    run = tmp_path / "run"
    said: list[str] = []
    listener = StopsAt()
    listener.say = said.append  # type: ignore[method-assign]
    result = mlx_linearard.distill(small(model_dir, text_file, run), listener)
    assert result.skipped == 1 and result.steps == 8 and result.restored.kl < result.scaled.kl
    steps = metrics(run)
    assert [m["step"] for m in steps] == list(range(1, 9))
    assert [m["step"] for m in steps if "skipped" in m] == [3]
    assert steps[2]["skipped"] == "loss not finite" and steps[2]["loss"] is None and steps[2]["rate_factor"] == 0.5
    assert all(math.isfinite(m["loss"]) for m in steps if m["step"] != 3)
    assert any("step 3: loss not finite" in line for line in said)
    assert json.loads((run / "results.json").read_text())["run"]["skipped_steps"] == 1
    assert (run / "report.html").exists()


def test_a_rejected_step_changes_nothing_but_the_rate(
    model_dir: Path, text_file: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    """The checkpoint after the bad step holds the weights and the optimizer state of the checkpoint before it."""
    poisoned.add(4)
    config = small(model_dir, text_file, tmp_path / "run", save_every=1, keep_checkpoints=9, steps=4)
    mlx_linearard.distill(config)
    before, behind, later = (
        mx.load(str(tmp_path / "run" / "checkpoints" / f"step-000000{n}" / "state.safetensors")) for n in (2, 3, 4)
    )
    names = [name for name in before if name.startswith(("parameters.", "optimizer."))]
    assert all(mx.array_equal(before[name], behind[name]).item() for name in names)
    assert not all(mx.array_equal(later[name], behind[name]).item() for name in names)


def test_a_loss_that_is_never_finite_stops_the_run_with_advice(
    model_dir: Path, text_file: Path, tmp_path: Path, poisoned: set[int]
) -> None:
    poisoned.update(range(4, 999))
    config = small(model_dir, text_file, tmp_path / "run", steps=40)
    with pytest.raises(UserError, match=r"step 11: loss not finite.*saved in .*step-0000011.*--learning-rate"):
        mlx_linearard.distill(config)
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 12))
    saved = mx.load(str(tmp_path / "run" / "checkpoints" / "step-0000011" / "state.safetensors"))
    assert all(mx.isfinite(array).all().item() for array in saved.values())
    assert not (tmp_path / "run" / "model").exists()


def test_a_rate_a_hundred_times_too_high_exports_nothing_worse_than_the_start(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    run = tmp_path / "run"
    result = mlx_linearard.distill(small(model, text_file, run, steps=30, learning_rate=0.2))
    assert result.skipped > 0, "the guard did not act"
    assert any("above" in m.get("skipped", "") for m in metrics(run))
    assert result.restored.kl <= result.scaled.kl
    assert json.loads((run / "results.json").read_text())["run"]["exported_step"] == result.exported_step


def test_a_run_that_is_stopped_between_bad_steps_resumes_to_the_same(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    more = {"steps": 24, "learning_rate": 0.5, "save_every": 1, "keep": "last", "lora_dropout": 0.1}
    mlx_linearard.distill(small(model, text_file, tmp_path / "whole", **more))
    bad = [m["step"] for m in metrics(tmp_path / "whole") if "skipped" in m]
    assert bad
    broken = tmp_path / "broken"
    for number, step in enumerate(sorted({bad[0], bad[0] + 1, bad[-1]})):
        with pytest.raises(Stopped):
            mlx_linearard.distill(small(model, text_file, broken, resume=number > 0, **more), StopsAt(step))
    mlx_linearard.distill(small(model, text_file, broken, resume=True, **more))
    assert same_adapters(tmp_path / "whole", broken)
    told = [
        [(m["step"], m["loss"], m.get("skipped")) for m in metrics(tmp_path / name)] for name in ("whole", "broken")
    ]
    assert told[0] == told[1]
