"""The options of distill: their definition, their checks, and YAML files of them."""

from __future__ import annotations

from .checks import DTYPES, LARGEST_COUNT, LONG_OBJECTIVES, OBJECTIVES, objectives_of, shortened
from .mlx_lm_names import OTHER, SAME, translated
from .options import ALSO, DistillConfig, flag, type_of
from .yaml_file import read_yaml, read_yaml_and_notes, to_yaml

__all__ = [
    "ALSO",
    "DTYPES",
    "LARGEST_COUNT",
    "LONG_OBJECTIVES",
    "OBJECTIVES",
    "OTHER",
    "SAME",
    "DistillConfig",
    "flag",
    "objectives_of",
    "read_yaml",
    "read_yaml_and_notes",
    "shortened",
    "to_yaml",
    "translated",
    "type_of",
]
