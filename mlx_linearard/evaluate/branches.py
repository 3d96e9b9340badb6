"""Contexts that are read once, and the sequences that continue them: several of each in one forward pass.

The classes of layers have the attributes that mlx-lm's models read of a cache. Contexts are padded on the right, which
their masks hide. So nothing is moved when a context has been read, and shapes do not depend on lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache


def mask_of(lengths: mx.array, width: int, first: int, tokens: int, room: int, window: int | None) -> mx.array:
    """(B, 1, T, width + room) bool: what each of `tokens` (T) of B sequences attends to.

    The keys are those of contexts, of which `lengths` (B,) count, padded to `width`, and then `room` keys of tokens
    that follow. The tokens are number `first` and on of these. window: how far attention reaches, if not everywhere.
    """
    keys, lengths = mx.arange(width + room)[None, None], lengths[:, None, None]
    number = mx.arange(first, first + tokens)[None, :, None]
    mask = (keys < lengths) | ((keys >= width) & (keys - width <= number))
    if window:
        place = mx.where(keys < width, keys, keys - width + lengths)
        mask = mask & (number + lengths < place + window)
    return mask[:, None]


class _Context(KVCache):
    """One layer's keys and values of contexts. `window`: how far its attention reaches, if not everywhere."""

    step = 8  # positions that are allocated together: contexts may be short and many

    def __init__(self, window: int | None):
        super().__init__()
        self.window = window

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return super().make_mask(tokens, return_array=return_array, window_size=window_size or self.window)


class _Branch:
    """One layer's cache for one pass over sequences (B), each of which continues one of the contexts.

    keys, values: of the contexts, (C, H, S, D), padded on the right. rows: (B,), the context of each sequence.
    offset: (B,), the length of that context.
    """

    def __init__(self, keys: mx.array, values: mx.array, rows: mx.array, offset: mx.array, window: int | None):
        self.keys, self.values, self.rows, self.offset, self.window = keys, values, rows, offset, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return (
            mx.concatenate([self.keys[self.rows], keys], axis=2),
            mx.concatenate([self.values[self.rows], values], axis=2),
        )

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return mask_of(self.offset, self.keys.shape[2], 0, tokens, tokens, window_size or self.window)


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
