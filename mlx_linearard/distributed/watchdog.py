"""What sees to it that a process of several ends, wherever its main thread is, and that one of them says why."""

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

# Seconds, together below half a minute.
GRACE = 10.0  # that a main thread has after SIGTERM; then it is left where it is
SAVING = 8.0  # that saving may take where a process is lost
PATIENCE = 12.0  # that a rank waits for the first one of its machine to tell what happened
LAST = 26  # from the end of the work to the end of the process; the system sees to it
AT_ONCE = 2.0  # after a second Ctrl-C
TICK = 0.1

HANDLES = 1024  # of open files, among which connections are looked for

STOPPED = "stopped by SIGTERM, which mlx.launch sends where another process has ended"
BEGIN = "no step was saved: start again with the same command"


@dataclass(frozen=True)
class Rescue:
    """What is done where a process is lost: `advice` says how to go on, `save` saves before what can be saved."""

    advice: Callable[[], str] = lambda: BEGIN
    save: Callable[[], object] = lambda: None


class Witness:
    """A file without a name that the ranks of one machine share: whether its first one lives, and who has told.

    The first one holds a lock on it, which the system releases when it ends, however it ends; whoever tells what
    happened leaves a byte in it.
    """

    def __init__(self, handle: int | None = None, path: str = "", keeps: bool = False):
        self.handle, self.path, self.keeps = handle, path, keeps

    @classmethod
    def made(cls) -> Witness:
        handle, path = tempfile.mkstemp(prefix="linearard-")
        fcntl.flock(handle, fcntl.LOCK_EX)
        return cls(handle, path, True)

    @classmethod
    def opened(cls, path: str) -> Witness:
        return cls(os.open(path, os.O_RDWR | os.O_APPEND), path)

    def hide(self) -> None:
        """Take its name away."""
        if self.keeps:
            Path(self.path).unlink(missing_ok=True)

    def tells(self) -> bool:
        """Whether it is this rank that has to tell: the first one, or the first of the others where that is gone."""
        if self.handle is None:
            return True
        end = time.monotonic() + PATIENCE
        while not self.keeps:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > end or os.fstat(self.handle).st_size:
                return False
            time.sleep(TICK)
        if os.fstat(self.handle).st_size:
            return False
        self.tell()
        return True

    def tell(self) -> None:
        """Leave the mark of somebody who has told, or is about to."""
        if self.handle is not None:
            os.write(self.handle, b".")


def hang_up() -> None:
    """Shut all connections of this process, so that ranks further along a ring learn at once that one is lost."""
    for handle in range(3, HANDLES):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(handle).st_mode):
                with socket.socket(fileno=os.dup(handle)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


class Watch:
    """Hears signals in a thread of its own, which a main thread that is blocked in a collective cannot.

    After SIGTERM the main thread has GRACE seconds to leave. Then this thread saves what can be saved, tells how to
    go on, and ends the process. A second Ctrl-C ends it at once.
    """

    def __init__(self) -> None:
        self.witness = Witness()
        self.leaving = threading.Event()
        self._rescue = Rescue()

    @contextlib.contextmanager
    def rescuing(self, rescue: Rescue) -> Iterator[None]:
        """While the block runs, this is the rescue; where it ends with a lost process, it is made."""
        before, self._rescue = self._rescue, rescue
        try:
            yield
        except LostProcess as lost:
            self.leave()
            hang_up()
            lost.advice = lost.advice or self.rescued()
            raise
        finally:
            self._rescue = before

    def rescued(self) -> str:
        """Save what can be saved in a short time; how to go on."""
        saver = threading.Thread(target=self._saved, daemon=True)
        saver.start()
        saver.join(SAVING)
        return self._rescue.advice()

    def _saved(self) -> None:
        with contextlib.suppress(Exception):  # then the checkpoint before is what the advice finds
            self._rescue.save()

    def leave(self) -> None:
        """From here on this process ends by itself; where that takes too long, the system ends it."""
        if not self.leaving.is_set():
            self.leaving.set()
            signal.alarm(LAST)

    def __enter__(self) -> Watch:
        self._before: list[Any] = []
        if threading.current_thread() is threading.main_thread():
            heard, self._said = os.pipe()
            os.set_blocking(self._said, False)
            self._before = [signal.signal(signal.SIGTERM, self._terminated), signal.set_wakeup_fd(self._said)]
            threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Signals are as they were; a process that is about to end is not disturbed by another SIGTERM."""
        if self._before:
            handler, wakeup = self._before
            signal.set_wakeup_fd(wakeup)
            os.close(self._said)
            signal.signal(signal.SIGTERM, handler if kind is None else signal.SIG_IGN)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if not self.leaving.is_set():
            raise LostProcess(STOPPED)

    def _listen(self, heard: int) -> None:
        """Until the watch ends: signals, and whether the launcher is still there; its end is a Ctrl-C."""
        interrupts, launcher = 0, os.getppid()
        while True:
            if not select.select([heard], [], [], 1.0)[0]:
                if launcher not in (0, os.getppid()):
                    launcher = 0
                    os.kill(os.getpid(), signal.SIGINT)
                continue
            numbers = os.read(heard, 64)
            if not numbers:
                return
            if signal.SIGTERM in numbers and not self.leaving.is_set():
                threading.Thread(target=self._after_sigterm, daemon=True).start()
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                time.sleep(AT_ONCE)
                os._exit(INTERRUPTED_STATUS)

    def _after_sigterm(self) -> None:
        if self.leaving.wait(GRACE):
            return
        self.leaving.set()
        advice = self.rescued()
        if self.witness.tells():
            os.write(sys.stderr.fileno(), f"{error_line(f'{STOPPED}; {advice}')}\n".encode())
        os._exit(LOST_STATUS)
