"""The options of distill: their definition, their checks, and YAML files of them."""

from __future__ import annotations

from .checks import DTYPES, LARGEST_COUNT, LONG_OBJECTIVES, OBJECTIVES, objectives_of, shortened
from .options import DistillConfig, flag, type_of
from .yaml_file import read_yaml, to_yaml

__all__ = [
    "DTYPES",
    "LARGEST_COUNT",
    "LONG_OBJECTIVES",
    "OBJECTIVES",
    "DistillConfig",
    "flag",
    "objectives_of",
    "read_yaml",
    "shortened",
    "to_yaml",
    "type_of",
]
