"""The main job: extend the window, train what that costs back, write the model. Also `mlx_linearard.distill(...)`."""

from ..lazy import make_callable

make_callable(__name__, "run")
