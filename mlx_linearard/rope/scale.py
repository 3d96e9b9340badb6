"""What a config says about RoPE: both spellings read and written, and scaled where the family honours it.

Two generations of Hugging Face configs describe the same rotation. transformers 4 (and mlx-lm) read
`rope_theta` and `rope_scaling`; transformers 5 writes `rope_parameters` and, where both stand, lets
`rope_scaling` win. `normalise` reads either and writes both. `FAMILIES` is the one table of which
model_type honours what in mlx-lm 0.32 and transformers 5; whatever is not in it is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST = 1 << 31  # tokens: no window can be as long
METHODS = ("linear", "ntk", "yarn", "llama3")

FULL = "full_attention"
SLIDING = "sliding_attention"

# Keys that each rope_type may carry beside `type` and `rope_type`; the others are dropped or refused.
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_YARN_FAST, _YARN_SLOW = 32.0, 1.0
_INTEGERS = ("original_max_position_embeddings",)

# Families whose sliding window mlx-lm does not apply: on every layer, on some layers, on request.
_ALL_SLIDING = ("mistral", "mixtral", "phi3")
_HALF_SLIDING = ("gemma2",)
_OPTIONAL_SLIDING = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")

_IGNORED = "mlx-lm's {} ignores rope_scaling, so the scaling would be lost without a word; use ntk"
_LINEAR_ONLY = "mlx-lm's {} reads linear scaling only; use linear or ntk"
_PHI3 = "{} can write per-frequency factors but no attention factor of its own; use linear, ntk or llama3"


@dataclass(frozen=True)
class Family:
    """What one model_type honours, in mlx-lm and transformers alike.

    methods  the methods of `METHODS` under which both libraries compute the same rotation
    refusal  why the others are refused ({} stands for the model_type)
    theta    the base that transformers assumes where a config names none
    partial  the partial_rotary_factor that transformers assumes; None where the family has none
    nested   rope_parameters are kept per layer type, and only full-attention layers are scaled
    local    the base of sliding layers where they have one of their own (the key is rope_local_base_freq)
    longrope scalings are written as longrope factors, the only type transformers accepts here
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

# Families that mlx-lm has but whose native logits already part from transformers', and why.
REFUSED: Mapping[str, str] = {
    "gemma": "mlx-lm computes its GELU exactly and transformers by tanh",
    "starcoder2": "mlx-lm computes its GELU exactly and transformers by tanh",
    "glm": "mlx-lm rotates whole heads and transformers half of each",
    "olmo": "mlx-lm reads it only in its own layout and with another package",
}


def family(config: Mapping[str, Any]) -> Family:
    """The row of `FAMILIES` for a config; ValueError where its model_type has none."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError("the config has no model_type")
    if kind in REFUSED:
        raise ValueError(f"model_type {kind!r} is not supported: {REFUSED[kind]}")
    if kind not in FAMILIES:
        reason = "it is multimodal, and only text models are" if "text_config" in config else "it is not"
        raise ValueError(f"model_type {kind!r}: {reason} among {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def native_window(config: Mapping[str, Any]) -> int:
    """The number of positions the model was trained for, as its own config states it.

    That is max_position_embeddings, also under a native scaling: Llama 3.1 says 131072 there and names the
    8192 it was pre-trained with inside its scaling. ValueError where the config does not say.
    """
    window = config.get("max_position_embeddings")
    if isinstance(window, bool) or not isinstance(window, int | float) or not 1 <= window < LONGEST or window % 1:
        raise ValueError(f"the config's max_position_embeddings must be a positive integer, not {window!r}")
    return int(window)


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with RoPE in both spellings, such that stock mlx-lm and transformers read the same.

    Afterwards stand `rope_theta`, `rope_scaling` (None, or with `type` and `rope_type`) and
    `rope_parameters` (per layer type for the nested families). Precedence is that of transformers 5.
    Idempotent; ValueError where a value has the wrong type.
    """
    result = copy.deepcopy(dict(config))
    kind = FAMILIES.get(str(config.get("model_type")), Family())
    full, sliding = _read(result, kind)
    _write(result, kind, full, sliding)
    _plain_attention(result)
    if "moe" in str(config.get("model_type")) and "num_local_experts" in result:
        result.setdefault("num_experts", result["num_local_experts"])  # transformers 5 writes only the former
    return result


