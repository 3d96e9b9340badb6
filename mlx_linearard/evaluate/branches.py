"""Contexts that are read once, and the sequences that continue them: several of each in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache


class _Context(KVCache):
    """One layer's keys and values of contexts. `window`: how far its attention reaches, if not everywhere."""

    def __init__(self, window: int | None):
        super().__init__()
        self.window = window

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return super().make_mask(tokens, return_array=return_array, window_size=window_size or self.window)


class _Branch:
    """One layer's cache for one pass over sequences (B), each of which continues one of the contexts.

    keys, values: of the contexts, (C, H, S, D), padded on the right. rows: (B,), the context of each sequence.
    offset: (B,), the length of that context. The attributes are those that mlx-lm's models read.
    """

    def __init__(self, keys: mx.array, values: mx.array, rows: mx.array, offset: mx.array, window: int | None):
        self.keys, self.values, self.rows, self.offset, self.window = keys, values, rows, offset, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return (
            mx.concatenate([self.keys[self.rows], keys], axis=2),
            mx.concatenate([self.values[self.rows], values], axis=2),
        )

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """(B, 1, T, S + T) bool: the context without its padding, and the sequence's own tokens up to each."""
        before, own = mx.arange(self.keys.shape[2]), mx.arange(tokens)
        offset = self.offset[:, None]
        shape = (offset.shape[0], own.size)
        held = mx.broadcast_to(before < offset, (shape[0], before.size))
        place = mx.concatenate([mx.broadcast_to(before, held.shape), offset + own], axis=1)[:, None]  # (B, 1, S + T)
        query = (offset + own)[..., None]  # (B, T, 1)
        held = mx.concatenate([held, mx.ones(shape, dtype=mx.bool_)], axis=1)[:, None]
        mask = held & (place <= query)
        if window := window_size or self.window:
            mask = mask & (query < place + window)
        return mask[:, None]


@dataclass(frozen=True)
class Contexts:
    """Contexts that were read: keys and values of each layer, (C, H, S, D) each, and their lengths (C,)."""

    layers: list[tuple[mx.array, mx.array, int | None]]
    lengths: list[int]

    def branches(self, rows: Sequence[int], height: int = 0) -> list[Any]:
        """The cache of one pass over sequences that continue the contexts `rows`, and at least `height` in all."""
        rows = [*rows, *[0] * (height - len(rows))]
        offset = mx.array([self.lengths[row] for row in rows], dtype=mx.int32)
        at = mx.array(rows, dtype=mx.int32)
        return [_Branch(keys, values, at, offset, window) for keys, values, window in self.layers]


def context_caches(layers: Sequence[Any]) -> list[Any] | None:
    """Empty caches for contexts, in place of a model's own of one sequence; None if these hold something else."""
    kept = (type(layer) in (KVCache, RotatingKVCache) and not getattr(layer, "keep", 0) for layer in layers)
    if not all(kept):  # such as the state of a state-space layer, or first tokens that stay in a window
        return None
    return [_Context(layer.max_size if isinstance(layer, RotatingKVCache) else None) for layer in layers]


def contexts_of(caches: Sequence[Any], lengths: Sequence[int], width: int) -> Contexts:
    """What caches of `context_caches` hold after a pass over contexts of these lengths, padded to `width`."""
    layers = [(cache.keys[..., :width, :], cache.values[..., :width, :], cache.window) for cache in caches]
    return Contexts(layers, list(lengths))
