"""RoPE: the parameters of a config, how they are scaled, and the frequencies that they mean."""

from __future__ import annotations

from .families import FAMILIES, METHODS, Family, family, native_window
from .frequencies import attention_factor, inverse_frequencies
from .parameters import normalise, rotary_dims
from .scale import disagreement, scale_rope
from .settings import ignored_setting

__all__ = [
    "FAMILIES",
    "METHODS",
    "Family",
    "attention_factor",
    "disagreement",
    "family",
    "ignored_setting",
    "inverse_frequencies",
    "native_window",
    "normalise",
    "rotary_dims",
    "scale_rope",
]