def scale_rope(config: Mapping[str, Any], method: str, factor: float) -> dict[str, Any]:
    """A new config whose window is `factor` times as long, by `method` of `METHODS`, in both spellings.

    max_position_embeddings is multiplied. `ntk` multiplies rope_theta by factor^(d / (d - 2)) for d rotary
    dimensions, and is the only method that composes with a scaling the model already has. ValueError names
    the reason where the family does not honour the method, where a native scaling would be overwritten,
    where factor <= 1, and where mlx-lm and transformers would compute different things.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    factor = _number("factor", factor)
    if factor <= 1:
        raise ValueError(f"factor must be greater than 1, not {factor:g}")
    kind = family(config)
    name = config["model_type"]
    if method not in kind.methods:
        raise ValueError(f"{name} does not honour {method}: {kind.refusal.format(name)}")
    result = normalise(config)
    if reason := disagreement(result):
        raise ValueError(f"{name} cannot be scaled: {reason}")
    window = native_window(result)
    if window * factor >= LONGEST:
        raise ValueError(f"a window of {window} tokens times {factor:g} is more than can be indexed")
    full, sliding = _read(result, kind)
    _refuse_overwriting(full, method)
    if method == "ntk":
        growth = _ntk_growth(rotary_dims(result), factor)
        full["rope_theta"] *= growth
        if sliding is not None and kind.local is None:  # mlx-lm has one theta for both kinds of layer
            sliding["rope_theta"] *= growth
    else:
        full.update(_scaling(result, kind, method, factor, window))
    result["max_position_embeddings"] = int(window * factor)
    if full["rope_type"] == "longrope":  # equal windows make the attention factor 1 in both libraries
        full["original_max_position_embeddings"] = result["max_position_embeddings"]
        result["original_max_position_embeddings"] = result["max_position_embeddings"]
    _write(result, kind, full, sliding)
    if reason := disagreement(result):
        raise ValueError(f"{name} cannot be scaled by {factor:g}: {reason}")
    return result


def disagreement(config: Mapping[str, Any]) -> str | None:
    """Why stock mlx-lm and transformers would compute different things; None where they agree."""
    config = normalise(config)
    kind = FAMILIES.get(str(config.get("model_type")), Family())
    full, sliding = _read(config, kind)
    return _window_disagreement(config) or _rope_disagreement(config, kind, full, sliding)


def rotary_dims(config: Mapping[str, Any]) -> int:
    """How many dimensions of a head are rotated; ValueError where the config does not say."""
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim")
    if head_dim is None:
        if not heads or not config.get("hidden_size"):
            raise ValueError("the config names neither head_dim nor hidden_size and num_attention_heads")
        head_dim = _positive("hidden_size", config["hidden_size"]) // _positive("num_attention_heads", heads)
    kind = FAMILIES.get(str(config.get("model_type")), Family())
    partial = _partial(config, kind)
    dims = int(_positive("head_dim", head_dim))
    return int(dims * (1.0 if partial is None else partial))


def attention_factor(config: Mapping[str, Any]) -> float:
    """By how much the rotated queries and keys of full-attention layers are multiplied (yarn, longrope)."""
    config = normalise(config)
    full, _ = _read(config, FAMILIES.get(str(config.get("model_type")), Family()))
    if full["rope_type"] == "yarn":
        return _yarn_attention_factor(full)
    if full["rope_type"] == "longrope":
        original = _original(full, config)
        ratio = native_window(config) / original
        return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    return 1.0


def inverse_frequencies(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse frequencies a config means, float64 (rotary_dims / 2,), by layer type.

    Independent of mlx-lm and transformers: linear (arXiv 2306.15595), ntk (a larger theta), yarn (arXiv
    2309.00071, section 3), llama3 (the Llama 3.1 release), longrope (arXiv 2402.13753); ValueError for
    any other.
    """
    config = normalise(config)
    full, sliding = _read(config, FAMILIES.get(str(config.get("model_type")), Family()))
    dims = rotary_dims(config)
    kinds = {FULL: full} if sliding is None else {FULL: full, SLIDING: sliding}
    return {name: _inverse_frequencies(dims, params, config) for name, params in kinds.items()}


# -- reading and writing the two spellings --


