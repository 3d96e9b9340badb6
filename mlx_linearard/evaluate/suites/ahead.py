"""Prompts made while the model reads others: most of the work is the tokenizer's, which runs beside Python."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 8  # at most
AHEAD = 2  # results per thread that are made before they are asked for

In = TypeVar("In")
Out = TypeVar("Out")


def made_ahead(make: Callable[[In], Out], things: Iterable[In]) -> Iterator[tuple[In, Out]]:
    """Each thing and what is made of it, in order; some are made in other threads before they are asked for.

    What `make` raises is raised when its result is asked for.
    """
    threads = max(1, min(THREADS, (os.cpu_count() or 1) - 1))
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[In, Future[Out]]] = deque()
    try:
        for thing in things:
            waiting.append((thing, pool.submit(make, thing)))
            if len(waiting) > AHEAD * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
