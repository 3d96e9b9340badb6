"""A closed terminal and a lost standard output: the run saves, or continues without output."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Commands, Started
from tiny_runs import metrics

from mlx_linearard.cli import run_command
from mlx_linearard.distill import checkpoint, loop
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.interrupt import stop_requests

FLAGS = ["--seq-len", "32", "--grad-accum", "1", "--lora-rank", "4", "--eval-tokens", "64", "--save-every", "9999"]


def arguments(model: Path, text: Path, run: Path) -> list[str]:
    return ["--model", str(model), "--data", str(text), "--output", str(run), *FLAGS]


def start(
    model: Path, text: Path, run: Path, *more: str, before: Callable[[], object] | None = None, **options
) -> subprocess.Popen[bytes]:
    command_line = [sys.executable, "-m", "mlx_linearard.distill", *arguments(model, text, run), *more]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command_line, preexec_fn=before, **options)


def wait_for_steps(process: subprocess.Popen[bytes] | Started, run: Path, count: int) -> None:
    file = run / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= count):
        time.sleep(0.01)


def last_saved(run: Path) -> int:
    return checkpoint.step_of(checkpoint.list_checkpoints(run / "checkpoints")[-1])


def test_sighup_saves_and_the_run_resumes(model_dir: Path, text_file: Path, tmp_path: Path, commands: Commands) -> None:
    run = tmp_path / "run"
    process = commands.start("distill", [*arguments(model_dir, text_file, run), "--steps", "5000"], tmp_path)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 130 and "continue with the same command and --resume" in process.out.read_text()
    step = metrics(run)[-1]["step"]
    assert last_saved(run) == step < 5000
    assert command([*arguments(model_dir, text_file, run), "--steps", str(step + 1), "--resume"]) == 0
    assert [m["step"] for m in metrics(run)] == list(range(1, step + 2))


def test_a_process_that_ignores_sighup_continues_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup` starts such a process."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_closed_terminal_saves(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The run's terminal goes away: writing to it fails, and the system sends SIGHUP."""
    run = tmp_path / "run"
    ours, theirs = os.openpty()
    process = start(
        model_dir,
        text_file,
        run,
        "--steps",
        "5000",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        before=_own_terminal,
    )
    os.close(theirs)
    wait_for_steps(process, run, 3)
    os.close(ours)
    assert process.wait(60) == 130
    assert last_saved(run) == metrics(run)[-1]["step"] < 5000


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_reader_that_leaves_stops_no_run(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(model_dir, text_file, run, "--steps", "20")
    wait_for_steps(process, run, 3)
    assert process.stdout and process.stderr
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 0, error
    assert metrics(run)[-1]["step"] == 20 and (run / "report.html").exists() and error == b""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_stops_no_run(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        process = start(model_dir, text_file, run, "--steps", "4", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert (run / "report.html").exists() and error.count(b"\n") == 1 and b"standard output" in error


def test_a_request_restores_the_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
    assert {number: signal.getsignal(number) for number in before} == before


# ---------------------------------------------------------------------------------------------------
# A limit on the size of files, and a full disk


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 9_000, 150_000, 300_000])
def test_a_file_size_limit_is_one_line_and_the_run_resumes(
    model_dir: Path, text_file: Path, tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit hits config.yaml, a checkpoint's arrays, or the fused model; complete files stay."""
    run, command_line = tmp_path / "run", [*arguments(model_dir, text_file, tmp_path / "run"), "--steps", "4"]
    with files_up_to(size):
        status = run_command(lambda: command(command_line))
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and str(run) in error, error
    assert not [path for path in run.rglob(".*") if path.name != ".mlx_linearard"]
    assert command([*command_line, *(["--resume"] if (run / "config.yaml").exists() else [])]) == 0
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_step_that_cannot_be_logged_is_one_line(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys
) -> None:
    """Half of a line is in the file; it is dropped when the run resumes."""
    run, real = tmp_path / "run", loop.append_line
    command_line = [*arguments(model_dir, text_file, run), "--steps", "4", "--save-every", "1"]

    def fails(path: Path, value: dict) -> None:
        if value["step"] == 3:
            with path.open("a") as file:
                file.write('{"step": 3, "lo')
            raise OSError(number, os.strerror(number))  # of close(), which names no file
        real(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_line", fails)
        assert run_command(lambda: command(command_line)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run) in error
    assert command([*command_line, "--resume"]) == 0
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4]
