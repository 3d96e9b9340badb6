"""Greedy generation after several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .passes import Passes, Tick, are_finite, merge, size_of

SIMILAR = 0.9  # prompts of a batch have at least this share of the length of its first prompt; else much is padding


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

    def add(self, token: int, ends: set[int]) -> None:
        self.finished = token in ends
        if not self.finished:
            self.tokens.append(token)
            enough = self.prompt.enough
            self.finished = len(self.tokens) >= self.prompt.budget or bool(enough and enough(self.tokens))


def generate(
    passes: Passes, prompts: Iterable[Prompt], ends: set[int], tick: Tick | None = None
) -> Iterator[list[int]]:
    """The tokens after each prompt, in order, each the model's first choice.

    An answer stops at one of `ends`, which is not part of it, at its budget, or once it is enough. Consecutive
    prompts of similar lengths are one batch, as many as the passes allow. `tick` counts the prompts' tokens.

    Raises UserError if the model computes logits that are not finite.
    """
    rows = passes.rows if passes.batches else 1
    left = iter(prompts)
    prompt = next(left, None)
    while prompt is not None:
        batch: list[Prompt] = []
        caches: list[list[Any]] = []
        while prompt is not None and len(batch) < rows and _fits(passes, prompt, batch, caches):
            cache = passes.new_cache()
            passes.prefill(cache, prompt.tokens[:-1], tick)
            caches.append(cache)
            batch.append(prompt)
            prompt = next(left, None)
        yield from _answers(passes, batch, merge(caches) if len(caches) > 1 else caches[0], ends)


def _fits(passes: Passes, prompt: Prompt, batch: list[Prompt], caches: list[list[Any]]) -> bool:
    if not batch:
        return True
    similar = SIMILAR * len(batch[0].tokens) <= len(prompt.tokens) <= len(batch[0].tokens) / SIMILAR
    tokens = sum(len(one.tokens) for one in batch) + len(prompt.tokens)
    held = (len(caches) + 1) * max(map(size_of, caches))
    return similar and tokens <= passes.batch and held <= passes.cache_bytes


def _answers(passes: Passes, batch: list[Prompt], cache: list[Any], ends: set[int]) -> Iterator[list[int]]:
    answers = [_Answer(prompt, [], prompt.budget < 1) for prompt in batch]
    rows = list(range(len(batch)))  # the answers whose sequences are in the cache
    last = [prompt.tokens[-1] for prompt in batch]
    while not all(answer.finished for answer in answers):
        logits = passes.model(mx.array(last)[:, None], cache=cache)[:, -1]
        passes.check_finite(are_finite(logits).item())
        chosen: Any = mx.argmax(logits, axis=-1).tolist()
        last = [int(token) for token in chosen]
        for row, token in zip(rows, last, strict=True):
            if not answers[row].finished:
                answers[row].add(token, ends)
        open_rows = [i for i, row in enumerate(rows) if not answers[row].finished]
        if 0 < len(open_rows) <= len(rows) // 2:  # finished answers stay in the batch until they are half of it
            for layer in cache:
                layer.filter(open_rows)
            rows, last = [rows[i] for i in open_rows], [last[i] for i in open_rows]
    return iter([answer.tokens for answer in answers])
