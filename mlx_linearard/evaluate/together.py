"""KV caches of several prompts that are continued together, one token each at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from .branches import mask_of


class Together:
    """The caches of several prompts, of which each gets one more token at a time.

    The keys of a layer have the same shape at every token: there is room for all of them, and prompts are padded on
    the right. `layers` are what a model takes as its cache.
    """

    @staticmethod
    def fits(layers: Sequence[Any]) -> bool:
        """Whether caches of a prompt have this form."""
        return all(type(layer) is KVCache for layer in layers)

    def __init__(self, caches: Sequence[list[Any]], room: int):
        """Room for at most `room` tokens after the prompts; the lists in `caches` are emptied."""
        self.lengths = np.array([cache[0].offset for cache in caches], np.int32)
        self.width = max(cache[0].keys.shape[2] for cache in caches)
        self.room, self.done = room, 0
        self.layers: list[_Following] = []
        while caches[0]:
            layer = [cache.pop(0) for cache in caches]
            keys, values = self._joined([one.keys for one in layer]), self._joined([one.values for one in layer])
            mx.eval(keys, values)
            self.layers.append(_Following(self, keys, values))
        self._place()

    def _joined(self, parts: Sequence[mx.array]) -> mx.array:
        """Keys or values of each prompt, (1, H, S, D) each, as one array (B, H, width + room, D)."""
        joined = mx.zeros((len(parts), parts[0].shape[1], self.width + self.room, parts[0].shape[3]), parts[0].dtype)
        for i, part in enumerate(parts):
            joined[i : i + 1, :, : part.shape[2]] = part
        return joined

    def advance(self) -> None:
        """To be called after each pass."""
        self.done += 1
        self._place()

    def filter(self, rows: Sequence[int]) -> None:
        """Keep only some of the prompts."""
        self.lengths = self.lengths[list(rows)]
        at = mx.array(list(rows), dtype=mx.int32)
        for layer in self.layers:  # one at a time, so that only one is in memory twice
            layer.keys, layer.values = layer.keys[at], layer.values[at]
            mx.eval(layer.keys, layer.values)
        self._place()

    def _place(self) -> None:
        self.before = mx.array(self.lengths)
        self.offset = mx.array(self.lengths + self.done)


class _Following:
    """One layer's cache of `Together`."""

    def __init__(self, together: Together, keys: mx.array, values: mx.array):
        self.together, self.keys, self.values = together, keys, values

    @property
    def offset(self) -> mx.array:
        return self.together.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        at = self.together.width + self.together.done
        self.keys[..., at : at + 1, :], self.values[..., at : at + 1, :] = keys, values
        return self.keys, self.values

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        own = self.together
        return mask_of(own.before, own.width, own.done, tokens, own.room, window_size)


class Merged:
    """The same for caches of other kinds, such as those with a window, as mlx-lm merges them; or for one prompt."""

    @staticmethod
    def fits(layers: Sequence[Any]) -> bool:
        """Whether caches of a prompt can be merged."""
        return all(hasattr(layer, "merge") and Merged.fits(getattr(layer, "caches", ())) for layer in layers)

    def __init__(self, caches: Sequence[list[Any]], room: int):
        self.layers = caches[0] if len(caches) == 1 else []
        while len(caches) > 1 and caches[0]:
            layer = [cache.pop(0) for cache in caches]
            self.layers.append(layer[0].merge(layer))
            mx.eval(self.layers[-1].state)

    def advance(self) -> None:
        """These caches count their tokens themselves."""

    def filter(self, rows: Sequence[int]) -> None:
        """Keep only some of the prompts."""
        for layer in self.layers:
            layer.filter(list(rows))


Way = type[Together] | type[Merged]
WAYS: tuple[Way, ...] = (Together, Merged)  # the first is faster
