"""Named leaves of trees of arrays and modules, as mlx keeps parameters."""

from __future__ import annotations

from collections.abc import Iterator
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


def walk_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and the modules inside it with their dotted paths, parents first, one at a time."""
    yield path, module
    for name, value in module.items():
        parts = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, part in parts:
            if isinstance(part, nn.Module):
                steps = [path, name, "" if index is None else str(index)]
                yield from walk_modules(part, ".".join(step for step in steps if step))


def slot(tree: Any, path: str) -> tuple[Any, Any]:
    """The container and the key of the entry at a dotted path in a tree of dicts, lists and modules."""
    *steps, last = path.split(".")
    for step in steps:
        tree = tree[int(step) if isinstance(tree, list) else step]
    return tree, int(last) if isinstance(tree, list) else last
