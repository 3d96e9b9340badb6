"""The RoPE parameters of a config: both spellings read, one canonical form, both spellings written.

Two generations of Hugging Face configs describe the same rotation. transformers 4 (and mlx-lm) read
`rope_theta` and `rope_scaling`. transformers 5 writes `rope_parameters`; if a config has both, `rope_scaling`
wins. `normalise` reads either and writes both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from .family import Family
from .lookup import family_or_default, native_window, window_binds
from .settings import FULL, SLIDING, state_defaults
from .values import mapping, number, positive
from .wrapper import unwrap, wrap

LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0  # the defaults of low_freq_factor and high_freq_factor
_INTEGERS = ("original_max_position_embeddings",)


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with RoPE in both spellings, so that stock mlx-lm and transformers read the same.

    The copy has `rope_theta`, `rope_scaling` (None, or with `type` and `rope_type`) and `rope_parameters` (per
    layer type for the nested families). Precedence is that of transformers 5. Defaults that the two libraries do not
    share are stated. Normalising twice gives the same as once. ValueError if a value has the wrong type.
    """
    result = copy.deepcopy(dict(config))
    unwrap(result)
    kind = family_or_default(config)
    full, sliding = read(result, kind)
    write(result, kind, full, sliding)
    state_defaults(result)
    _state_full_attention(result)
    if "moe" in str(config.get("model_type")) and "num_local_experts" in result:
        result.setdefault("num_experts", result["num_local_experts"])  # transformers 5 writes only num_local_experts
    wrap(result)
    return result


def read(config: Mapping[str, Any], kind: Family) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The canonical parameters of full-attention layers and of sliding ones (None if both are the same)."""
    parameters = mapping(config, "rope_parameters")
    scaling = mapping(config, "rope_scaling")
    if kind.nested:
        return _read_nested(config, kind, parameters, scaling)
    chosen = dict(scaling or parameters)
    # A version 5 dict carries its own theta; an old one has it beside, at the top level.
    theta = chosen.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = parameters.get("rope_theta", kind.theta)
    chosen["rope_theta"] = theta
    return _canonical(chosen, config, kind), None


def _read_nested(
    config: Mapping[str, Any], kind: Family, parameters: Mapping[str, Any], scaling: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    full = dict(mapping(parameters, FULL) or ({} if mapping(parameters, SLIDING) else parameters))
    sliding = dict(mapping(parameters, SLIDING))
    full.update(scaling)
    theta = config.get("rope_theta")
    full.setdefault("rope_theta", kind.theta if theta is None else theta)
    if kind.local is None:
        sliding.setdefault("rope_theta", full["rope_theta"])
    else:
        local = config.get("rope_local_base_freq")
        sliding.setdefault("rope_theta", kind.local if local is None else local)
    return _canonical(full, config, kind), _canonical(sliding, config, kind)


def _canonical(params: dict[str, Any], config: Mapping[str, Any], kind: Family) -> dict[str, Any]:
    """One form of a set of parameters: rope_type first, floats, no nulls, nothing left to a default."""
    rope_type = params.get("rope_type") or params.get("type") or "default"
    if not isinstance(rope_type, str):
        raise ValueError(f"rope_type must be a string, not {rope_type!r}")
    rope_type = "longrope" if rope_type == "su" else rope_type
    skip = ("type", "rope_type", "partial_rotary_factor")
    values = {key: value for key, value in params.items() if key not in skip and value is not None}
    theta = positive("rope_theta", values.pop("rope_theta"))
    if theta <= 1:
        raise ValueError(f"rope_theta must be greater than 1, not {theta:g}")
    result: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    for key, value in values.items():
        if rope_type == "default" and key not in kind.kept:
            continue
        if key in _INTEGERS:
            result[key] = int(positive(key, value))
        elif isinstance(value, bool | str | list | dict):
            result[key] = value
        else:
            result[key] = number(key, value)
    if rope_type == "default":
        return result
    if rope_type in ("yarn", "llama3", "longrope"):
        original = config.get("original_max_position_embeddings") if rope_type == "longrope" else None
        if original is not None:
            result["original_max_position_embeddings"] = int(positive("original_max_position_embeddings", original))
        elif "original_max_position_embeddings" not in result:
            result["original_max_position_embeddings"] = native_window(config)
    if rope_type == "yarn":
        _canonical_yarn(result, config)
    if rope_type in ("linear", "yarn", "llama3", "dynamic"):
        result["factor"] = positive("factor", result.get("factor"))
    if rope_type == "llama3":
        for key, value in (("low_freq_factor", LLAMA3_LOW), ("high_freq_factor", LLAMA3_HIGH)):
            result[key] = positive(key, result.get(key, value))
        if result["high_freq_factor"] <= result["low_freq_factor"]:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
    return result


def _canonical_yarn(params: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Drop the values that only repeat a default, and fill in the factor that transformers would infer."""
    if "factor" not in params:
        params["factor"] = native_window(config) / params["original_max_position_embeddings"]
    for key in ("beta_fast", "beta_slow"):
        if key in params:
            params[key] = positive(key, params[key])
    if params.get("truncate") is True:
        del params["truncate"]
    if not params.get("mscale_all_dim"):
        params.pop("mscale_all_dim", None)
        if params.get("mscale") == 1:
            del params["mscale"]
    stated = params.get("attention_factor")
    if stated is not None and math.isclose(number("attention_factor", stated), yarn_attention_factor(params)):
        del params["attention_factor"]


