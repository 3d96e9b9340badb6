"""Runs of several processes, as mlx.launch starts them, for tests that look at how they end.

Every launch has ports and a process group of its own, ends within a time limit, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
DISTILL = ("-m", "mlx_linearard.distill")
TIMEOUT = 180.0


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, chosen at random, so that parallel tests use different ones."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def hears_ctrl_c() -> None:
    """Makes a new process receive SIGINT, which the processes in a shell's background ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Launch:
    """mlx.launch with `size` ranks of a Python command, and their output after the end."""

    def __init__(self, size: int, arguments: Sequence[str], command: Sequence[str] = DISTILL):
        self.size, self.out, self.err = size, "", ""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCH,
                "-n",
                str(size),
                "--starting-port",
                str(free_ports(size)),
                "--",
                sys.executable,
                *command,
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def pids(self) -> dict[int, int]:
        """The process of each rank that is running; Linux only."""
        found = {}
        for pid in self._group():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                name = Path(f"/proc/{pid}/comm").read_text()
                ranks = [int(entry[9:]) for entry in environment if entry.startswith(b"MLX_RANK=")]
                if ranks and name.startswith("python"):
                    found[ranks[0]] = pid
        return found

    def _group(self) -> list[int]:
        listed = subprocess.run(["ps", "-eo", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
        pairs = (map(int, line.split()) for line in listed.splitlines())
        return [pid for pid, group in pairs if group == self.process.pid and pid != self.process.pid]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids()[rank], number)

    def until(self, condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
        """Wait until the condition holds or the launch has ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and not condition():
            assert time.monotonic() < end, "nothing happens"
            time.sleep(0.002)

    def wait(self, seconds: float = TIMEOUT) -> float:
        """Read the output to its end; returns the seconds until then."""
        begun = time.monotonic()
        try:
            self.out, self.err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            self.out, self.err = self.process.communicate()
            raise AssertionError(f"still there after {seconds} s: {self.out}{self.err}") from None
        return time.monotonic() - begun

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def statuses(self) -> dict[int, int]:
        """The exit status of each rank that did not end with 0, from the output of mlx.launch."""
        return {int(r): int(c) for r, c in re.findall(r"Node with rank (\d+) exited with code (-?\d+)", self.err)}

    def errors(self) -> list[str]:
        """The commands' lines on standard error, without those of mlx.launch and mlx's ring."""
        return re.findall(r"(?:error: |stopped|Traceback|hint: )[^\n]*", self.err)


@contextlib.contextmanager
def launch(size: int, arguments: Sequence[str], command: Sequence[str] = DISTILL) -> Iterator[Launch]:
    """A launch that the block's end stops in any case; AssertionError if it left a process."""
    started = Launch(size, arguments, command)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.end()
            started.process.communicate()
    left = started._group()
    started.end()
    assert not left, f"processes {left} are left"


def launched(size: int, arguments: Sequence[str], command: Sequence[str] = DISTILL) -> Launch:
    """A complete launch."""
    with launch(size, arguments, command) as started:
        started.wait()
    return started
