"""The one error a user can cause, and how a command turns outcomes into exit statuses."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2
LOST_STATUS = 3
INTERRUPTED_STATUS = 130

# What a message of the platform contains -> what helps (from users' reports of mlx on Macs).
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        "Impacting Interactivity",
        "the display watchdog stopped a long GPU command: set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 "
        "in the environment, or make tiles smaller with --workspace",
    ),
    (
        "GPU Timeout",
        "the display watchdog stopped a long GPU command: set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 "
        "in the environment, or make tiles smaller with --workspace",
    ),
    ("Resource limit", "too many buffers are alive: lower --batch-size or --seq-len"),
    ("Unable to allocate", "out of memory: lower --seq-len, --batch-size or --workspace"),
    ("out of memory", "out of memory: lower --seq-len, --batch-size or --workspace"),
    ("Insufficient Memory", "out of memory: lower --seq-len, --batch-size or --workspace"),
)


class UserError(Exception):
    """A user's mistake: one line that names the thing and the remedy. Commands end with status 2."""


class LostProcess(Exception):
    """Of several processes that share a run another one has ended. Commands end with status 3."""

    advice: str | None = None  # how to go on


def remedy(error: BaseException) -> str | None:
    """The remedy for a known failure of the platform, or None for anything else."""
    text = str(error)
    return next((help_ for needle, help_ in REMEDIES if needle.lower() in text.lower()), None)


def one_line(text: object) -> str:
    """`text` on a single line, for messages that quote what others wrote."""
    return " ".join(str(text).split())


def error_line(text: object) -> str:
    """How a command tells of `text` on standard error."""
    return f"error: {one_line(text)}"


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
