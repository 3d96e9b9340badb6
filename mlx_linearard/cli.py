"""The command line's common part: the argument parser, and how a command ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import typing
from collections.abc import Callable
from typing import Any

from .errors import INTERRUPTED_STATUS, LOST_STATUS, USER_ERROR_STATUS, LostProcess, UserError, error_line, remedy


def make_parser(prog: str, description: str, **kwargs: Any) -> argparse.ArgumentParser:
    """An argument parser whose complaints are UserErrors, for every command."""
    return _OneLineParser(
        prog=prog,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        **kwargs,
    )


class _OneLineParser(argparse.ArgumentParser):
    """argparse, with a user's mistake told in one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(body: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit status.

    0 done; 2 a user's mistake, told in one line on standard error; 3 another process of this run was lost, told
    likewise; 130 interrupted.
    Any other exception is a bug and keeps its traceback, after its remedy where one is known.
    """
    try:
        return body() or 0
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        return USER_ERROR_STATUS
    except LostProcess as error:
        print(error_line(error), file=sys.stderr)
        return LOST_STATUS
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # `... | head`: the reader has gone, which is no error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (RuntimeError, MemoryError, OSError) as error:
        if help_ := remedy(error):
            print(f"hint: {help_}", file=sys.stderr)
        raise
