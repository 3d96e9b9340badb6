"""RoPE: the parameters of a config, how they are scaled, and the frequencies that they mean."""

from __future__ import annotations

from .families import FAMILIES, WRAPPERS
from .family import METHODS, Family
from .frequencies import attention_factor, inverse_frequencies
from .lookup import family, family_or_default, methods_help, native_window
from .parameters import normalise, rotary_dims
from .refused import REFUSED
from .scale import difference, disagreement, scale_rope
from .settings import ignored_setting
from .wrapper import PREFIX, is_wrapper, text_model, wrap, written

__all__ = [
    "FAMILIES",
    "METHODS",
    "PREFIX",
    "REFUSED",
    "WRAPPERS",
    "Family",
    "attention_factor",
    "difference",
    "disagreement",
    "family",
    "family_or_default",
    "ignored_setting",
    "inverse_frequencies",
    "is_wrapper",
    "methods_help",
    "native_window",
    "normalise",
    "rotary_dims",
    "scale_rope",
    "text_model",
    "wrap",
    "written",
]
