"""Forward passes of a model with KV caches: prompts in chunks, and several sequences in one pass.

Caches of several sequences are mlx-lm's own. Sequences of different lengths are padded on the right in a pass;
attention is causal, so padding changes nothing before it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..errors import UserError
from ..ops.tiling import FLOAT32

SCORES_BYTES = 2 << 30  # most bytes of attention scores per pass, if a device holds them: long prompts, short chunks
LOGITS_BYTES = 128 << 20  # most bytes of a chunk's float32 logits: a large vocabulary makes chunks shorter
TRIED = ([3, 5, 7, 2, 9, 4, 6], [8, 1, 5])  # tokens of two sequences, read together and alone
SAME = 0.1  # the largest difference, as a share of the largest logit: half precision is far below it
ENOUGH = 0.25  # part of a pass: a batch of this size uses the device nearly as well as a full pass
PADDED = 1.2  # a sequence longer than this many times the mean of the batch begins another batch

Tick = Callable[[int], None]  # called with the number of tokens done since the last call
Tokens = Sequence[int] | np.ndarray
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Passes:
    """A model and the sizes of its forward passes.

    path: the directory that errors name. chunk: tokens per pass. rows: sequences per batch at most. batch: tokens of
    the prompts of a batch at most. cache_bytes: of their KV caches at most. heads: query heads of a layer, 1 if
    unknown.
    """

    model: Any
    path: Path
    chunk: int
    rows: int
    batch: int
    cache_bytes: int
    heads: int = 1

    def new_cache(self) -> list[Any]:
        return list(make_prompt_cache(self.model))

    @functools.cached_property
    def batches(self) -> bool:
        """Whether the model reads two short sequences together as it reads each alone; measured once.

        Some caches have no form for several sequences, and some of mlx-lm's families fail on it or ignore it.
        """
        if not all(map(_mergeable, self.new_cache())):
            return False
        alone = []
        for row in TRIED:
            cache = self.new_cache()
            self.prefill(cache, row[:-1])
            alone.append(self.model(mx.array([row[-1:]]), cache=cache)[:, -1])
        try:
            cache = self.prefill_rows([row[:-1] for row in TRIED])
            together = self.model(mx.array([row[-1:] for row in TRIED]), cache=cache)[:, -1]
            error = mx.abs(together - mx.concatenate(alone)).max() / mx.abs(together).max()
            return bool((error < SAME).item())
        except Exception:  # a family may raise any error; its sequences are then read one at a time
            return False

    def prefill(self, cache: list[Any], tokens: Tokens, tick: Tick | None = None) -> None:
        """Put `tokens` (T,) into the cache. Their logits are not computed."""
        ids = mx.array(np.asarray(tokens, np.int32))[None]
        size = max(1, min(self.chunk, SCORES_BYTES // (FLOAT32 * self.heads * max(len(tokens), 1))))
        for start in range(0, len(tokens), size):
            part = ids[:, start : start + size]
            self.model(part, cache=cache)
            mx.eval([c.state for c in cache])
            mx.clear_cache()
            if tick:
                tick(part.shape[1])

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """One cache of several sequences, in one pass, or one after another if they exceed a pass."""
        lengths = [len(row) for row in rows]
        if len(rows) * max(lengths) > self.chunk:
            caches = [self.new_cache() for _ in rows]
            for cache, row in zip(caches, rows, strict=True):
                self.prefill(cache, row)
            return merge(caches)
        merged = merge([self.new_cache() for _ in rows])
        padding = [max(lengths) - length for length in lengths]
        if any(padding):
            for cache in merged:
                cache.prepare(lengths=lengths, right_padding=padding)
        self.model(padded(rows), cache=merged)
        if any(padding):
            for cache in merged:
                cache.finalize()
        mx.eval([c.state for c in merged])
        return merged

    def check_finite(self, logits: mx.array) -> None:
        """UserError if logits are not finite: a score would not show it."""
        if not mx.isfinite(logits.max(axis=-1).sum()).item():
            raise UserError(
                f"{self.path} computes logits that are not finite: its weights are damaged, or need a "
                "wider type, such as --dtype float32"
            )


def itself(logits: mx.array) -> mx.array:
    """The head of a model whose hidden states are logits already."""
    return logits


def padded(rows: Sequence[Sequence[int]]) -> mx.array:
    """Sequences as one array (B, longest), padded with zeros on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return mx.array(ids)


def merge(caches: Sequence[list[Any]]) -> list[Any]:
    """The caches of several sequences as one, a layer at a time; the lists in `caches` are emptied."""
    merged = []
    while caches[0]:
        layer = [cache.pop(0) for cache in caches]
        merged.append(layer[0].merge(layer))
        mx.eval(merged[-1].state)
    return merged


def take(caches: list[Any], rows: list[int]) -> list[Any]:
    """New caches with some rows of others; a row may be taken several times."""
    taken = copy.deepcopy(caches)
    for cache in taken:
        cache.filter(rows)
    return taken


def size_of(caches: list[Any]) -> int:
    """The bytes that caches hold."""
    states: Any = tree_flatten([cache.state for cache in caches])
    return sum(value.nbytes for _, value in states if isinstance(value, mx.array))


def packed(things: Iterable[Thing], length: Callable[[Thing], int], tokens: int, rows: int) -> Iterator[list[Thing]]:
    """Batches of at most `rows` things of similar length, each padded to at most `tokens`; at least one thing each.

    A batch that is large enough takes no thing that would be much longer than those in it.
    """
    batch: list[Thing] = []
    have = 0
    for thing in sorted(things, key=length):  # so the last of a batch is the longest
        full = len(batch) == rows or (len(batch) + 1) * length(thing) > tokens
        longer = have >= ENOUGH * tokens and length(thing) * len(batch) > PADDED * have
        if batch and (full or longer):
            yield batch
            batch, have = [], 0
        batch.append(thing)
        have += length(thing)
    if batch:
        yield batch


def _mergeable(cache: Any) -> bool:
    return hasattr(cache, "merge") and all(map(_mergeable, getattr(cache, "caches", ())))
