"""Trees of arrays, as mlx keeps parameters, seen as named leaves."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def named_arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree with their dotted paths."""
    return list(tree_flatten(tree))  # type: ignore[arg-type]


def named_modules(tree: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a tree of modules with their dotted paths."""
    return list(tree_flatten(tree, is_leaf=nn.Module.is_module))  # type: ignore[arg-type]
