"""What a run shows: on a real terminal no line is wider than it, Ctrl-C is answered, and commands can be pasted."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tiny_runs import metrics, small
from tqdm.utils import disp_len

from mlx_linearard.cli import shell_command, shell_lines
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.amounts import Amount
from mlx_linearard.distill.dry_run import count_tokens
from mlx_linearard.distill.interrupt import answered
from mlx_linearard.distill.run import distill
from mlx_linearard.distill.sizing import Sizing
from mlx_linearard.distill.terminal import table
from mlx_linearard.distill.timing import Times

FLAGS = ["--seq-len", "32", "--grad-accum", "1", "--lora-rank", "4", "--eval-tokens", "64"]


class OnTerminal:
    """A process whose standard streams are a terminal of `columns` columns."""

    def __init__(self, words: list[str], folder: Path, columns: int) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.terminal, self.text = ours, ""

    def read_until(self, part: str | None, seconds: float = 60) -> None:
        """Read until `part` is shown; None: to the end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (part is None or part not in self.text):
            if select.select([self.terminal], [], [], 0.2)[0]:
                try:
                    new = os.read(self.terminal, 1 << 16)
                except OSError:  # Linux: the last process has closed the terminal
                    new = b""
                if not new:
                    break
                self.text += new.decode()
        assert part is None or part in self.text, self.text

    def lines(self) -> list[str]:
        """All lines that were ever shown, changing ones included, without control sequences."""
        text = re.sub(r"\x1b\[K", "", self.text).replace("\r\n", "\n")
        return re.split(r"[\r\n]", text)


def widest(lines: list[str]) -> str:
    """The widest line that could be broken: a single word, such as a path, stays whole, so that it can be pasted."""
    return max((line for line in lines if " " in line.strip()), key=disp_len)


@pytest.mark.parametrize("columns", [48, pytest.param(100, marks=pytest.mark.slow)])
def test_ctrl_c_on_a_terminal(model_dir: Path, text_file: Path, tmp_path: Path, columns: int) -> None:
    (tmp_path / "model").symlink_to(model_dir)
    (tmp_path / "text.txt").symlink_to(text_file)
    words = ["mlx_linearard.distill", "--model", "model", "--data", "text.txt", "--output", "run", *FLAGS]
    run = OnTerminal([*words, "--steps", "5000"], tmp_path, columns)
    run.read_until("step 3/5000")
    os.write(run.terminal, b"\x03")
    run.read_until("then saving")
    run.read_until(None)
    assert run.process.wait(60) == 130
    lines = run.lines()
    assert disp_len(widest(lines)) <= columns, widest(lines)
    step = metrics(tmp_path / "run")[-1]["step"]
    answer = next(line for line in lines if line.startswith("finishing step "))
    assert int(answer.split()[2].rstrip(",")) in (step, step + 1) and lines[-2:] == ["stopped", ""]
    assert any(line.startswith(f"stopped after step {step}, saved in") for line in lines)
    pasted = shlex.split(" ".join(lines[lines.index("To continue:") + 1 : -2]).replace("\\ ", " "))
    pasted = pasted[2:] if pasted[1] == "-m" else pasted  # a command that is not on the PATH
    assert pasted == ["mlx_linearard.distill", "--config", "run/config.yaml", "--resume"]
    resumed = OnTerminal([*pasted, "--steps", str(step + 1)], tmp_path, columns)
    resumed.read_until(None)
    assert resumed.process.wait(60) == 0, resumed.text
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, step + 2))
    assert disp_len(widest(resumed.lines())) <= columns, widest(resumed.lines())
    assert f"resuming after step {step} of {step + 1}" in resumed.lines()


