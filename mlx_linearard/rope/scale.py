"""Scales the RoPE of a config, and finds why stock mlx-lm and transformers would compute different things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES
from .family import METHODS, Family
from .frequencies import YARN_FAST, YARN_SLOW, frequencies
from .lookup import LONGEST, family, family_or_default, native_window, text_type, window_binds
from .parameters import LLAMA3_HIGH, LLAMA3_LOW, normalise, read, rotary_dims, write
from .settings import ignored_setting
from .values import mapping, number, positive
from .wrapper import wrap


def scale_rope(
    config: Mapping[str, Any],
    method: str,
    factor: float,
    *,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
) -> dict[str, Any]:
    """A new config whose window is `factor` times as long, by `method` of `METHODS`, in both spellings.

    max_position_embeddings is multiplied. `beta_fast` and `beta_slow` are the ends of YaRN's ramp, in turns of a
    dimension over the native window (arXiv 2309.00071, section 3.2): dimensions that turn more often than
    `beta_fast` keep their frequency, those that turn less often than `beta_slow` are divided by the factor.
    None: 32 and 1, which both libraries assume. `ntk` multiplies rope_theta by factor^(d / (d - 2)) for d rotary
    dimensions, and is the only method that composes with a scaling that the model already has. ValueError names
    the reason: the family does not honour the method, a native scaling would be overwritten, factor <= 1, or
    mlx-lm and transformers would compute different things.

    >>> config = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 100000.0, "hidden_size": 576,
    ...           "num_attention_heads": 9}
    >>> scaled = scale_rope(config, "yarn", 4)
    >>> scaled["max_position_embeddings"], scaled["rope_scaling"]["factor"]
    (32768, 4.0)
    >>> scale_rope(config, "yarn", 1)
    Traceback (most recent call last):
    ValueError: factor must be greater than 1, not 1
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    factor = number("factor", factor)
    if factor <= 1:
        raise ValueError(f"factor must be greater than 1, not {factor:g}")
    ramp = _ramp(method, beta_fast, beta_slow)
    kind = family(config)
    name = config["model_type"]
    if method not in kind.methods:
        raise ValueError(f"{name} does not honour {method}: {kind.refusal.format(name)}")
    result = normalise(config)
    if reason := disagreement(result):
        raise ValueError(f"{name} cannot be scaled: {reason}")
    window = native_window(result)
    _refuse_dual_chunks(result, window)
    if window * factor >= LONGEST:
        raise ValueError(f"a window of {window} tokens times {factor:g} is more than can be indexed")
    full, sliding = read(result, kind)
    _refuse_overwriting(full, method)
    if method == "ntk":
        growth = _ntk_growth(rotary_dims(result), factor)
        full["rope_theta"] *= growth
        if sliding is not None and kind.local is None:  # mlx-lm has one theta for both kinds of layer
            sliding["rope_theta"] *= growth
    else:
        _refuse_another_original(full, kind, method, window)
        full.update(_scaling(result, kind, {"rope_type": method, "factor": factor, **ramp}, window))
    result["max_position_embeddings"] = int(window * factor)
    if full["rope_type"] == "longrope":  # equal windows make the attention factor 1 in both libraries
        full["original_max_position_embeddings"] = result["max_position_embeddings"]
        result["original_max_position_embeddings"] = result["max_position_embeddings"]
    write(result, kind, full, sliding)
    wrap(result)
    if reason := disagreement(result):
        raise ValueError(f"{name} cannot be scaled by {factor:g}: {reason}")
    return result


def disagreement(config: Mapping[str, Any]) -> str | None:
    """Why stock mlx-lm and transformers would compute different things; None if they agree."""
    config = normalise(config)
    kind = family_or_default(config)
    full, sliding = read(config, kind)
    return ignored_setting(config) or _window_disagreement(config) or _rope_disagreement(config, kind, full, sliding)


def difference(config: Mapping[str, Any]) -> str | None:
    """A note about what transformers lacks or computes otherwise than mlx-lm; None where both compute the same.

    Training and `convert to-hf` print it.
    """
    kind = family_or_default(config)
    if not kind.architecture:
        return f"note: the result is for mlx-lm only; transformers has no {config.get('model_type')} model"
    if not kind.differs:
        return None
    if kind.tolerates:
        full, _ = read(normalise(config), kind)
        if not any(full.get(key) == value for key, value in kind.tolerates.items()):
            return None
    return f"note: the result is exact in mlx-lm; {kind.differs}"


def _ramp(method: str, fast: float | None, slow: float | None) -> dict[str, float]:
    """The keys of YaRN's ramp, as far as they are given; ValueError unless 0 < beta_slow < beta_fast."""
    given = {"beta_fast": fast, "beta_slow": slow}
    ramp = {name: positive(name, value) for name, value in given.items() if value is not None}
    if ramp and method != "yarn":
        raise ValueError(f"{' and '.join(ramp)} shape the ramp of yarn: {method} has none")
    low, high = ramp.get("beta_slow", YARN_SLOW), ramp.get("beta_fast", YARN_FAST)
    if low >= high:
        raise ValueError(f"beta_fast {high:g} must be above beta_slow {low:g}")
    return ramp


