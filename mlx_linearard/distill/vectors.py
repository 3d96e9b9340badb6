"""The trainable arrays of all layers as one vector, so that a GPU updates them with a few operations.

Adapters are hundreds of small arrays. Their norm, their update and its check take several operations each, and on a
GPU launching thousands of operations takes longer than the update itself. Joined, they are one array. Split again,
they are views of it: no copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.adapters import Leaves

ALL = "all"  # the name of the vector, in the place of the names of arrays
MOMENTS = ("m", "v")  # what AdamW keeps for each array

# (parameters, optimizer state, gradients, scale) -> (parameters, optimizer state, whether all of them are finite)
Update = Callable[[list[Leaves], dict[str, Any], list[Leaves], mx.array], tuple[list[Leaves], dict[str, Any], mx.array]]


@dataclass(frozen=True)
class Layout:
    """The places of arrays in a vector: for each layer the (name, shape) of its arrays, in order."""

    layers: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]

    @classmethod
    def of(cls, leaves: list[Leaves]) -> Layout:
        """The layout of these arrays."""
        return cls(tuple(tuple((name, tuple(a.shape)) for name, a in layer.items()) for layer in leaves))

    def join(self, leaves: list[Leaves]) -> list[Leaves]:
        """All arrays as one vector, in the form of a single layer with a single array."""
        parts = [own[name].reshape(-1) for own, layer in zip(leaves, self.layers, strict=True) for name, _ in layer]
        return [{ALL: mx.concatenate(parts)}]

    def split(self, joined: list[Leaves]) -> list[Leaves]:
        """The inverse of `join`."""
        sizes = [math.prod(shape) for layer in self.layers for _, shape in layer]
        parts = iter(mx.split(joined[0][ALL], list(itertools.accumulate(sizes[:-1]))))
        return [{name: next(parts).reshape(shape) for name, shape in layer} for layer in self.layers]


def is_joined(leaves: list[Leaves]) -> bool:
    """Whether these are arrays that `Layout.join` has joined."""
    return len(leaves) == 1 and list(leaves[0]) == [ALL]


def can_join(leaves: list[Leaves]) -> bool:
    """Whether all arrays are of one dtype, and there is one."""
    return len({a.dtype for layer in leaves for a in layer.values()}) == 1


class VectorUpdate:
    """An update of arrays that runs on their vectors. It keeps the vectors of its last result for the next call.

    The vectors are evaluated. The arrays of the result are views of them that are made when something reads them.
    """

    def __init__(self, update: Update) -> None:
        self._update = update
        self._last: tuple[list[Leaves], list[Leaves], dict[str, Any]] | None = None  # the result, split and joined

    def __call__(
        self, parameters: list[Leaves], state: dict[str, Any], gradients: list[Leaves], scale: mx.array
    ) -> tuple[list[Leaves], dict[str, Any], mx.array]:
        """As the update itself; gradients may be joined already."""
        if not can_join(parameters):
            return self._update(parameters, state, gradients, scale)
        layout = Layout.of(parameters)
        vector, moments = self._joined(layout, parameters, state)
        joined = gradients if is_joined(gradients) else layout.join(gradients)
        new, new_state, finite = self._update(vector, {**state, "layers": moments}, joined, scale)
        mx.eval(new, new_state, finite)
        updated = layout.split(new)
        self._last = updated, new, new_state
        return updated, {**new_state, "layers": _split_moments(layout, new_state["layers"])}, finite

    def _joined(self, layout: Layout, parameters: list[Leaves], state: dict[str, Any]) -> tuple[list[Leaves], Any]:
        """The vectors of the parameters and of the optimizer's moments."""
        if self._last is not None and self._last[0] is parameters:
            return self._last[1], self._last[2]["layers"]
        of = {m: [{n: a[m] for n, a in layer.items()} for layer in state["layers"]] for m in MOMENTS}
        return layout.join(parameters), [{ALL: {m: layout.join(leaves)[0][ALL] for m, leaves in of.items()}}]


def _split_moments(layout: Layout, joined: Any) -> list[dict[str, dict[str, mx.array]]]:
    split = {m: layout.split([{ALL: joined[0][ALL][m]}]) for m in MOMENTS}
    return [{n: {m: split[m][i][n] for m in MOMENTS} for n, _ in layer} for i, layer in enumerate(layout.layers)]
