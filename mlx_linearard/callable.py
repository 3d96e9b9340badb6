"""Packages that are also functions: `mlx_linearard.distill(config)` works although `distill` is a folder too."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from typing import Any


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
