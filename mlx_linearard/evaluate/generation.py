"""Greedy generation after several prompts at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import is_out_of_memory
from .passes import Passes, Tick, are_finite, size_of
from .together import Merged, Together

SIMILAR = 0.9  # prompts of a batch have at least this share of the length of its first prompt; else much is padding
SHRINK = 0.75  # a batch is made smaller when this part of it or less is unfinished: its caches are copied


@dataclass(frozen=True)
class Prompt:
    """Tokens, how many tokens may follow, and when these are enough."""

    tokens: list[int]
    budget: int
    enough: Callable[[list[int]], bool] | None = None


@dataclass
class _Answer:
    prompt: Prompt
    tokens: list[int]
    finished: bool = False

    @property
    def left(self) -> int:
        """The number of tokens that may follow."""
        return 0 if self.finished else self.prompt.budget - len(self.tokens)

    def add(self, token: int, ends: set[int]) -> None:
        self.finished = token in ends
        if not self.finished:
            self.tokens.append(token)
            enough = self.prompt.enough
            self.finished = len(self.tokens) >= self.prompt.budget or bool(enough and enough(self.tokens))


class _Queue:
    """Prompts in order, of which some may be put back."""

    def __init__(self, prompts: Iterable[Prompt]):
        self._left = iter(prompts)
        self._back: deque[Prompt] = deque()
        self.again = 0  # the prompts at the beginning that were put back

    def first(self) -> Prompt | None:
        if not self._back and (prompt := next(self._left, None)):
            self._back.append(prompt)
        return self._back[0] if self._back else None

    def take(self) -> Prompt:
        self.again = max(0, self.again - 1)
        return self._back.popleft()

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        self._back.extendleft(reversed(prompts))
        self.again += len(prompts)


def generate(
    passes: Passes, prompts: Iterable[Prompt], ends: set[int], tick: Tick | None = None
) -> Iterator[list[int]]:
    """The tokens after each prompt, in order, each the model's first choice.

    An answer stops at one of `ends`, which is not part of it, at its budget, or once it is enough. Consecutive
    prompts of similar lengths are one batch, as many as the passes allow; if the device's memory does not hold it,
    the batches become smaller. `tick` counts the prompts' tokens.

    Raises UserError if the model computes logits that are not finite, and RuntimeError if no batch fits the memory.
    """
    rows = passes.rows if passes.batches else 1
    queue = _Queue(prompts)
    while queue.first():
        batch: list[Prompt] = []
        try:
            found = _answers(passes, batch, _read(passes, queue, batch, rows, tick), ends)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch) < 2:
                raise
        else:
            yield from found
            continue
        mx.clear_cache()  # the error and what it held are gone by now
        rows = len(batch) // 2
        queue.put_back(batch)


def _read(passes: Passes, queue: _Queue, batch: list[Prompt], rows: int, tick: Tick | None) -> Together | Merged:
    """Read the prompts of the next batch, at most `rows`, and add them to `batch`."""
    caches: list[list[Any]] = []
    while (prompt := queue.first()) and len(batch) < rows and _fits(passes, prompt, batch, caches):
        first_time = not queue.again
        batch.append(queue.take())
        caches.append(passes.new_cache())
        passes.prefill(caches[-1], prompt.tokens[:-1], tick if first_time else None)
    return passes.join(caches, passes.width(max(prompt.budget for prompt in batch)))


def _fits(passes: Passes, prompt: Prompt, batch: list[Prompt], caches: list[list[Any]]) -> bool:
    if not batch:
        return True
    similar = SIMILAR * len(batch[0].tokens) <= len(prompt.tokens) <= len(batch[0].tokens) / SIMILAR
    tokens = sum(len(one.tokens) for one in batch) + len(prompt.tokens)
    held = (len(caches) + 1) * max(map(size_of, caches))
    return similar and tokens <= passes.batch and held <= passes.cache_bytes


@dataclass(frozen=True)
class _Step:
    """The first choices (B,) after the tokens so far, and whether their logits are finite; being computed."""

    chosen: mx.array
    finite: mx.array

    @classmethod
    def after(cls, passes: Passes, cache: Together | Merged, last: mx.array) -> _Step:
        logits = passes.model(last[:, None], cache=cache.layers)[:, -1]
        cache.advance()
        step = cls(mx.argmax(logits, axis=-1).astype(mx.int32), are_finite(logits))
        mx.async_eval(step.chosen, step.finite)
        return step


def _answers(passes: Passes, batch: list[Prompt], cache: Together | Merged, ends: set[int]) -> list[list[int]]:
    """The answers to the prompts of a batch. The step after each token is begun before the token is looked at."""
    answers = [_Answer(prompt, [], prompt.budget < 1) for prompt in batch]
    rows = list(range(len(batch)))  # the answers whose sequences are in the cache
    step = _Step.after(passes, cache, mx.array([prompt.tokens[-1] for prompt in batch], dtype=mx.int32))
    while not all(answer.finished for answer in answers):
        more = any(answer.left > 1 for answer in answers)
        following = _Step.after(passes, cache, step.chosen) if more else step
        passes.check_finite(step.finite.item())
        for row, token in zip(rows, np.array(step.chosen).tolist(), strict=True):
            if not answers[row].finished:
                answers[row].add(token, ends)
        kept = [i for i, row in enumerate(rows) if not answers[row].finished]
        if 0 < len(kept) <= SHRINK * len(rows):  # finished answers stay in the batch until they are a good part of it
            cache.filter(kept)
            following = _Step(mx.array(np.array(following.chosen)[kept]), following.finite)
            rows = [rows[i] for i in kept]
        step = following
    return [answer.tokens for answer in answers]
