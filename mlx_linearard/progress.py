"""The progress lines of a long job."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from typing import TextIO

QUIET = 10.0  # seconds between two lines if the stream is no terminal


class Progress:
    """Prints how far a job is and how long it will take.

    On a terminal this is one line that changes; in a pipe or a file it is a line every ten seconds and one at the end
    of each job.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._open = False  # the changing line has no end yet
        self._clocks: dict[str, _Clock] = {}
        self._seen = self._printed = time.monotonic()  # times of the last update and the last line

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def tokens(self, label: str, done: int, total: int) -> None:
        """`done` of the `total` tokens of the job `label`."""
        self.update(label, f"{label}: {done}/{total} tokens", done, total)

    def update(self, job: str, text: str, done: int, total: int, *, before: int = 0) -> None:
        """Print `text` and the time left of a job that is at `done` of `total`.

        before: the part of `done` that was done before this process began. The time of a job counts from the last
        update of another job, so the first update already has an estimate.
        """
        now = time.monotonic()
        clock = self._clocks.get(job)
        if clock is None or done < clock.done:  # a new job, or the same one again
            clock = self._clocks[job] = _Clock(self._seen, before)
        clock.done, self._seen = done, now
        left = f"{duration(clock.left(now, total))} left" if done < total else "done"
        if done >= total:
            del self._clocks[job]
        self._line(f"{text}, {left}", now, last=done >= total)

    def _line(self, text: str, now: float, *, last: bool) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: width - 1]}", end="\n" if last else "", file=self._stream, flush=True)
            self._open = not last
        elif last or now - self._printed >= QUIET:
            self._printed = now
            print(text, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=self._stream)
            self._open = False


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
