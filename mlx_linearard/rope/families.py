"""The one table of the supported model families: which RoPE scalings each honours in mlx-lm and transformers alike.

Made for mlx-lm 0.32 and transformers 5. A model_type that is not in `FAMILIES` is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .values import number

METHODS = ("linear", "ntk", "yarn", "llama3")
LONGEST = 1 << 31  # tokens; positions are 32-bit integers

_IGNORED = "mlx-lm's {} ignores rope_scaling, so the scaling would be lost silently; use ntk"
_LINEAR_ONLY = "mlx-lm's {} reads linear scaling only; use linear or ntk"
_PHI3 = "{} can write per-frequency factors but no attention factor of its own; use linear, ntk or llama3"


@dataclass(frozen=True)
class Family:
    """The RoPE scalings that one model_type honours, in mlx-lm and transformers alike.

    methods  the methods of `METHODS` under which both libraries compute the same rotation
    refusal  why the other methods are refused ({} is replaced by the model_type)
    theta    the theta that transformers assumes if a config names none
    partial  the partial_rotary_factor that transformers assumes; None if the family has none
    nested   rope_parameters are kept per layer type, and only full-attention layers are scaled
    local    the theta of sliding layers if they have one of their own (the key is rope_local_base_freq)
    longrope scalings are written as longrope factors, the only type that transformers accepts here
    """

    methods: tuple[str, ...] = METHODS
    refusal: str = ""
    theta: float = 10000.0
    partial: float | None = None
    nested: bool = False
    local: float | None = None
    longrope: bool = False


def _ntk(theta: float = 10000.0, partial: float | None = None) -> Family:
    return Family(("ntk",), _IGNORED, theta, partial)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "olmo2": Family(),
    "granite": Family(),
    "seed_oss": Family(),
    "smollm3": Family(theta=2000000.0),
    "olmo3": Family(theta=500000.0, nested=True),
    "gemma3_text": Family(theta=1000000.0, nested=True, local=10000.0),
    "phi3": Family(("linear", "ntk", "llama3"), _PHI3, partial=1.0, longrope=True),
    "nemotron": Family(("linear", "ntk"), _LINEAR_ONLY, partial=0.5),
    "mixtral": _ntk(theta=1000000.0),
    "qwen2_moe": _ntk(),
    "qwen3_moe": _ntk(),
    "gemma2": _ntk(),
    "phi": _ntk(partial=0.5),
    "cohere": _ntk(theta=500000.0),
    "glm4": _ntk(partial=0.5),
    "stablelm": _ntk(partial=0.25),
}

# Families that mlx-lm has, but whose native logits already differ from those of transformers, and why.
REFUSED: Mapping[str, str] = {
    "gemma": "mlx-lm computes its GELU exactly and transformers by tanh",
    "starcoder2": "mlx-lm computes its GELU exactly and transformers by tanh",
    "glm": "mlx-lm rotates whole heads and transformers half of each",
    "olmo": "mlx-lm reads it only in its own layout and with another package",
}

# Families whose sliding window transformers applies and mlx-lm does not.
SLIDING_ON_ALL_LAYERS = ("mistral", "mixtral", "phi3")
SLIDING_ON_SOME_LAYERS = ("gemma2",)
SLIDING_ON_REQUEST = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")  # use_sliding_window


def family(config: Mapping[str, Any]) -> Family:
    """The row of `FAMILIES` for a config; ValueError if its model_type has none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError("the config has no model_type")
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        reason = "it is multimodal, and only text models are" if "text_config" in config else "it is not"
        raise ValueError(f"model_type {model_type!r}: {reason} among {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def family_or_default(config: Mapping[str, Any]) -> Family:
    """The row of `FAMILIES` for a config, or a family without peculiarities."""
    return FAMILIES.get(str(config.get("model_type")), Family())


def native_window(config: Mapping[str, Any]) -> int:
    """The number of positions that the model was trained for, as its own config states it.

    That is max_position_embeddings, also under a native scaling: Llama 3.1 states 131072 there, and the 8192 of
    its pre-training inside its scaling. ValueError if the config does not state it.
    """
    window = config.get("max_position_embeddings")
    if isinstance(window, bool) or not isinstance(window, int | float) or not 1 <= window < LONGEST or window % 1:
        raise ValueError(f"the config's max_position_embeddings must be a positive integer, not {window!r}")
    return int(window)


def window_binds(config: Mapping[str, Any]) -> bool:
    """Whether the config states a sliding window that is shorter than the model's own window."""
    sliding, window = config.get("sliding_window"), config.get("max_position_embeddings")
    return sliding is not None and window is not None and number("sliding_window", sliding) < window
