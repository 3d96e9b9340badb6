"""A run that is stopped from outside: a full disk, a kill at any moment, another --steps."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from forked import Commands, Started
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
from mlx_linearard.config import DistillConfig
from mlx_linearard.distill import checkpoint
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.errors import UserError
from mlx_linearard.files import new_directory, new_file, sweep

FLAGS = [
    "--seq-len", "32", "--grad-accum", "1", "--lora-rank", "4", "--learning-rate", "2e-3", "--lora-dropout", "0.1",
    "--eval-tokens", "64",
]  # fmt: skip


def flags(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--data", str(text), "--output", str(output), *FLAGS, *more]


# ---------------------------------------------------------------------------------------------------
# A kill

STEPS = 60
KILLED = ["--steps", str(STEPS), "--save-every", "2", "--eval-every", "20", "--keep", "last"]


@pytest.fixture(scope="module")
def whole(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command(flags(model_dir, text_file, run, *KILLED)) == 0
    return run


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: Started, condition) -> None:
    """Wait until the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("kills", [pytest.param(4, id="4"), pytest.param(25, id="25", marks=pytest.mark.slow)])
def test_a_run_killed_at_random_instants_resumes_to_the_same(
    whole: Path, model_dir: Path, text_file: Path, tmp_path: Path, commands: Commands, kills: int
) -> None:
    """SIGKILL at seeded instants, every third during a save; each time the run resumes, at last to its end."""
    seeded, run, inside = random.Random(kills), tmp_path / "run", 0
    arguments = flags(model_dir, text_file, run, *KILLED)
    instants = sorted(seeded.sample(range(STEPS - 5), kills))
    for number, step in enumerate(instants):
        process = commands.start("distill", arguments, tmp_path)
        wait_for(process, lambda step=step: lines_in(run / "metrics.jsonl") >= step)
        if number % 3 == 1:
            wait_for(process, lambda: is_saving(run))
        else:
            time.sleep(seeded.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.errors.read_text()
        inside += is_saving(run)
        if run.exists():  # a kill may come before anything is written
            arguments = [*flags(model_dir, text_file, run, *KILLED), "--resume"]
    assert inside >= kills // 5, f"only {inside} kills hit a save"
    assert command(arguments) == 0
    assert same_adapters(whole, run)
    assert [m["step"] for m in metrics(run)] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics(run)] == [m["loss"] for m in metrics(whole)]
    for name in ("results.json", "evaluations.jsonl"):
        assert (run / name).exists()
    assert evaluated(run) == evaluated(whole)
    assert not is_saving(run)


