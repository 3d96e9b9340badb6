"""The loss and the gradients of one batch as a function that a GPU compiles, once for each loss and shape.

A step is thousands of small operations, and on a GPU preparing and launching them takes longer than running them. A
compiled step is built once instead of in each step, and its elementwise operations are fused. A CPU is not compiled
for: mlx would need a C++ compiler on the user's machine, and its own work takes far longer than the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from ..errors import one_line
from ..machine import on_gpu
from ..models.adapters import Leaves
from ..models.pair import Pair
from .objective import Objective, objective_loss
from .vectors import Layout, can_join

Batch = dict[str, mx.array]
Found = tuple[mx.array, dict[str, mx.array], list[Leaves]]  # loss, its parts, gradients (or their vector)
# (pair, parameters, batch, dropout seed) -> (loss, parts); hashable, and everything that changes is in the batch
Loss = Callable[[Pair, list[Leaves], Batch, "int | None"], tuple[mx.array, dict[str, mx.array]]]


@dataclass(frozen=True)
class BlockLoss:
    """`objective_loss` of a batch with the keys tokens and, if targets have weights, weights."""

    objective: Objective

    def __call__(
        self, pair: Pair, parameters: list[Leaves], batch: Batch, dropout_seed: int | None = None
    ) -> tuple[mx.array, dict[str, mx.array]]:
        return objective_loss(pair, self.objective, parameters, batch["tokens"], dropout_seed, batch.get("weights"))


class Gradients:
    """Loss, parts and gradients of batches of one pair, evaluated.

    It holds the arrays of both models while it exists, because compiled functions do.
    """

    def __init__(self, pair: Pair, *, compiles: bool | None = None) -> None:
        """`compiles`: whether functions are compiled; None: on a GPU. Without dropout only: a compiled function
        would draw the same random numbers in every step."""
        self.pair = pair
        self.joins = on_gpu() if compiles is None else compiles  # gradients become a vector (`vectors.Layout`)
        self.compiles = self.joins and not pair.adapter.dropout
        self.failure: str | None = None  # why compiling was given up
        self._functions: dict[Loss, Callable[[list[Leaves], Batch], Found]] = {}
        self._built: set[tuple[Any, ...]] = set()

    @property
    def compiled(self) -> int:
        """How many functions have been compiled: one for each loss and shape."""
        return len(self._built)

    def __call__(self, loss: Loss, parameters: list[Leaves], batch: Batch, dropout_seed: int | None = None) -> Found:
        """(loss, parts, gradients) of a batch. On a GPU the gradients are joined to one vector."""
        if self.compiles and (found := self._compiled(loss, parameters, batch)) is not None:
            return found
        found = self._plain(loss, parameters, batch, dropout_seed)
        mx.eval(found)
        return found

    def _plain(self, loss: Loss, parameters: list[Leaves], batch: Batch, seed: int | None = None) -> Found:
        def loss_of(parameters: list[Leaves]) -> Any:
            return loss(self.pair, parameters, batch, seed)

        (value, parts), gradients = mx.value_and_grad(loss_of)(parameters)
        joins = self.joins and can_join(parameters)
        return value, parts, Layout.of(parameters).join(gradients) if joins else gradients

    def _compiled(self, loss: Loss, parameters: list[Leaves], batch: Batch) -> Found | None:
        """The same by a compiled function; None if it does not compile here. It is not tried again then."""
        if loss not in self._functions:
            self._functions[loss] = mx.compile(partial(self._plain, loss))
        function = self._functions[loss]
        key = (loss, *((name, array.dtype, *array.shape) for name, array in batch.items()))
        try:
            found = function(parameters, batch)
            mx.eval(found)
        except (RuntimeError, ValueError) as error:
            if key in self._built:  # it has run before, so compiling is not the cause
                raise
            self.failure, self.compiles = one_line(error), False  # no kernel for this machine, or no compiler
            self._functions.clear()
            return None
        self._built.add(key)
        return found
