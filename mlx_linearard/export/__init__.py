"""Writes a finished run for other tools. `mlx_linearard.export(...)` is also a function."""

from ..lazy import make_callable

make_callable(__name__, "formats")
