"""A finished run as files for other tools. Also `mlx_linearard.export(...)`."""

from ..callable import make_callable

make_callable(__name__, "formats")
