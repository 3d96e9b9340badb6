"""The output directory: one process at a time, and nothing of an earlier run beside a new one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import tiny_model
from tiny_runs import Stopped, StopsAt, metrics, small

import mlx_linearard
from mlx_linearard.cli import run_command
from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.compare import compare_objectives
from mlx_linearard.distill.listener import Listener
from mlx_linearard.errors import UserError
from mlx_linearard.files import locked

HOLD = """
import sys
from mlx_linearard.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdin and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class RunsAnother(Listener):
    """Starts a second run into the same directory after the second step, and keeps its error."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.error = ""

    def step(self, record, total: int) -> None:
        if record.step == 2:
            with pytest.raises(UserError) as caught:
                mlx_linearard.distill(self.config)
            self.error = str(caught.value)


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}], ids=["new", "resume", "overwrite"])
def test_a_second_run_into_the_same_directory_is_refused(
    model_dir: Path, text_file: Path, tmp_path: Path, more: dict
) -> None:
    config = small(model_dir, text_file, tmp_path / "run", steps=4)
    second = RunsAnother(small(model_dir, text_file, tmp_path / "run", steps=4, seed=1, **more))
    mlx_linearard.distill(config, second)
    assert ("in use by another process" if more else "already holds a run") in second.error
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / ".lock").exists()


def test_two_runs_that_start_at_once_do_not_mix(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run was planned before the first made the directory, and opens it while the first runs, or later."""
    import mlx_linearard.distill.run as room

    config = small(model_dir, text_file, tmp_path / "run", steps=3)
    late = room.load(room.make_plan(small(model_dir, text_file, tmp_path / "run", steps=3, seed=1)))

    class StartsLate(Listener):
        def step(self, record, total: int) -> None:
            with pytest.raises(UserError, match="in use by another process"):
                room.execute(late, Listener(), 0.0)

    mlx_linearard.distill(config, StartsLate())
    with pytest.raises(UserError, match="already holds a run"):
        room.execute(late, Listener(), 0.0)
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_lock_holds_between_processes_and_ends_with_them(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model_dir, text_file, run, save_every=1), StopsAt(2))
    arguments = [
        "--model",
        str(model_dir),
        "--data",
        str(text_file),
        "--output",
        str(run),
        *("--method", "linear", "--objective", "relation"),
        "--seq-len",
        "32",
        "--grad-accum",
        "2",
        "--steps",
        "8",
        "--lora-rank",
        "4",
        "--learning-rate",
        "2e-3",
        "--eval-tokens",
        "128",
        "--resume",
    ]
    before = (run / "metrics.jsonl").read_text()
    with held_by_another_process(run) as process:
        assert run_command(lambda: command(arguments)) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and f"{run} is in use by another process" in line
        assert (run / "metrics.jsonl").read_text() == before
        process.kill()  # the system releases the lock
        process.wait()
        assert command(arguments) == 0


def test_a_comparison_is_locked_too(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    config = small(model_dir, text_file, root, steps=2, compare="relation,ce")
    seen: list[str] = []

    class RunsAnotherComparison(Listener):
        def step(self, record, total: int) -> None:
            for more in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(UserError) as caught:
                    compare_objectives(small(model_dir, text_file, root, steps=2, compare="relation,ce", **more))
                seen.append(str(caught.value))

    compare_objectives(config, RunsAnotherComparison())
    assert len(seen) == 8 and all("in use by another process" in line for line in seen)
    with locked(root):
        pass
    assert not list(root.rglob("*.lock"))


# ---------------------------------------------------------------------------------------------------
# --overwrite


@pytest.fixture(scope="module")
def finished(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps; tests take a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, steps=2))
    return run


def test_a_run_stopped_after_overwrite_leaves_nothing_of_the_old_run(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "notes.txt").write_text("mine")
    (run / "results.items").mkdir()
    assert (run / "model" / "config.json").exists() and (run / "adapters").is_dir()
    config = small(model_dir, text_file, run, steps=4, method="yarn", factor=8.0, overwrite=True)
    with pytest.raises(Stopped):
        mlx_linearard.distill(config, StopsAt(2))
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "base",
        "before.json",
        "held_out.json",
        "held_out_tokens.json",
        "notes.txt",
    }
    assert '"rope_type": "yarn"' in (run / "base" / "config.json").read_text()
    with pytest.raises(UserError):
        mlx_linearard.export(run, tmp_path / "out")


def test_overwrite_does_not_follow_a_link_to_another_run(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    shutil.copytree(finished, run)
    link.symlink_to(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="link is a link, which --overwrite does not replace"):
        mlx_linearard.distill(small(model_dir, text_file, link, steps=1, overwrite=True))
    assert link.is_symlink()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    mlx_linearard.distill(small(model_dir, text_file, link, steps=2, resume=True))  # which adds to the run


@pytest.mark.parametrize("inside", ["model", "base"])
def test_overwrite_keeps_the_model_that_it_reads(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path, inside: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (tmp_path / "link").symlink_to(run / inside)
    for model in (run / inside, tmp_path / "link"):
        with pytest.raises(UserError, match="--overwrite would remove --model"):
            mlx_linearard.distill(small(model, text_file, run, steps=2, overwrite=True))
    assert (run / inside / "model.safetensors").exists()


def test_overwrite_removes_a_link_and_not_what_it_leads_to(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run, elsewhere = tmp_path / "run", tiny_model(tmp_path / "elsewhere")
    shutil.copytree(finished, run)
    shutil.rmtree(run / "model")
    (run / "model").symlink_to(elsewhere)
    mlx_linearard.distill(small(model_dir, text_file, run, steps=2, overwrite=True))
    assert (elsewhere / "model.safetensors").exists() and not (run / "model").is_symlink()


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "run\0"], ids=["long", "long part", "null"])
def test_a_name_that_no_file_can_have_is_one_line(model_dir: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        mlx_linearard.distill(small(model_dir, text_file, tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["model", "base", "adapters"])
def test_a_directory_that_a_run_did_not_write_stays(
    model_dir: Path, text_file: Path, tmp_path: Path, flag: str, name: str
) -> None:
    """Another program's project may have a config.yaml and a model/ too."""
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "precious").write_text("x")
    (tmp_path / "run" / "config.yaml").write_text("steps: 8\n")
    config = small(model_dir, text_file, tmp_path / "run", **{flag: True})
    with pytest.raises(UserError, match=f"{name} has no valid file .mlx_linearard"):
        mlx_linearard.distill(config)
    assert (tmp_path / "run" / name / "precious").read_text() == "x"