def _read(config: Mapping[str, Any], kind: Family) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The canonical parameters of full-attention layers and of sliding ones (None where not kept apart)."""
    parameters = _mapping(config, "rope_parameters")
    scaling = _mapping(config, "rope_scaling")
    if kind.nested:
        full = dict(_mapping(parameters, FULL) or ({} if _mapping(parameters, SLIDING) else parameters))
        sliding = dict(_mapping(parameters, SLIDING))
        full.update(scaling)
        theta = config.get("rope_theta")
        full.setdefault("rope_theta", kind.theta if theta is None else theta)
        if kind.local is None:
            sliding.setdefault("rope_theta", full["rope_theta"])
        else:
            local = config.get("rope_local_base_freq")
            sliding.setdefault("rope_theta", kind.local if local is None else local)
        return _canonical(full, config), _canonical(sliding, config)
    chosen = dict(scaling or parameters)
    # A v5 dict carries its own theta; an old one stands beside the top-level theta.
    theta = chosen.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = parameters.get("rope_theta", kind.theta)
    chosen["rope_theta"] = theta
    return _canonical(chosen, config), None


def _canonical(params: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling of a set of parameters: rope_type first, floats, no nulls, nothing left to a default."""
    kind = params.get("rope_type") or params.get("type") or "default"
    if not isinstance(kind, str):
        raise ValueError(f"rope_type must be a string, not {kind!r}")
    kind = "longrope" if kind == "su" else kind
    skip = ("type", "rope_type", "partial_rotary_factor")
    values = {key: value for key, value in params.items() if key not in skip and value is not None}
    result: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": _positive("rope_theta", values.pop("rope_theta")),
    }
    if kind == "default":
        return result
    for key, value in values.items():
        if key in _INTEGERS:
            result[key] = int(_positive(key, value))
        elif isinstance(value, bool | str | list | dict):
            result[key] = value
        else:
            result[key] = _number(key, value)
    if kind in ("yarn", "llama3", "longrope"):
        original = config.get("original_max_position_embeddings") if kind == "longrope" else None
        if original is not None or "original_max_position_embeddings" not in result:
            result["original_max_position_embeddings"] = int(original or native_window(config))
    if kind == "yarn":
        _canonical_yarn(result, config)
    if kind in ("linear", "yarn", "llama3", "dynamic"):
        result["factor"] = _positive("factor", result.get("factor"))
    if kind == "llama3":
        for key, value in (("low_freq_factor", _LLAMA3_LOW), ("high_freq_factor", _LLAMA3_HIGH)):
            result[key] = _positive(key, result.get(key, value))
    return result


