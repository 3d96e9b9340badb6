"""Ends every process of a distributed run when one is lost, and prints the reason once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import INTERRUPTED_STATUS, LOST_STATUS, LostProcess, error_line

# Seconds. Together they are below half a minute.
GRACE = 10.0  # for the main thread to leave after SIGTERM
SAVING = 8.0  # for the save after the loss of a process
PATIENCE = 12.0  # for the first rank of a machine to report, before another one does
LAST = 26  # from the end of the work to SIGALRM, which ends the process
SECOND_CTRL_C = 2.0  # from a second Ctrl-C until the process ends
TICK = 0.1  # between two looks at the witness

HANDLES = 1024  # file descriptors that are searched for connections

STOPPED = "stopped by SIGTERM, which mlx.launch sends when another process has ended"
BEGIN = "no step was saved: start again with the same command"


@dataclass(frozen=True)
class Rescue:
    """What to do when a process is lost: `save` saves the run, then `advice` says how to continue it."""

    advice: Callable[[], str] = lambda: BEGIN
    save: Callable[[], object] = lambda: None


class Witness:
    """A file that the ranks of one machine share. It shows whether the first rank lives, and whether one reported.

    The first rank holds a lock on the file. The system releases the lock when that rank ends, however it ends.
    The rank that prints the reason writes a byte into the file.
    """

    def __init__(self, handle: int | None = None, path: str = "", owns: bool = False):
        self.handle, self.path, self.owns = handle, path, owns

    @classmethod
    def create(cls) -> Witness:
        handle, path = tempfile.mkstemp(prefix="linearard-")
        fcntl.flock(handle, fcntl.LOCK_EX)
        return cls(handle, path, True)

    @classmethod
    def open(cls, path: str) -> Witness:
        return cls(os.open(path, os.O_RDWR | os.O_APPEND), path)

    def hide(self) -> None:
        """Remove the file's name; the open handles stay valid."""
        if self.owns:
            Path(self.path).unlink(missing_ok=True)

    def claim_report(self) -> bool:
        """Whether this rank has to print the reason: the first rank does, or another one if the first has ended."""
        if self.handle is None:
            return True
        end = time.monotonic() + PATIENCE
        while not self.owns:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end or os.fstat(self.handle).st_size:
                return False
            time.sleep(TICK)
        if os.fstat(self.handle).st_size:
            return False
        self.mark_reported()
        return True

    def mark_reported(self) -> None:
        """Note that this rank has printed the reason, or is about to."""
        if self.handle is not None:
            os.write(self.handle, b".")


def hang_up() -> None:
    """Close all connections of this process, so that all ranks of a ring notice the loss immediately."""
    for handle in range(3, HANDLES):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(handle).st_mode):
                with socket.socket(fileno=os.dup(handle)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


class Watch:
    """Handles signals in a separate thread, because a main thread that waits in a collective cannot.

    After SIGTERM the main thread has GRACE seconds to leave. Then the watching thread saves the run, prints how to
    continue it, and ends the process. A second Ctrl-C ends the process immediately.
    """

    def __init__(self) -> None:
        self.witness = Witness()
        self.leaving = threading.Event()
        self._rescue = Rescue()

    @contextlib.contextmanager
    def rescuing(self, rescue: Rescue) -> Iterator[None]:
        """Use this rescue while the block runs; if the block ends with LostProcess, run the rescue."""
        before, self._rescue = self._rescue, rescue
        try:
            yield
        except LostProcess as lost:
            self.leave()
            hang_up()
            lost.advice = lost.advice or self.rescue()
            raise
        finally:
            self._rescue = before

    def rescue(self) -> str:
        """Save the run, for at most SAVING seconds; return how to continue it."""
        saver = threading.Thread(target=self._save, daemon=True)
        saver.start()
        saver.join(SAVING)
        return self._rescue.advice()

    def _save(self) -> None:
        with contextlib.suppress(Exception):  # the advice then names the previous checkpoint
            self._rescue.save()

    def leave(self) -> None:
        """Note that this process is ending; SIGALRM ends it if that takes longer than LAST seconds."""
        if not self.leaving.is_set():
            self.leaving.set()
            signal.alarm(LAST)

    def __enter__(self) -> Watch:
        self._before: list[Any] = []
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = [signal.signal(signal.SIGTERM, self._terminated), signal.set_wakeup_fd(self._writer)]
            threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restore the signal handlers; a process that is about to end ignores further SIGTERMs."""
        if self._before:
            handler, wakeup = self._before
            signal.set_wakeup_fd(wakeup)
            os.close(self._writer)
            signal.signal(signal.SIGTERM, handler if kind is None else signal.SIG_IGN)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if not self.leaving.is_set():
            raise LostProcess(STOPPED)

    def _listen(self, reader: int) -> None:
        """Handle signals until the watch ends. If the launcher has ended, behave as after Ctrl-C."""
        interrupts, launcher = 0, os.getppid()
        while True:
            if not select.select([reader], [], [], 1.0)[0]:
                if launcher not in (0, os.getppid()):
                    launcher = 0
                    os.kill(os.getpid(), signal.SIGINT)
                continue
            numbers = os.read(reader, 64)
            if not numbers:
                return
            if signal.SIGTERM in numbers and not self.leaving.is_set():
                threading.Thread(target=self._after_sigterm, daemon=True).start()
            if signal.SIGHUP in numbers:  # the terminal is closed, so the launcher ends too: one request is enough
                launcher = 0
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                time.sleep(SECOND_CTRL_C)
                os._exit(INTERRUPTED_STATUS)

    def _after_sigterm(self) -> None:
        if self.leaving.wait(GRACE):
            return
        self.leaving.set()
        advice = self.rescue()
        if self.witness.claim_report():
            os.write(sys.stderr.fileno(), f"{error_line(f'{STOPPED}; {advice}')}\n".encode())
        os._exit(LOST_STATUS)
