"""Commands end with the right status, one line for a mistake, and no stream that fails ends their work."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_linearard.cli import LARGEST, LastingStream, Parser, integer, run_command
from mlx_linearard.errors import LostProcess, UserError

# A command that prints much, then does its work: it leaves a file.
BODY = """
import sys
from pathlib import Path
from mlx_linearard.cli import run_command
from mlx_linearard.progress import Progress

def body():
    progress = Progress()
    for i in range(20000):
        progress.say(f"line {i}")
    print("näh \\u2192 \\udcff")
    Path(sys.argv[1]).write_text("done")
    return int(sys.argv[2])

sys.exit(run_command(body))
"""


def start(tmp_path: Path, status: int = 0, shell: str = "", **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BODY, str(tmp_path / "work"), str(status)]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path: Path) -> None:
    process = start(tmp_path, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "line 0\n"
    process.stdout.close()
    errors = process.communicate()[1]
    assert process.returncode == 0 and errors == "" and (tmp_path / "work").read_text() == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_does_not_end_the_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(tmp_path, stdout=full)
        errors = process.communicate()[1]
    assert process.returncode == 0 and (tmp_path / "work").read_text() == "done"
    assert errors.count("\n") == 1 and "standard output could not be written" in errors


@pytest.mark.parametrize("closed", [">&-", "<&- >&-"])
def test_closed_streams_do_not_end_the_work(tmp_path: Path, closed: str) -> None:
    process = start(tmp_path, shell=closed)
    errors = process.communicate()[1]
    assert process.returncode == 0 and errors == "" and (tmp_path / "work").read_text() == "done"


def test_an_ascii_stream_gets_escapes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = start(tmp_path, stdout=subprocess.PIPE, env=environment)
    lines, errors = process.communicate()
    assert process.returncode == 0 and errors == ""
    assert lines.splitlines()[-1] == "n\\xe4h \\u2192 \\udcff"


def test_a_lasting_stream_is_dropped_once() -> None:
    stream = io.StringIO()
    lasting = LastingStream(stream)
    assert lasting.write("a") == 1 and not lasting.isatty()
    stream.close()
    for _ in range(2):
        lasting.write("b")
        lasting.flush()
    assert isinstance(lasting.failure, ValueError) and not lasting.isatty()


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no\n such file"), 2, "error: no such file\n"),
        (LostProcess("process 1 ended"), 3, "error: process 1 ended\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_each_end_has_its_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise error

    assert run_command(body) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("[METAL] Command buffer execution failed: Impacting Interactivity", "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", "close other programs that use it"),
    ],
)
def test_a_known_failure_is_a_line_with_its_remedy(
    message: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise RuntimeError(message)

    assert run_command(body) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and remedy in said and message in said


def test_a_bug_keeps_its_traceback() -> None:
    streams = sys.stdout, sys.stderr

    def body() -> None:
        raise RuntimeError("Something else")

    with pytest.raises(RuntimeError, match="Something else"):
        run_command(body)
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("text", ["0", "x", "", "1.5", "1e3", "٣", "1_000", str(2**31), "9" * 5000, "-1", " 3"])
def test_an_integer_option_has_a_range(text: str) -> None:
    parser = Parser("program")
    parser.add_argument("--count", type=integer(1))
    with pytest.raises(UserError, match=r"--count: .* is not a whole number from 1 to 2147483647; see program --help"):
        parser.parse_args([f"--count={text}"])
    assert parser.parse_args(["--count", str(LARGEST)]).count == LARGEST


def test_verbs_complain_in_one_line_too() -> None:
    parser = Parser("program")
    parser.add_subparsers(dest="verb").add_parser("do").add_argument("what")
    with pytest.raises(UserError, match="see program do --help"):
        parser.parse_args(["do"])
