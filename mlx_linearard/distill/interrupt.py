"""Ctrl-C, SIGTERM and SIGHUP as a request to stop between two steps; a second signal stops immediately.

SIGHUP comes when a terminal is closed or an ssh connection is lost. A process that was started with `nohup` ignores
SIGHUP, and this module does not change that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
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
def stop_requests(hurried: Collection[int] = SIGNALS, answer: Callable[[], object] = lambda: None) -> Iterator[Request]:
    """While the block runs, a first signal only sets `requested`. Outside the main thread, signals are not changed.

    answer: is called once, by another thread, as soon as the first signal comes (see `answered`).
    """
    request = Request(hurried)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, request) for number in heard}
    try:
        with answered(heard, answer):
            yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def answered(signals: Collection[int], answer: Callable[[], object]) -> Iterator[None]:
    """Call `answer` in another thread when the first of `signals` comes while the block runs.

    Python handles a signal only between two of its own instructions, and one call of mlx may take many seconds; the
    number of the signal, however, is written to a file at once. A number goes on to the file that was set before this
    block, where another thread may wait for it. Outside the main thread nothing is answered.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()  # not sockets: the loss of a rank closes every connection of this process
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer_first, args=(reader, before, signals, answer), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


def _answer_first(reader: int, onward: int, signals: Collection[int], answer: Callable[[], object]) -> None:
    """Answer the first number of `signals`, and write all numbers to the file `onward` (-1: none) until they end."""
    waiting = True
    while received := os.read(reader, 64):
        if onward >= 0:
            with contextlib.suppress(OSError):
                os.write(onward, received)
        if waiting and any(number in signals for number in received):
            waiting = False
            answer()
