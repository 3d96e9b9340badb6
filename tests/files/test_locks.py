"""The lock of a path: one holder at a time, released on death, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_linearard.errors import UserError
from mlx_linearard.files import locked

HOLD = """
import sys, time
from mlx_linearard.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys, time
from pathlib import Path
from mlx_linearard.files import locked
path = Path(sys.argv[1])
for _ in range(30):
    with locked(path, wait=60):
        number = int(path.read_text() or 0)
        time.sleep(0.001)
        path.write_text(str(number + 1))
"""


@pytest.mark.parametrize("name", ["results.json", "run"])
def test_a_second_holder_gets_one_line_and_nothing_stays(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    if name == "run":
        target.mkdir()
    with locked(target):
        assert (tmp_path / ".results.json.lock").exists() or (target / ".lock").exists()
        with pytest.raises(UserError, match=f"{name} is in use by another process: wait until it ends"), locked(target):
            pass
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    with locked(target), locked(tmp_path / "other"):
        pass


def test_the_system_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    with pytest.raises(UserError), locked(tmp_path / "file", wait=0.1):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".file.lock").exists()
    with locked(tmp_path / "file"):
        pass
    process.stdout.close()


def test_waiting_processes_take_turns_and_lose_nothing(tmp_path: Path) -> None:
    """Three processes count in one file; a lock file that its holder removes must not let two in at once."""
    file = tmp_path / "count"
    file.write_text("")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(file)]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert file.read_text() == "90"


def test_waiting_ends(tmp_path: Path) -> None:
    begun = time.monotonic()
    with locked(tmp_path / "file"), pytest.raises(UserError), locked(tmp_path / "file", wait=0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file"):
        pass
