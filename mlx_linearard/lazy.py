"""Packages with public names that load at their first use, and packages that are also functions."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names load at their first use.

    homes: the module of each name, relative to the package.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{homes[name]}", package), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names


class _CallablePackage(types.ModuleType):
    """A package that calls the function of its own name; the function's module is loaded at the first call."""

    _home: str

    def _function(self) -> Any:
        return getattr(importlib.import_module(self._home), self.__name__.rpartition(".")[2])

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._function()(*arguments, **keywords)

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())


def make_callable(package: str, home: str) -> None:
    """Let `package`, a package that is being imported, call the function of its name in its module `home`."""
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module._home = f"{package}.{home}"  # type: ignore[attr-defined]