def test_a_signal_is_answered_while_python_waits() -> None:
    """A child sleeps in one call of C, as mlx does during a step; the answer comes before the call returns."""
    body = (
        "import ctypes, signal, time\n"
        "from mlx_linearard.distill.interrupt import stop_requests\n"
        "with stop_requests(answer=lambda: print('answered', flush=True)) as stop:\n"
        "    print('ready', flush=True)\n"
        "    start = time.monotonic()\n"
        "    while time.monotonic() < start + 3: ctypes.CDLL(None).usleep(3_000_000)\n"
        "    print(stop.requested, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(2)
    sent = time.monotonic()
    assert process.stdout.readline() == "answered\n" and time.monotonic() - sent < 2
    assert process.stdout.read() == "True\n" and process.wait() == 0


def test_no_signal_no_answer() -> None:
    calls: list[int] = []
    with answered([2], lambda: calls.append(1)):
        pass
    assert not calls


def test_a_thread_that_listened_before_still_hears() -> None:
    """The watch over the ranks listens for SIGTERM on a file of its own."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    calls: list[int] = []
    before, handler = signal.set_wakeup_fd(writer), signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with answered([signal.SIGINT], lambda: calls.append(1)):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert os.read(reader, 64) == bytes([signal.SIGUSR1])
        assert not calls and signal.set_wakeup_fd(writer) == writer
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGUSR1, handler)
        os.close(reader)
        os.close(writer)


# ---------------------------------------------------------------------------------------------------
# The last lines and the dry run


def test_a_dry_run_ends_with_amounts_and_time(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model_dir), "--data", str(text_file), "--output", str(tmp_path / "run"), *FLAGS]
    assert command([*flags, "--steps", "100", "--dry-run"]) == 0
    text, held_out, duration, nothing = capsys.readouterr().out.splitlines()[-4:]
    tokens = len(text_file.read_text()) + 1 - 128  # a token a byte and one at the end; twice 64 are held out
    assert text == f"training text: {tokens:,}".replace(",", " ") + " tokens; the run reads 3 200, 0.19 epochs"
    assert held_out == "held-out text: 64 tokens in windows of 32"
    assert re.fullmatch(r"time: about .+ \(measuring .+, training .+, exporting .+\)", duration)
    assert nothing == "nothing was written" and not list(tmp_path.iterdir())


def test_a_long_text_is_counted_for_a_while(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Letters:
        eos_token_id = None

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [ord(c) for c in text]

    documents = ["ab", ["cd", "ef"], "gh"]
    assert count_tokens(documents, Letters(), 100) == (8, False)
    assert count_tokens(documents, Letters(), 5) == (5, False)
    monkeypatch.setattr("mlx_linearard.distill.dry_run.COUNTING_SECONDS", -1.0)
    assert count_tokens(documents, Letters(), 100) == (0, True)
    sizing = Sizing(10, 1, 1, 5, 40, (10,), Times(1, 1, 1), "m", (10, 40))
    assert next(Amount(100, more=True).lines(sizing)) == (
        "training text: more than 100 tokens; the run reads 50, less than 0.5 epochs"
    )
    assert list(Amount(50, windows=2).lines(sizing))[:2] == [
        "training text: 50 tokens; the run reads 50, 1 epoch",
        "held-out text: 20 tokens in windows of 10",
    ]


def test_the_last_lines_agree_with_the_report_and_can_be_typed(
    model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    flags = ["--model", str(model_dir), "--data", str(text_file), "--output", str(run), *FLAGS]
    assert command([*flags, "--steps", "2", "--learning-rate", "1e-5", "--keep", "last", "--method", "linear"]) == 0
    ending = capsys.readouterr().out.partition("exporting\n")[2]
    what, _, after = ending.partition("\nNext:\n")
    assert any(len(line) > 60 and line in (run / "report.md").read_text() for line in what.splitlines())
    words = [shlex.split(line) for line in after.splitlines() if line.startswith("    ")]
    words = [line[2:] if line[1] == "-m" else line for line in words]  # a command that is not on the PATH
    assert ["mlx_lm.server", "--model", f"{run}/model"] in words
    more = next(line for line in words if "--resume" in line)
    assert more[-3:] == ["--steps", "4", "--resume"]
    assert command(more[1:]) == 0
    other = next(line for line in words if "--method" in line)
    assert command([*other[1:], "--dry-run"]) == 0 and other[other.index("--method") + 1] == "yarn"


def test_a_narrow_terminal_has_a_column_for_each_model() -> None:
    row = {"perplexity": {"2048": 31.2, "16384": 57.25}, "kl": 0.5, "agreement": 0.75}
    rows = {"native": {**row, "kl": None}, "scaled": row, "restored": row}
    assert table(rows, 200) == table(rows) and len(table(rows).splitlines()) == 4
    narrow = table(rows, 50).splitlines()
    assert narrow[0].split() == ["native", "scaled", "restored"] and max(map(len, narrow)) <= 50
    assert narrow[2].split() == ["perplexity", "@16384", "57.25", "57.25", "57.25"]
    assert narrow[3].split() == ["KL", "to", "native", "-", "0.5000", "0.5000"]


@pytest.mark.parametrize("width", [36, 60, 200])
def test_a_command_in_lines_is_the_same_command(width: int) -> None:
    words = ["mlx_linearard.distill", "--config", "a b/c's.yaml", "--steps", 72, "--resume", "--suite", "x,y"]
    text = shell_lines(words, width, "    ")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {text.lstrip()}"], capture_output=True, text=True).stdout
    assert printed.splitlines() == [str(word) for word in words]
    assert max(map(len, text.splitlines())) <= width
    assert shell_lines(words) == shell_command(*words)


def test_config_yaml_names_no_single_call(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """`--config RUN/config.yaml --resume` works after a run that was started with --overwrite."""
    config = small(model_dir, text_file, tmp_path / "run", steps=1, overwrite=True)
    assert distill(config) is not None
    assert command(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "--steps", "2"]) == 0
