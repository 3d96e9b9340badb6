"""Commands in processes of their own without paying for their imports each time.

Started as a program this reads requests from standard input, a JSON line each, and answers each with one. For
{"module", "arguments", "cwd", "out", "errors"} it forks (it has imported everything, and done no work that a fork
would break), and answers with the process; for {"process"} it answers with its exit status, null while it runs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from launched import hears_ctrl_c

COMMANDS = ("distill", "convert", "export", "evaluate", "report", "doctor")
MODULES = {name: f"mlx_linearard.{name}.__main__" for name in COMMANDS}
TIMEOUT = 120.0


class Started:
    """A command that runs in a process of its own; its output is in files."""

    def __init__(self, server: subprocess.Popen[str] | None, module: str, arguments: list[str], cwd: Path) -> None:
        self.server, self.status = server, None
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.errors = (Path(self.folder.name) / name for name in ("out", "errors"))
        if server is None:
            command = [sys.executable, "-m", f"mlx_linearard.{module}", *arguments]
            with self.out.open("w") as out, self.errors.open("w") as errors:
                self.process = subprocess.Popen(
                    command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, preexec_fn=hears_ctrl_c
                )
            self.pid = self.process.pid
            return
        request = {"module": module, "arguments": arguments, "cwd": str(cwd)}
        self.pid = _ask(server, {**request, "out": str(self.out), "errors": str(self.errors)})

    def poll(self) -> int | None:
        """The exit status, as subprocess.Popen has it; None while the process runs."""
        if self.status is None:
            self.status = self.process.poll() if self.server is None else _ask(self.server, {"process": self.pid})
        return self.status

    def wait(self, seconds: float = TIMEOUT) -> int:
        """The exit status; AssertionError if the process has not ended in time, and then it is killed."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"still there after {seconds} s: {self.errors.read_text()}")
            time.sleep(0.002)
        assert self.status is not None
        return self.status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Commands:
    """Starts commands: on Linux as forks of one process, elsewhere each on its own."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None
        if sys.platform == "linux":  # elsewhere a fork does not survive what the imports have started
            self.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def start(self, module: str, arguments: list[str], cwd: Path) -> Started:
        """Start `python -m mlx_linearard.MODULE ARGUMENTS` in the folder `cwd`."""
        return Started(self.server, module, arguments, cwd)

    def run(self, module: str, arguments: list[str], cwd: Path) -> tuple[int, str]:
        """The exit status of a command, and what it wrote to standard error."""
        started = self.start(module, arguments, cwd)
        return started.wait(), started.errors.read_text()

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stdin
            self.server.stdin.close()
            self.server.wait(TIMEOUT)


def _ask(server: subprocess.Popen[str], request: dict[str, Any]) -> Any:
    assert server.stdin and server.stdout
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    for name in MODULES.values():
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "process" in request:
            ended, status = os.waitpid(request["process"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


def _become(request: dict[str, Any]) -> None:
    """Run the command and end this process as it would."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    for number, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes in a shell's background ignore it
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        importlib.import_module(MODULES[request["module"]]).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
