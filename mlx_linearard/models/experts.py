"""The experts of a mixture on a device that multiplies them in float32 only, such as mlx's CPU (mlx 0.32.4).

Their weights keep the dtype of the files, in memory and in every export; only their products are computed in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear

from ..ops.tiling import FLOAT32
from .trees import named_modules


class Float32Experts(SwitchLinear):
    """mlx-lm's unquantized experts over the same arrays; their product is computed in float32 and rounded once."""

    def __init__(self, source: SwitchLinear):
        nn.Module.__init__(self)
        dict.update(self, source.parameters())

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        wide = self.weight.astype(mx.float32).swapaxes(-1, -2)
        product = mx.gather_mm(x.astype(mx.float32), wide, rhs_indices=indices, sorted_indices=sorted_indices)
        product = product.astype(mx.result_type(x, self.weight))
        return product + mx.expand_dims(self.bias[indices], -2) if "bias" in self else product


def multiplies_halves() -> bool:
    """Whether the default device multiplies experts in bfloat16 and float16; tried once."""
    return _multiplies_halves(str(mx.default_device()))


@cache
def _multiplies_halves(device: str) -> bool:
    try:
        for dtype in (mx.bfloat16, mx.float16):
            x, experts = mx.ones((1, 1, 2), dtype=dtype), mx.ones((1, 2, 2), dtype=dtype)
            mx.eval(mx.gather_mm(x, experts, rhs_indices=mx.array([0])))
    except RuntimeError:
        return False
    return True


def compute_in_float32(model: nn.Module) -> None:
    """Replace the experts of `model` by `Float32Experts` if the device needs them; nothing is evaluated."""
    if found := list(_experts(model)):
        model.update_modules(tree_unflatten([(name, Float32Experts(module)) for name, module in found]))


def copied_bytes(model: Any, dtype: mx.Dtype, quantized: Container[str]) -> int:
    """Bytes of a layer's experts in float32, which a gradient holds with weights of `dtype`; 0 if there are none.

    `quantized` are the paths of quantized layers, which `model` has unquantized.
    """
    if dtype == mx.float32:
        return 0
    sizes = Counter[str]()
    for path, module in _experts(model):
        if path not in quantized:
            sizes[path.rpartition(".")[0]] += module.weight.size
    return FLOAT32 * max(sizes.values(), default=0)


def _experts(module: nn.Module) -> Iterator[tuple[str, SwitchLinear]]:
    """The unquantized experts inside `module` by their paths; none on a device that multiplies them in any dtype."""
    found = [(name, part) for name, part in named_modules(module.leaf_modules()) if isinstance(part, SwitchLinear)]
    yield from [] if not found or multiplies_halves() else found
