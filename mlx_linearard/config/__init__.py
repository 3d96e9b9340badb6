"""The options of distill: their definition, their checks, and YAML files of them."""

from __future__ import annotations

from .checks import DTYPES, LARGEST_COUNT, LONG_OBJECTIVES, OBJECTIVES, RECOMPUTES, objectives_of, shortened
from .mlx_lm_names import OTHER, SAME, translated
from .option import flag, type_of
from .options import ALSO, LEARNING_RATE, LONG_WEIGHT, STEP_COUNT, STEP_TOKENS, DistillConfig, default_rate
from .yaml_file import read_yaml, read_yaml_and_notes, to_yaml

__all__ = [
    "ALSO",
    "DTYPES",
    "LARGEST_COUNT",
    "LEARNING_RATE",
    "LONG_OBJECTIVES",
    "LONG_WEIGHT",
    "OBJECTIVES",
    "OTHER",
    "RECOMPUTES",
    "SAME",
    "STEP_COUNT",
    "STEP_TOKENS",
    "DistillConfig",
    "default_rate",
    "flag",
    "objectives_of",
    "read_yaml",
    "read_yaml_and_notes",
    "shortened",
    "to_yaml",
    "translated",
    "type_of",
]
