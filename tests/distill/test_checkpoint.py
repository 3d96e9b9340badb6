"""Checkpoints: a changed byte is noticed, a run resumes from the newest undamaged one, and good ones stay."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
from mlx_linearard.distill import checkpoint
from mlx_linearard.distill.step import Best, Schedule, TrainState
from mlx_linearard.errors import UserError
from mlx_linearard.models.pair import load_pair

SCHEDULE = Schedule(9, 1, 1, 1e-3, 0, 0.0, 5.0, 0)


@pytest.fixture(scope="module")
def stopped(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that ended after the seventh, with checkpoints after 0, 2, 4 and 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model_dir, text_file, run, **EVERY_TWO), StopsAt(7))
    return run


EVERY_TWO = {"save_every": 2, "keep_checkpoints": 9, "keep": "last"}


@pytest.fixture(scope="module")
def whole(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, **EVERY_TWO))
    return run


def flip(name: str) -> Callable[[Path], None]:
    """Flip one bit in the middle of an array of the optimizer, or of the JSON's numbers."""

    def change(folder: Path) -> None:
        file = folder / name
        data = bytearray(file.read_bytes())
        if name == checkpoint.ARRAYS:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            start, end = header["optimizer.layers.1.self_attn.q_proj.lora_a.m"]["data_offsets"]
            data[8 + size + (start + end) // 2] ^= 0x04
        else:
            data[data.index(b'"lowest": ') + 10] ^= 0x01  # a digit becomes its neighbour
        file.write_bytes(data)

    return change


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of a moment": flip(checkpoint.ARRAYS),
    "a digit of the guard": flip(checkpoint.FACTS),
    "arrays cut": lambda c: (c / checkpoint.ARRAYS).write_bytes((c / checkpoint.ARRAYS).read_bytes()[:-1]),
    "arrays are text": lambda c: (c / checkpoint.ARRAYS).write_text("x"),
    "no arrays": lambda c: (c / checkpoint.ARRAYS).unlink(),
    "no facts": lambda c: (c / checkpoint.FACTS).unlink(),
    "facts cut": lambda c: (c / checkpoint.FACTS).write_bytes((c / checkpoint.FACTS).read_bytes()[:-30]),
    "facts are a list": lambda c: (c / checkpoint.FACTS).write_text("[]"),
    "facts are deep": lambda c: (c / checkpoint.FACTS).write_text("[" * 100_000),
    "a number of 5000 digits": lambda c: (c / checkpoint.FACTS).write_text('{"step": ' + "9" * 5000 + "}"),
    "no checksum": lambda c: _without_checksum(c / checkpoint.FACTS),
}


def _without_checksum(path: Path) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(stopped: Path, model_dir: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(stopped / "checkpoints" / "step-0000006", tmp_path / "step-0000006")
    identity = json.loads((folder / checkpoint.FACTS).read_text())["identity"]
    state = TrainState.start(load_pair(model_dir, method="linear", factor=4.0, lora_rank=4), SCHEDULE)
    checkpoint.load(folder, state, identity)
    assert state.step == 6
    DAMAGES[damage](folder)
    with pytest.raises(checkpoint.DamagedCheckpoint) as caught:
        checkpoint.load(folder, state, identity)
    assert "overwrite" not in str(caught.value)


@pytest.mark.parametrize(("damaged", "resumed"), [((6,), 4), ((4, 6), 2), ((0, 2, 4, 6), None)], ids=str)
def test_a_run_resumes_from_the_newest_undamaged_checkpoint(
    stopped: Path, whole: Path, model_dir: Path, text_file: Path, tmp_path: Path, damaged: tuple[int, ...], resumed
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    for step, damage in zip(damaged, (flip(checkpoint.ARRAYS), DAMAGES["no facts"]) * 2, strict=False):
        damage(checkpoint.path_of(run / "checkpoints", step))
    before = {path.name for path in (run / "checkpoints").iterdir()}
    listener, said = StopsAt(), []
    listener.say = said.append  # type: ignore[method-assign]
    config = small(model_dir, text_file, run, resume=True, **EVERY_TWO)
    if resumed is None:
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged .*: restore one from a copy"):
            mlx_linearard.distill(config, listener)
        assert {path.name for path in (run / "checkpoints").iterdir()} == before
        return
    mlx_linearard.distill(config, listener)
    assert f"resuming after step {resumed} of 8" in said
    for step in damaged:
        assert any(f"step-{step:07d}" in line and f"it is now damaged-step-{step:07d}" in line for line in said)
        assert (run / "checkpoints" / f"damaged-step-{step:07d}").is_dir()
        assert (run / "checkpoints" / f"step-{step:07d}").is_dir()  # the resumed run has made it again
    assert same_adapters(whole, run)
    assert [m["step"] for m in metrics(run)] == list(range(1, 9))
    mlx_linearard.distill(dataclasses.replace(config, resume=False, overwrite=True))
    assert not list((run / "checkpoints").glob("damaged-*"))


def test_a_checkpoint_of_another_run_is_never_skipped(
    stopped: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """An older checkpoint must not replace a newer one that only has other options."""
    run = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match=r"step-0000006 belongs to another run: lora_scale was 2\.0 and is 3\.0"):
        mlx_linearard.distill(small(model_dir, text_file, run, resume=True, lora_scale=3.0, **EVERY_TWO))
    assert not list((run / "checkpoints").glob("damaged-*"))


def test_a_damaged_best_state_is_not_exported(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The state after step 0 is better than the last of these steps; its checkpoint is damaged during training."""
    run, said = tmp_path / "run", []

    class Damages(StopsAt):
        def step(self, record, total: int) -> None:
            if record.step == 3:
                flip(checkpoint.ARRAYS)(run / "checkpoints" / "step-0000000")

        def say(self, text: str) -> None:
            said.append(text)

    config = small(model_dir, text_file, run, steps=3, learning_rate=9.0, warmup=0, keep_checkpoints=9)
    result = mlx_linearard.distill(config, Damages())
    assert result.exported_step == 3 and any("is damaged" in line and "the last is exported" in line for line in said)


def test_an_infinite_best_score_goes_through_a_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    pair = load_pair(model_dir, method="linear", factor=4.0, lora_rank=4)
    state = TrainState.start(pair, SCHEDULE)
    state.best = Best(0, math.inf, 0, 0, "text")
    saved = checkpoint.save(tmp_path, state, {"model": "abc"})
    other = TrainState.start(pair, SCHEDULE)
    checkpoint.load(saved, other, {"model": "abc"})
    assert other.best == state.best


def test_step_numbers_beyond_seven_digits_are_in_order(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 2):
        checkpoint.path_of(tmp_path, step).mkdir()
    for name in ("step-٠٠٠٠٠٠٧", "step-1", "damaged-step-0000001", "step-0000003.txt"):
        (tmp_path / name).mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [2, 9_999_999, 10_000_000]
