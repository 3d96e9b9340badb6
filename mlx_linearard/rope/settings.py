"""Config keys beside RoPE that change what a model computes, and the values for which mlx-lm computes the same.

mlx-lm's model files do not read many keys of a Hugging Face config, and read a few that transformers does not.
`Family.fixed` and `Family.defaults` name those keys for each family of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import ALWAYS
from .lookup import family_or_default, window_binds

# Layer types, as layer_types and rope_parameters name them.
FULL = "full_attention"
SLIDING = "sliding_attention"
LINEAR = "linear_attention"
CONVOLUTION = "conv"


def state_defaults(config: dict[str, Any]) -> None:
    """Write into `config` the defaults of transformers that mlx-lm does not share.

    layer_types become mlx-lm's sliding_window_pattern in the families that have one.
    """
    kind = family_or_default(config)
    for key, value in kind.defaults.items():
        if key not in config:
            config[key] = list(value) if isinstance(value, list) else value
    if kind.pattern == "period" and (period := _period(config.get("layer_types"))):
        config["sliding_window_pattern"] = period
    if kind.pattern == "interval" and (period := _period(config.get("layer_types"), LINEAR)):
        config["full_attention_interval"] = period
    if kind.pattern == "letters":
        _state_letters(config)
    if kind.pattern == "conv":
        _state_convolutions(config)


def _state_convolutions(config: dict[str, Any]) -> None:
    """Write layer_types and full_attn_idxs as one says the other, and the widths by both names."""
    layers, chosen = config.get("num_hidden_layers"), config.get("full_attn_idxs")
    if config.get("layer_types") is None and isinstance(layers, int):
        full = range(layers) if not isinstance(chosen, list) else chosen
        config["layer_types"] = [FULL if layer in full else CONVOLUTION for layer in range(layers)]
    if isinstance(config.get("layer_types"), list):
        config["full_attn_idxs"] = [i for i, name in enumerate(config["layer_types"]) if name == FULL]
    if config.get("block_ff_dim") is not None:
        config["intermediate_size"] = config["block_ff_dim"]
    if "hidden_size" in config:
        config["block_dim"] = config["hidden_size"]  # transformers has no other


def _state_letters(config: dict[str, Any]) -> None:
    """Write sliding_window_pattern as letters, and layer_types beside it; None if no layer slides."""
    pattern, layers = config["sliding_window_pattern"], config.get("num_hidden_layers")
    if config["sliding_window"] is None or not isinstance(layers, int):
        config["sliding_window_pattern"] = None
        return
    if config.get("layer_types") is None and isinstance(pattern, int) and pattern > 0:
        config["layer_types"] = _pattern(layers, pattern)
    elif config.get("layer_types") is None and isinstance(pattern, str) and pattern:
        config["layer_types"] = [SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(layers)]
    if isinstance(config.get("layer_types"), list):
        letters = "".join("L" if name == SLIDING else "G" for name in config["layer_types"])
        config["sliding_window_pattern"] = letters if SLIDING in config["layer_types"] else None


def _period(layer_types: Any, other: str = SLIDING) -> int | None:
    """The smallest n for which exactly every n-th layer has full attention; None if there is none."""
    if not isinstance(layer_types, list) or FULL not in layer_types:
        return None
    period = layer_types.index(FULL) + 1
    return period if layer_types == _pattern(len(layer_types), period, other) else None


def _pattern(layers: int, period: int, other: str = SLIDING) -> list[str]:
    return [other if (layer + 1) % period else FULL for layer in range(layers)]


def ignored_setting(config: Mapping[str, Any]) -> str | None:
    """The first key whose value mlx-lm and transformers compute differently, in words; None if there is none."""
    model_type = str(config.get("model_type"))
    for key, values in {**ALWAYS, **family_or_default(config).fixed}.items():
        value = config.get(key)
        if value is not None and not any(value == allowed and type(value) is type(allowed) for allowed in values):
            wanted = " or ".join(repr(allowed) for allowed in values[:1]) or "null"
            return f"mlx-lm's {model_type} computes {key} = {wanted} only, and the config has {value!r}"
    if model_type == "gemma2":
        return _caps(config)
    return _layers(config, model_type)


def _caps(config: Mapping[str, Any]) -> str | None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = config.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            return f"mlx-lm's gemma2 needs a positive {key}, and the config has {value!r}"
    return None


def _layers(config: Mapping[str, Any], model_type: str) -> str | None:
    layer_types, count = config.get("layer_types"), config.get("num_hidden_layers")
    pattern, window = family_or_default(config).pattern, config.get("sliding_window")
    if pattern == "interval":
        return _interval(config, model_type)
    if pattern == "conv":
        return _convolutions(config)
    needs_window = pattern and (pattern != "letters" or config.get("sliding_window_pattern") is not None)
    if needs_window and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        return f"mlx-lm's {model_type} needs a positive sliding_window, and the config has {window!r}"
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or (isinstance(count, int) and len(layer_types) != count):
        return f"layer_types must be a list with one entry for each of the {count} layers"
    if pattern == "period":
        period = config.get("sliding_window_pattern")
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            return f"sliding_window_pattern must be a positive integer, not {period!r}"
        if layer_types != _pattern(len(layer_types), period):
            return f"mlx-lm's {model_type} has full attention in every n-th layer only, which layer_types do not say"
        return None
    others = [name for name in layer_types if name != FULL and not (needs_window and name == SLIDING)]
    if needs_window and not others and len(set(layer_types)) < 2:
        return f"mlx-lm's {model_type} needs layers of both kinds, and layer_types has {layer_types[0]!r} only"
    if not others or (others == [SLIDING] * len(others) and _never_slides(config)):
        return None
    return f"mlx-lm's {model_type} and transformers do not compute layer_types with {others[0]!r} alike"


def _interval(config: Mapping[str, Any], model_type: str) -> str | None:
    layer_types, count, period = (
        config.get(key) for key in ("layer_types", "num_hidden_layers", "full_attention_interval")
    )
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        return f"full_attention_interval must be a positive integer, not {period!r}"
    if isinstance(count, int) and period > count:
        return f"full_attention_interval is {period}, so none of its {count} layers has full attention"
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or layer_types != _pattern(count or len(layer_types), period, LINEAR):
        return f"mlx-lm's {model_type} has full attention in every n-th layer only, which layer_types do not say"
    return None


def _convolutions(config: Mapping[str, Any]) -> str | None:
    layer_types, count = config.get("layer_types"), config.get("num_hidden_layers")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != count or FULL not in layer_types:
        return f"layer_types must be a list with one entry for each of the {count} layers, and full attention in some"
    others = [name for name in layer_types if name not in (FULL, CONVOLUTION)]
    return f"mlx-lm's lfm2 has no layers as {others[0]!r} of layer_types" if others else None


def _never_slides(config: Mapping[str, Any]) -> bool:
    """Whether sliding layers see all positions in both libraries: a window is stated, and it never binds."""
    return config.get("sliding_window") is not None and not window_binds(config)
