"""The one error a user can cause, and how a command turns outcomes into exit statuses."""

from __future__ import annotations

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