def evaluated(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------
# Another length


def test_more_steps_go_on_with_the_rate_of_the_new_length(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Finished steps stay; the following steps have the learning rates of a run of the new length."""
    run, other = tmp_path / "run", tmp_path / "other"
    first = small(model_dir, text_file, run, steps=6, lora_dropout=0.1)
    mlx_linearard.distill(first)
    short = metrics(run)
    mlx_linearard.distill(small(model_dir, text_file, run, steps=10, lora_dropout=0.1, resume=True))
    mlx_linearard.distill(small(model_dir, text_file, other, steps=10, lora_dropout=0.1))
    longer, straight = metrics(run), metrics(other)
    assert [m["step"] for m in longer] == list(range(1, 11))
    assert longer[:6] == short
    assert [m["learning_rate"] for m in longer[6:]] == [m["learning_rate"] for m in straight[6:]]
    assert longer[5]["learning_rate"] < straight[5]["learning_rate"]


def test_the_number_of_steps_changes_nothing_before_the_rate_does(
    model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """Warm-up, data order and dropout do not depend on the number of steps, so a stopped run may get another one."""
    for steps in (5, 9):
        config = small(model_dir, text_file, tmp_path / str(steps), steps=steps, lora_dropout=0.1, seed=3)
        mlx_linearard.distill(config)
    short, long = (metrics(tmp_path / name) for name in ("5", "9"))
    assert [m["loss"] for m in short[:5]] == [m["loss"] for m in long[:5]]


def test_fewer_steps_than_are_done_end_the_run_as_it_is(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model_dir, text_file, run, save_every=2), StopsAt(7))
    result = mlx_linearard.distill(small(model_dir, text_file, run, save_every=2, steps=4, resume=True))
    assert result.steps == 6 and len(metrics(run)) == 6
    assert (run / "model").is_dir()


# ---------------------------------------------------------------------------------------------------
# A full disk

FULL = """
set -e
mount -t tmpfs -o size=SIZE tmpfs "$PLACE"
status=0
"$@" || status=$?
find "$PLACE" -path '*checkpoints*' | sort
exit $status
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The checkpoints after steps 0 and 2 fit on the disk, the next one does not."""
    place = tmp_path / "place"
    place.mkdir()
    line = [
        sys.executable,
        "-c",
        LOADS,
        *flags(model_dir, text_file, place / "run", "--lora-rank", "64"),
        "--steps",
        "6",
        "--save-every",
        "2",
    ]
    outside = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*outside, "bash", "-c", FULL.replace("SIZE", "4m"), "bash", *line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PLACE": str(place)},
    )
    if "mount" in done.stderr and "permission" in done.stderr.lower():
        pytest.skip("this user may not mount")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "no space left" in done.stderr and "MB free" in done.stderr and "MB needed" in done.stderr
    kept = [Path(name).name for name in done.stdout.splitlines() if name.startswith(str(place))]
    assert set(kept) == {"checkpoints", "step-0000000", "step-0000002", "state.json", "state.safetensors"}
    assert "loaded step 2" in done.stdout and "loaded step 4" not in done.stdout


# distill, and then, on the same mounted disk, the load of the checkpoint that is there.
LOADS = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_linearard.distill import checkpoint
from mlx_linearard.distill.__main__ import run
from mlx_linearard.cli import run_command
status = run_command(lambda: run(sys.argv[1:]))
folder = Path(sys.argv[sys.argv.index("--output") + 1]) / "checkpoints"
for path in checkpoint.list_checkpoints(folder):
    facts = checkpoint.read_facts(path)
    arrays = mx.load(str(path / checkpoint.ARRAYS))
    assert all(mx.isfinite(a).all().item() for a in arrays.values())
    print("loaded step", facts["step"])
sys.exit(status)
"""


class Killed(BaseException):
    pass


def test_what_a_kill_left_is_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files go, a directory that was being replaced comes back, and other hidden files stay."""
    for name in ("new", "replaced"):
        with new_directory(tmp_path / name) as old:
            (old / "old").touch()
    real = Path.replace

    def killed(source: Path, target: Path) -> Path:
        if target == tmp_path / "replaced":
            raise Killed
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *a, **k: None)
        patch.setattr(Path, "unlink", lambda *a, **k: None)
        for make in (new_file, new_directory):
            with pytest.raises(Killed), make(tmp_path / "thing.json"):
                raise Killed
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed), new_directory(tmp_path / "replaced", overwrite=True) as made:
            (made / "half").touch()
    (tmp_path / ".gitignore").touch()
    assert len(list(tmp_path.glob(".*"))) == 5 and not (tmp_path / "replaced").exists()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".gitignore", "new", "replaced"]
    assert (tmp_path / "replaced" / "old").exists()


def stopped_at_five(model_dir: Path, text_file: Path, tmp_path: Path) -> tuple[Path, DistillConfig]:
    """A run of eight steps that ended after the fifth, with a checkpoint every two steps; the options to resume it."""
    config = small(model_dir, text_file, tmp_path / "run", save_every=2)
    with pytest.raises(Stopped):
        mlx_linearard.distill(config, StopsAt(5))
    return tmp_path / "run", dataclasses.replace(config, resume=True)


def test_a_write_that_fails_midway_is_told_with_what_it_needs(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of mlx when a disk fills up during a write."""
    run, again = stopped_at_five(model_dir, text_file, tmp_path)

    def fails(name: str, arrays: dict) -> None:
        Path(name).write_bytes(b"part")
        monkeypatch.setattr("mlx_linearard.files.writing._free", lambda target: 1000)
        raise RuntimeError("[write] Unable to write 100 bytes to file (failed).")

    monkeypatch.setattr(mx, "save_safetensors", fails)
    with pytest.raises(UserError, match=r"no space left.*0.0 MB free, \d+\.\d MB needed"):
        mlx_linearard.distill(again)
    monkeypatch.undo()
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-0000000", "step-0000002", "step-0000004"}
    assert checkpoint.list_checkpoints(run / "checkpoints")[-1].name == "step-0000004"
    assert mlx_linearard.distill(again).steps == 8


def test_a_kill_while_a_run_is_opened_again_loses_no_line(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.yaml and metrics.jsonl are replaced in one step: after a kill at that moment the old files are there."""
    run, again = stopped_at_five(model_dir, text_file, tmp_path)
    real = Path.replace
    for name in ("config.yaml", "metrics.jsonl"):
        before = (run / name).read_text()

        def killed(source: Path, target: Path, name: str = name) -> Path:
            if Path(target).name == name:
                raise Killed
            return real(source, target)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "replace", killed)
            mlx_linearard.distill(again)
        assert (run / name).read_text() == before
    mlx_linearard.distill(again)
    assert [m["step"] for m in metrics(run)] == list(range(1, 9))
