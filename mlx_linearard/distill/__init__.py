"""The main job: extend the window, restore what that costs, write the model. Also `mlx_linearard.distill(...)`."""

from ..lazy import make_callable

make_callable(__name__, "run")
