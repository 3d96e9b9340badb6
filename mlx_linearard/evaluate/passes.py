"""Forward passes of a model with KV caches: prompts in chunks, and several sequences in one pass.

Sequences of different lengths are padded on the right in a pass; attention is causal, so padding changes nothing
before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..errors import UserError
from ..ops.tiling import FLOAT32
from .branches import Contexts, context_caches, contexts_of
from .together import WAYS, Merged, Together, Way

SCORES_BYTES = 2 << 30  # most bytes of attention scores per pass, if a device holds them: long prompts, short chunks
LOGITS_BYTES = 128 << 20  # most bytes of a chunk's float32 logits: a large vocabulary makes chunks shorter
# Tokens of two sequences, which are read together and alone, and the largest difference of their logits, as a share
# of the logits' own spread: half precision is far below it, a wrong mask or position far above.
TRIED = ([19, 23, 11, 29, 7, 26, 13, 21, 9, 17, 28, 12, 25, 8, 22, 15, 30, 10, 18, 27], [14, 24, 16, 20, 31])
SAME = 0.2
ENOUGH, FEW_ENOUGH = 0.25, 0.5  # parts of a pass: batches of this size are large enough; with few shapes
PADDED = 1.2  # a sequence longer than this many times the mean of the batch begins another batch
LEAST = 8  # the smallest size that sizes are rounded up to

Tick = Callable[[int], None]  # called with the number of tokens done since the last call
Tokens = Sequence[int] | np.ndarray
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Passes:
    """A model and the sizes of its forward passes.

    path: the directory that errors name. chunk: tokens per pass. rows: sequences per batch at most. batch: tokens of
    the prompts of a batch at most. cache_bytes: of their KV caches at most. group: tokens of items that are sorted by
    length and scored together. heads: query heads of a layer, 1 if unknown. scores_bytes: of attention scores at
    most, if the device holds them. few_shapes: whether sizes are rounded up, because the device prepares itself for
    each new shape, which takes longer than the padding.
    """

    model: Any
    path: Path
    chunk: int
    rows: int
    batch: int
    cache_bytes: int
    group: int
    heads: int = 1
    scores_bytes: int = SCORES_BYTES
    few_shapes: bool = False

    def new_cache(self) -> list[Any]:
        return list(make_prompt_cache(self.model))

    def rounded(self, size: int, least: int = 1) -> int:
        """`size`; with few shapes at least `least`, and the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
        if not self.few_shapes:
            return size
        power = 1 << (max(size, least) - 1).bit_length()
        return power * 3 // 4 if max(size, least) <= power * 3 // 4 else power

    def width(self, tokens: int) -> int:
        """The width of a pass over sequences of at most `tokens`."""
        return self.rounded(tokens, LEAST)

    def packed(self, things: Iterable[Thing], length: Callable[[Thing], int]) -> Iterator[list[Thing]]:
        """Batches of things that are each read in one pass; see `packed`."""
        enough = FEW_ENOUGH if self.few_shapes else ENOUGH
        return packed(things, lambda thing: self.width(length(thing)), self.chunk, self.rows, enough)

    @functools.cached_property
    def batches(self) -> bool:
        """Whether the model continues two short prompts together as it continues each alone; measured once.

        Some caches have no form for several sequences, and some of mlx-lm's families fail on it or ignore it.
        """
        return self.way is not None

    @functools.cached_property
    def way(self) -> Way | None:
        """How caches of several prompts are joined: the first way whose results are those of each prompt alone."""
        for way in WAYS:

            def together(way: Way = way) -> mx.array:
                caches = [self.new_cache() for _ in TRIED]
                for cache, row in zip(caches, TRIED, strict=True):
                    self.prefill(cache, row[:-1])
                return self.model(mx.array([row[-1:] for row in TRIED]), cache=way(caches, 1).layers)[:, -1]

            if way.fits(self.new_cache()) and self.agrees(together):
                return way
        return None

    def join(self, caches: list[list[Any]], room: int) -> Together | Merged:
        """The caches of prompts as one, for at most `room` more tokens; the lists in `caches` are emptied."""
        return (self.way or Merged)(caches, room) if len(caches) > 1 else Merged(caches, room)

    @functools.cached_property
    def shares(self) -> bool:
        """Whether sequences can continue a context that was read once; measured once.

        Families read masks and positions in their own ways.
        """
        if context_caches(self.new_cache()) is None:
            return False

        def together() -> mx.array:
            contexts = self.read([row[:-1] for row in TRIED])
            endings = padded([row[-1:] for row in TRIED], 0, 2)
            return self.model(endings, cache=contexts.branches([0, 1]))[:, 0]

        return self.agrees(together)

    def agrees(self, together: Callable[[], mx.array]) -> bool:
        """Whether `together` returns the last logits (2, V) of the sequences of `TRIED` as each read alone has them."""
        alone = mx.concatenate([self._alone(row) for row in TRIED]).astype(mx.float32)
        try:
            error = mx.square(together().astype(mx.float32) - alone).mean(axis=-1)
            return bool(mx.all(error < SAME**2 * mx.var(alone, axis=-1)).item())
        except Exception:  # a family may raise any error; its sequences are then read one at a time
            return False

    def _alone(self, tokens: Sequence[int]) -> mx.array:
        """The logits (1, V) after all of `tokens`."""
        cache = self.new_cache()
        self.prefill(cache, tokens[:-1])
        return self.model(mx.array([tokens[-1:]]), cache=cache)[:, -1]

    def read(self, rows: Sequence[Sequence[int]]) -> Contexts:
        """Contexts of the tokens `rows`: all in one pass, or one in chunks. The model `shares`."""
        caches = context_caches(self.new_cache())
        assert caches is not None
        width = self.width(max(map(len, rows)))
        if len(rows) == 1 and len(rows[0]) > self.chunk:
            self.prefill(caches, rows[0])
        else:
            self.model(padded(rows, self.rounded(len(rows)), width), cache=caches)
        return contexts_of(caches, [len(row) for row in rows], width)

    def prefill(self, cache: list[Any], tokens: Tokens, tick: Tick | None = None) -> None:
        """Put `tokens` (T,) into the cache. Their logits are not computed."""
        ids = np.asarray(tokens, np.int32)[None]
        size = self._chunk_of(len(tokens))
        pads = self.few_shapes and all(isinstance(layer, KVCache) for layer in cache)  # only these forget the padding
        states: list[Any] = []
        for start in range(0, len(tokens), size):
            part = ids[:, start : start + size]
            spare = min(size, self.width(part.shape[1])) - part.shape[1] if pads else 0
            self.model(mx.array(np.pad(part, ((0, 0), (0, spare)))), cache=cache)
            mx.eval(states)  # so one chunk is prepared while the one before it is computed
            states = [layer.state for layer in cache]
            mx.async_eval(states)
            for layer in cache if spare else ():
                layer.trim(spare)
            if tick:
                tick(part.shape[1])
        mx.eval(states)

    def _chunk_of(self, tokens: int) -> int:
        """The tokens per pass of a prompt of some tokens."""
        size = min(self.chunk, self.scores_bytes // (FLOAT32 * self.heads * max(tokens, 1)))
        if self.few_shapes and size < self.chunk:
            size = 1 << max(size, 1).bit_length() - 1
        return max(1, size)

    def check_finite(self, finite: Any) -> None:
        """UserError unless `finite`, of logits or of a question about them: a score would not show it."""
        if not finite:
            raise UserError(
                f"{self.path} computes logits that are not finite: its weights are damaged, or need a "
                "wider type, such as --dtype float32"
            )


def are_finite(logits: mx.array) -> mx.array:
    """Whether all rows of logits (..., V) are finite, a bool scalar."""
    return mx.isfinite(logits.max(axis=-1)).all()


def itself(logits: mx.array) -> mx.array:
    """The head of a model whose hidden states are logits already."""
    return logits


def padded(rows: Sequence[Sequence[int]], height: int = 0, width: int = 0) -> mx.array:
    """Sequences as one array (B, longest), padded with zeros on the right, and with rows of zeros.

    It has at least `height` rows and `width` columns.
    """
    ids = np.zeros((max(len(rows), height), max([width, *map(len, rows)])), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return mx.array(ids)


def size_of(caches: list[Any]) -> int:
    """The bytes that caches hold."""
    states: Any = tree_flatten([cache.state for cache in caches])
    return sum(value.nbytes for _, value in states if isinstance(value, mx.array))


def packed(
    things: Iterable[Thing], length: Callable[[Thing], int], tokens: int, rows: int, enough: float = ENOUGH
) -> Iterator[list[Thing]]:
    """Batches of at most `rows` things of similar length, each padded to at most `tokens`; at least one thing each.

    A batch that has `enough` of its tokens takes no thing that would be much longer than those in it.
    """
    batch: list[Thing] = []
    have = 0
    for thing in sorted(things, key=length):  # so the last of a batch is the longest
        full = len(batch) == rows or (len(batch) + 1) * length(thing) > tokens
        longer = have >= enough * tokens and length(thing) * len(batch) > PADDED * have
        if batch and (full or longer):
            yield batch
            batch, have = [], 0
        batch.append(thing)
        have += length(thing)
    if batch:
        yield batch