def _canonical_yarn(params: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Drop what only repeats a default, and fill in the factor that transformers would infer."""
    if "factor" not in params:
        params["factor"] = native_window(config) / params["original_max_position_embeddings"]
    if params.get("truncate") is True:
        del params["truncate"]
    if not params.get("mscale_all_dim"):
        params.pop("mscale_all_dim", None)
        if params.get("mscale") == 1:
            del params["mscale"]
    stated = params.get("attention_factor")
    if stated is not None and math.isclose(_number("attention_factor", stated), _yarn_attention_factor(params)):
        del params["attention_factor"]


def _write(config: dict[str, Any], kind: Family, full: Mapping[str, Any], sliding: Mapping[str, Any] | None) -> None:
    """Write canonical parameters into `config` in both spellings."""
    config["rope_theta"] = full["rope_theta"]
    partial = _partial(config, kind)
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


def _plain_attention(config: dict[str, Any]) -> None:
    """Write down that every layer attends to everything, where the sliding window never binds.

    mlx-lm gives these families no sliding window; transformers does (Mistral: 4096 if the key is missing).
    """
    if config.get("model_type") in _ALL_SLIDING and not _window_binds(config):
        config["sliding_window"] = None


def _partial(config: Mapping[str, Any], kind: Family) -> float | None:
    if kind.partial is None and config.get("partial_rotary_factor") is None:
        parameters = _mapping(config, "rope_parameters")
        value = parameters.get("partial_rotary_factor")
        return None if value is None else _positive("partial_rotary_factor", value)
    for source in (_mapping(config, "rope_parameters"), config):
        if source.get("partial_rotary_factor") is not None:
            return _positive("partial_rotary_factor", source["partial_rotary_factor"])
    return kind.partial


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a JSON object, not {type(value).__name__}")
    return {name: entry for name, entry in value.items() if entry is not None}  # null says nothing


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be greater than 0, not {value!r}")
    return number


# -- scaling --


def _ntk_growth(dims: int, factor: float) -> float:
    if dims <= 2:
        raise ValueError(f"ntk needs more than 2 rotary dimensions, not {dims}")
    return factor ** (dims / (dims - 2))


def _refuse_overwriting(full: Mapping[str, Any], method: str) -> None:
    native = full["rope_type"]
    if native == "default" or (method == "ntk" and native in ("linear", "yarn", "llama3")):
        return
    if native in ("linear", "yarn", "llama3"):
        raise ValueError(
            f"the model already carries a {native} scaling, which {method} would overwrite: use ntk, "
            "which changes theta and keeps it"
        )
    raise ValueError(
        f"the model already carries a {native} scaling, whose meaning depends on max_position_embeddings: "
        "no method can be composed with it"
    )


def _scaling(config: Mapping[str, Any], kind: Family, method: str, factor: float, window: int) -> dict[str, Any]:
    """The parameters that `method` adds (without rope_theta)."""
    params: dict[str, Any] = {"rope_type": method, "factor": factor}
    if method in ("yarn", "llama3"):
        params["original_max_position_embeddings"] = window
    if method == "llama3":
        params.update(low_freq_factor=_LLAMA3_LOW, high_freq_factor=_LLAMA3_HIGH)
    if not kind.longrope:
        return params
    # The same frequencies as longrope factors: how much slower than native each pair of dimensions turns.
    theta = config["rope_theta"]
    native = _inverse_frequencies(rotary_dims(config), {"rope_type": "default", "rope_theta": theta}, config)
    scaled = _inverse_frequencies(rotary_dims(config), {**params, "rope_theta": theta}, config)
    factors = [float(value) for value in native / scaled]
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": list(factors)}


# -- where the two libraries part --


def _window_binds(config: Mapping[str, Any]) -> bool:
    """Whether a sliding window is stated that is shorter than the model's own window."""
    sliding, window = config.get("sliding_window"), config.get("max_position_embeddings")
    return sliding is not None and window is not None and _number("sliding_window", sliding) < window


def _window_disagreement(config: Mapping[str, Any]) -> str | None:
    name = config.get("model_type")
    applied = name in _ALL_SLIDING or name in _HALF_SLIDING
    applied = applied or (name in _OPTIONAL_SLIDING and bool(config.get("use_sliding_window")))
    if not applied or not _window_binds(config):
        return None
    return (
        f"transformers applies its sliding window of {config['sliding_window']} and mlx-lm's {name} attends "
        "to everything; to mean the latter, set sliding_window to null in config.json"
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
    known = str(config.get("model_type")) in FAMILIES
    if known and not kind.longrope and rope_type in METHODS and rope_type not in kind.methods:
        return f"its {rope_type} scaling is not read by mlx-lm's {config['model_type']}"
    if rope_type == "yarn":
        return _yarn_disagreement(full)
    if rope_type == "longrope" and full.get("short_factor") != full.get("long_factor"):
        return (
            "its longrope uses the short factors up to the original window in transformers, and always the "
            "long ones in mlx-lm"
        )
    if kind.longrope and rope_type != "longrope":
        return f"transformers refuses {rope_type} scaling for {config['model_type']}"
    return None


def _yarn_disagreement(params: Mapping[str, Any]) -> str | None:
    if "attention_factor" in params:
        return f"mlx-lm does not read its yarn attention_factor {params['attention_factor']}"
    if params.get("truncate") is False:
        return "mlx-lm does not read its yarn truncate = false"
    if ("mscale" in params) != ("mscale_all_dim" in params):
        return "mlx-lm and transformers read its yarn mscale differently"
    return None


# -- the frequencies themselves --


def _inverse_frequencies(dims: int, params: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    theta, kind = params["rope_theta"], params["rope_type"]
    native = theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    if kind == "default":
        return native
    if kind == "linear":
        return native / params["factor"]
    if kind == "llama3":
        return _llama3(native, params)
    if kind == "yarn":
        return _yarn(native, dims, params)
    if kind == "longrope":
        factors = np.asarray(params.get("long_factor"), dtype=np.float64)
        if factors.shape != native.shape:
            raise ValueError(f"long_factor must hold {native.size} numbers")
        return native / factors
    raise ValueError(f"rope_type {kind!r} has no fixed frequencies")


def _llama3(native: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend between."""
    low, high = params["low_freq_factor"], params["high_freq_factor"]
    turns = params["original_max_position_embeddings"] * native / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return native * (keep + (1 - keep) / params["factor"])


def _yarn(native: np.ndarray, dims: int, params: Mapping[str, Any]) -> np.ndarray:
    """As llama3, with the blend linear in the dimension's index between two whole indices."""

    def index(turns: float) -> float:
        ratio = params["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dims * math.log(ratio) / (2 * math.log(params["rope_theta"]))

    low = max(math.floor(index(params.get("beta_fast", _YARN_FAST))), 0)
    high: float = min(math.ceil(index(params.get("beta_slow", _YARN_SLOW))), dims - 1)
    if low == high:
        high += 0.001
    divide = np.clip((np.arange(native.size, dtype=np.float64) - low) / (high - low), 0, 1)
    return native * (divide / params["factor"] + (1 - divide))


def _yarn_attention_factor(params: Mapping[str, Any]) -> float:
    def growth(weight: float) -> float:
        return 1.0 if params["factor"] <= 1 else 0.1 * weight * math.log(params["factor"]) + 1.0

    if params.get("mscale") and params.get("mscale_all_dim"):
        return growth(params["mscale"]) / growth(params["mscale_all_dim"])
    return growth(1.0)


def _original(params: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    return int(params.get("original_max_position_embeddings") or native_window(config))