def _ntk_growth(dims: int, factor: float) -> float:
    if dims <= 2:
        raise ValueError(f"ntk needs more than 2 rotary dimensions, not {dims}")
    return factor ** (dims / (dims - 2))


def _refuse_dual_chunks(config: Mapping[str, Any], window: int) -> None:
    """Refuse a window that only dual chunk attention reaches (Qwen2.5-1M): neither library computes it."""
    key = "dual_chunk_attention_config"
    plain = mapping(config, key).get("original_max_position_embeddings", window)
    if number(f"{key}.original_max_position_embeddings", plain) < window:
        raise ValueError(
            f"its {window} positions need the dual chunk attention of its {key}, which neither mlx-lm nor transformers "
            f"computes: remove that key from config.json, and set max_position_embeddings to {plain}"
        )


def _refuse_overwriting(full: Mapping[str, Any], method: str) -> None:
    native = full["rope_type"]
    if native == "default" or (method == "ntk" and native in ("linear", "yarn", "llama3")):
        return
    if native in ("linear", "yarn", "llama3"):
        raise ValueError(
            f"the model already carries a {native} scaling, which {method} would overwrite: use ntk, "
            "which changes theta and keeps the scaling"
        )
    raise ValueError(
        f"the model already carries a {native} scaling, whose meaning depends on max_position_embeddings: "
        "no method can be composed with it"
    )


def _refuse_another_original(full: Mapping[str, Any], kind: Family, method: str, window: int) -> None:
    """Refuse a scaling whose original window a family reads for something else too, if that has another value."""
    key = "original_max_position_embeddings"
    if method in ("yarn", "llama3") and key in kind.kept and full.get(key, window) != window:
        raise ValueError(
            f"the model scales its queries by its {key} of {full[key]}, which {method} would set to {window}: use "
            "linear or ntk"
        )


def _scaling(config: Mapping[str, Any], kind: Family, chosen: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The parameters of a scaling (without rope_theta), from its type, factor and ramp."""
    params, method = dict(chosen), chosen["rope_type"]
    if method in ("yarn", "llama3"):
        params["original_max_position_embeddings"] = window
    if method == "llama3":
        params.update(low_freq_factor=LLAMA3_LOW, high_freq_factor=LLAMA3_HIGH)
    if not kind.longrope:
        return params
    # The same frequencies as longrope factors: native frequency divided by scaled frequency, per pair of dimensions.
    theta = config["rope_theta"]
    native = frequencies(rotary_dims(config), {"rope_type": "default", "rope_theta": theta})
    scaled = frequencies(rotary_dims(config), {**params, "rope_theta": theta})
    factors = [float(value) for value in native / scaled]
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": list(factors)}


def _window_disagreement(config: Mapping[str, Any]) -> str | None:
    name = config.get("model_type")
    slides = family_or_default(config).slides
    applied = slides in ("all", "some") or (slides == "request" and bool(config.get("use_sliding_window")))
    if not applied or not window_binds(config):
        return None
    return (
        f"transformers applies its sliding window of {config['sliding_window']} and mlx-lm's {name} attends "
        "to every position; for attention to every position, set sliding_window to null in config.json"
    )


def _rope_disagreement(
    config: Mapping[str, Any], kind: Family, full: Mapping[str, Any], sliding: Mapping[str, Any] | None
) -> str | None:
    rope_type = full["rope_type"]
    if sliding is not None:
        if sliding["rope_type"] != "default":
            return "its sliding layers carry a RoPE scaling of their own, which mlx-lm does not read"
        if kind.local is None and sliding["rope_theta"] != full["rope_theta"]:
            return "its sliding layers have a rope_theta of their own, which mlx-lm does not read"
    if rope_type == "default":
        return None
    known = text_type(config) in FAMILIES
    if known and not kind.longrope and rope_type in METHODS and rope_type not in kind.methods:
        return f"its {rope_type} scaling is not read by mlx-lm's {config['model_type']}"
    if rope_type == "yarn":
        return _yarn_disagreement(full, kind)
    if rope_type == "longrope" and full.get("short_factor") != full.get("long_factor"):
        return (
            "its longrope uses the short factors up to the original window in transformers, and always the "
            "long ones in mlx-lm"
        )
    if kind.longrope and rope_type != "longrope":
        return f"transformers refuses {rope_type} scaling for {config['model_type']}"
    return None


def _yarn_disagreement(params: Mapping[str, Any], kind: Family) -> str | None:
    if "attention_factor" in params:
        return f"mlx-lm does not read its yarn attention_factor {params['attention_factor']}"
    if params.get("truncate") is False and "truncate" not in kind.tolerates:
        return "mlx-lm does not read its yarn truncate = false"
    if ("mscale" in params) != ("mscale_all_dim" in params):
        return "mlx-lm and transformers read its yarn mscale differently"
    return None