def yarn_attention_factor(params: Mapping[str, Any]) -> float:
    """The factor of YaRN's rotated queries and keys, 0.1 ln(factor) + 1 by default (arXiv 2309.00071, section 3.4)."""

    def growth(weight: float) -> float:
        return 1.0 if params["factor"] <= 1 else 0.1 * weight * math.log(params["factor"]) + 1.0

    if params.get("mscale") and params.get("mscale_all_dim"):
        return growth(params["mscale"]) / growth(params["mscale_all_dim"])
    return growth(1.0)


def write(config: dict[str, Any], kind: Family, full: Mapping[str, Any], sliding: Mapping[str, Any] | None) -> None:
    """Write canonical parameters into `config` in both spellings."""
    config["rope_theta"] = full["rope_theta"]
    partial = partial_rotary_factor(config, kind)
    config["rope_scaling"] = None
    if full["rope_type"] != "default":
        rest = {key: value for key, value in full.items() if key not in ("rope_type", "rope_theta")}
        config["rope_scaling"] = {"type": full["rope_type"], "rope_type": full["rope_type"], **rest}
    if sliding is not None:
        if kind.local is not None:
            config["rope_local_base_freq"] = sliding["rope_theta"]
        config["rope_parameters"] = {FULL: dict(full), SLIDING: dict(sliding)}
        return
    config["rope_parameters"] = dict(full)
    if partial is not None:
        config["partial_rotary_factor"] = partial
        config["rope_parameters"]["partial_rotary_factor"] = partial


def _state_full_attention(config: dict[str, Any]) -> None:
    """Set sliding_window to null if the sliding window never binds.

    mlx-lm gives these families no sliding window. transformers does (Mistral: 4096 if the key is missing).
    """
    if family_or_default(config).slides == "all" and not window_binds(config):
        config["sliding_window"] = None


def partial_rotary_factor(config: Mapping[str, Any], kind: Family) -> float | None:
    """The fraction of a head's dimensions that is rotated; None if neither config nor family state one."""
    parameters = mapping(config, "rope_parameters")
    if kind.partial is None and config.get("partial_rotary_factor") is None:
        value = parameters.get("partial_rotary_factor")
        return None if value is None else positive("partial_rotary_factor", value)
    for source in (parameters, config):
        if source.get("partial_rotary_factor") is not None:
            return positive("partial_rotary_factor", source["partial_rotary_factor"])
    return kind.partial


def rotary_dims(config: Mapping[str, Any]) -> int:
    """The number of dimensions of a head that are rotated; ValueError if the config does not say."""
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if not heads or not config.get("hidden_size"):
            raise ValueError("the config names neither head_dim nor hidden_size and num_attention_heads")
        head_dim = positive("hidden_size", config["hidden_size"]) // positive("num_attention_heads", heads)
    partial = partial_rotary_factor(config, family_or_default(config))
    dims = int(positive("head_dim", head_dim))
    return int(dims * (1.0 if partial is None else partial))
