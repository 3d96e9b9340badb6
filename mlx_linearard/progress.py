"""What a long job shows: one changing line on a terminal, plain lines elsewhere, and no line wider than the terminal.

tqdm draws the changing line. It is installed already, because mlx-lm's own dependencies need it; it measures wide
characters, and it keeps other tqdm lines, such as a download's, apart from this one.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.utils import disp_len

QUIET = 10.0  # seconds between two lines if nothing may change on the stream
KEPT_EVERY = 30.0  # seconds between two lines that stay, beside the changing line
SHORTEST_BAR = 12  # columns for the bar and its percentage
MARGIN = 4  # free columns at the end of the changing line: a terminal echoes ^C there


def is_live(stream: TextIO) -> bool:
    """Whether a line on `stream` may change: on a terminal that can erase, unless NO_COLOR asks for plain text."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not os.environ.get("NO_COLOR")


def width_of(stream: TextIO) -> int | None:
    """The columns of the terminal behind `stream`; None if there is no terminal."""
    if not stream.isatty():
        return None
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        columns = 0
    return columns or shutil.get_terminal_size().columns


def wrapped(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` columns, cut between words; a longer word, such as a path, stays whole."""
    if width is None:
        return text
    lines = (
        textwrap.wrap(
            line,
            max(width, 8),
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )
    return "\n".join("\n".join(line) for line in lines)


def fitting(parts: Sequence[str], width: int) -> str:
    """The first parts, joined by commas, that fit in `width` columns; at least one."""
    text = parts[0]
    for part in parts[1:]:
        if disp_len(longer := f"{text}, {part}") > width:
            break
        text = longer
    return text


class _Line(tqdm):  # type: ignore[type-arg]
    """A changing line that erases whatever else is on its line of the terminal, and that starts no thread."""

    monitor_interval = 0

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def show(text: str) -> None:
            file.write(f"\r\x1b[K{text}")
            file.flush()

        return show


_Line.set_lock(threading.RLock())


class Progress:
    """Shows how far a job is and how long it will take.

    On a terminal this is a changing line, and every half minute a line that stays. In a pipe or a file, with NO_COLOR,
    or with TERM=dumb it is a line every ten seconds and one at the end of each job. Any thread may call `say`.
    As a context manager, it leaves no half-written line behind, and what others write to standard error in between
    gets a line of its own.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = is_live(self._stream)
        self._bar: _Line | None = None
        self._lock = threading.RLock()
        self._clocks: dict[str, _Clock] = {}
        self._seen = self._printed = time.monotonic()  # times of the last update and the last line that stays
        self._errors: TextIO | None = None  # standard error, while it is replaced

    def __enter__(self) -> Progress:
        if self._live:
            self._errors, sys.stderr = sys.stderr, _Apart(sys.stderr, self)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._errors is not None:
            sys.stderr, self._errors = self._errors, None
        self.clear()

    @property
    def width(self) -> int | None:
        """The columns of the terminal; None if the stream is no terminal."""
        return width_of(self._stream)

    def say(self, text: str, *, whole: bool = False) -> None:
        """Print lines of their own, cut between words to the terminal's width unless they must stay `whole`."""
        with self._lock:
            self.clear()
            print(text if whole else wrapped(text, self.width), file=self._stream, flush=True)

    def tokens(self, label: str, done: int, total: int) -> None:
        """`done` of the `total` tokens of the job `label`."""
        self.update(label, [f"{label}: {done}/{total} tokens"], done, total)

    def update(self, job: str, parts: Sequence[str], done: int, total: int, *, before: int = 0) -> None:
        """Show a job that is at `done` of `total`: its first part, the time left, then the other parts that fit.

        before: the part of `done` that was done before this process began. The time of a job counts from the last
        update of another job, so the first update already has an estimate.
        """
        with self._lock:
            now = time.monotonic()
            clock = self._clocks.get(job)
            if clock is None or done < clock.done:  # a new job, or the same one again
                clock = self._clocks[job] = _Clock(self._seen, before)
            clock.done, self._seen = done, now
            left = f"{duration(clock.left(now, total))} left" if done < total else "done"
            if done >= total:
                del self._clocks[job]
            self._show([parts[0], left, *parts[1:]], done, total, now)

    def clear(self) -> None:
        """Remove the changing line."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def _show(self, parts: Sequence[str], done: int, total: int, now: float) -> None:
        stays = done >= total or now - self._printed >= (KEPT_EVERY if self._live else QUIET)
        if stays:
            self._printed = now
            width = self.width
            self.say(", ".join(parts) if width is None else fitting(parts, width))
        if self._live and done < total:
            self._draw(parts, done, total)

    def _draw(self, parts: Sequence[str], done: int, total: int) -> None:
        width = (self.width or 80) - MARGIN
        text = fitting(parts, width - SHORTEST_BAR)
        if self._bar is None:
            form = "{percentage:3.0f}%|{bar}| {desc}"
            self._bar = _Line(file=self._stream, leave=False, bar_format=form, ncols=width, total=total, initial=done)
        self._bar.ncols, self._bar.total, self._bar.n, self._bar.desc = width, total, done, text
        self._bar.display()


class _Apart:
    """A stream whose text begins on a line of its own: the changing line is removed first."""

    def __init__(self, stream: TextIO, progress: Progress) -> None:
        self._stream, self._progress = stream, progress

    def write(self, text: str) -> int:
        self._progress.clear()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass
class _Clock:
    """When a job began, how much was done then, and how much is done now."""

    began: float
    before: int
    done: int = 0

    def left(self, now: float, total: int) -> float:
        """Seconds that the rest takes at the speed so far."""
        return (now - self.began) / max(self.done - self.before, 1) * (total - self.done)


def duration(seconds: float) -> str:
    """'45 s', '12 min' or '3 h 05 min'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
