"""The errors that a user can cause or must see, the exit statuses of commands, and remedies of known failures."""

from __future__ import annotations

USER_ERROR_STATUS = 2
LOST_STATUS = 3
INTERRUPTED_STATUS = 130

_WATCHDOG = (
    "the display watchdog stopped a long GPU command: set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment, "
    "or make tiles smaller with --workspace"
)
_MEMORY = (
    "the device's memory is full: close other programs that use it, give --recompute all (training), or lower "
    "--seq-len, --batch-size or --workspace"
)

# Part of an error message of the platform -> the remedy (from users' reports of mlx on Macs).
REMEDIES: tuple[tuple[str, str], ...] = (
    ("Impacting Interactivity", _WATCHDOG),
    ("GPU Timeout", _WATCHDOG),
    ("Resource limit", "too many buffers are alive: lower --batch-size or --seq-len"),
    ("Unable to allocate", _MEMORY),
    ("out of memory", _MEMORY),
    ("Insufficient Memory", _MEMORY),
)


class UserError(Exception):
    """A user's mistake: one line that names the thing and the remedy. Commands end with status 2."""


class LostProcess(Exception):
    """Another process of a distributed run has ended. Commands end with status 3."""

    advice: str | None = None  # how to resume


def remedy(error: BaseException) -> str | None:
    """The remedy of a known failure of the platform; None if the failure is unknown."""
    text = str(error).lower()
    return next((help_ for part, help_ in REMEDIES if part.lower() in text), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of the platform says that the device's memory is full."""
    return remedy(error) == _MEMORY


def one_line(text: object) -> str:
    """`text` on a single line, for messages that quote others."""
    return " ".join(str(text).split())


def error_line(text: object) -> str:
    """The line that a command prints on standard error for `text`."""
    return f"error: {one_line(text)}"
