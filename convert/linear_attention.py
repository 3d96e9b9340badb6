"""The weights of models with layers of linear attention or convolution as transformers' files have them."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx


def as_transformers(arrays: dict[str, mx.array], shifted: Iterable[str]) -> dict[str, mx.array]:
    """The arrays with the norms of `Family.shifted` less 1 and convolutions as (channels, 1, width), lazily.

    `arrays` is emptied, so that each array is freed once it is written.
    """
    endings = tuple(f"{name}.weight" for name in shifted)
    result = {}
    for name in list(arrays):
        array = arrays.pop(name)
        if name.endswith(endings):
            array = array - 1
        elif name.endswith(("conv1d.weight", "conv.conv.weight")):
            array = array.moveaxis(2, 1)
        result[name] = array
    return result
