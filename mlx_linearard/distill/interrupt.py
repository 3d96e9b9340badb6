"""Ctrl-C, SIGTERM and SIGHUP as a request to stop between two steps; a second signal stops immediately.

SIGHUP comes when a terminal is closed or an ssh connection is lost. A process that was started with `nohup` ignores
SIGHUP, and this module does not change that.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Request:
    """Whether a signal asked the run to stop. A second signal, if it is one of `hurried`, raises KeyboardInterrupt."""

    def __init__(self, hurried: Collection[int] = SIGNALS) -> None:
        self.requested = False
        self.hurried = hurried

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in self.hurried:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def stop_requests(hurried: Collection[int] = SIGNALS) -> Iterator[Request]:
    """While the block runs, a first signal only sets `requested`. Outside the main thread, signals are not changed."""
    request = Request(hurried)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, request) for number in heard}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
