"""RoPE: what a config says, how it is scaled, and the frequencies it means."""

from __future__ import annotations

from .scale import (
    FAMILIES,
    METHODS,
    Family,
    attention_factor,
    disagreement,
    family,
    inverse_frequencies,
    native_window,
    normalise,
    rotary_dims,
    scale_rope,
)

__all__ = [
    "FAMILIES",
    "METHODS",
    "Family",
    "attention_factor",
    "disagreement",
    "family",
    "inverse_frequencies",
    "native_window",
    "normalise",
    "rotary_dims",
    "scale_rope",
]
