"""Commands in processes of their own without paying for their imports each time.

Started as a program this reads requests from standard input, a JSON line each: {"module", "arguments", "cwd"}. It
forks for each (it has imported everything, and done no work that a fork would break), and answers with the exit
status and what standard error got.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

COMMANDS = ("distill", "convert", "export", "evaluate", "report", "doctor")
MODULES = {name: f"mlx_linearard.{name}.__main__" for name in COMMANDS}
TIMEOUT = 120


class Commands:
    """`run(module, arguments, cwd)` -> (status, standard error)."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None
        if sys.platform == "linux":  # elsewhere a fork does not survive what the imports have started
            self.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def run(self, module: str, arguments: list[str], cwd: Path) -> tuple[int, str]:
        if self.server is None:
            command = [sys.executable, "-m", f"mlx_linearard.{module}", *arguments]
            done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)
            return done.returncode, done.stderr
        assert self.server.stdin and self.server.stdout
        print(
            json.dumps({"module": module, "arguments": arguments, "cwd": str(cwd)}), file=self.server.stdin, flush=True
        )
        answer = json.loads(self.server.stdout.readline())
        return answer["status"], answer["stderr"]

    def close(self) -> None:
        if self.server is not None:
            assert self.server.stdin
            self.server.stdin.close()
            self.server.wait(TIMEOUT)


def _serve() -> None:
    for name in MODULES.values():
        importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                _become(json.loads(line), errors.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            errors.seek(0)
            print(json.dumps({"status": status, "stderr": errors.read()}), flush=True)


def _become(request: dict[str, Any], errors: int) -> None:
    """Run the command and end this process as it would."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(errors, 2)
    os.chdir(request["cwd"])
    sys.argv = [request["module"], *request["arguments"]]
    status = 1
    try:
        importlib.import_module(MODULES[request["module"]]).main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
