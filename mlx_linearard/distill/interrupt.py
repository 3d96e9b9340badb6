"""Ctrl-C and SIGTERM as a request that is honoured between two steps; a second one leaves at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Collection, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Request:
    """Whether somebody asked to stop. One of `at_once` that comes after another leaves at once."""

    def __init__(self, at_once: Collection[int] = SIGNALS) -> None:
        self.made = False
        self.at_once = at_once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.made and number in self.at_once:
            raise KeyboardInterrupt
        self.made = True


@contextlib.contextmanager
def between_steps(at_once: Collection[int] = SIGNALS) -> Iterator[Request]:
    """While the block runs, the first signal only sets `made`; outside the main thread signals stay as they are."""
    request = Request(at_once)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
