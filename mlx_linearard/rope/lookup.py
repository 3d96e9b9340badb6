"""The row of the table for a config, and the window that the config states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import FAMILIES, WRAPPERS
from .family import METHODS, Family
from .refused import REFUSED
from .values import number

LONGEST = 1 << 31  # tokens; positions are 32-bit integers


def text_type(config: Mapping[str, Any]) -> str:
    """The model_type of a config, or that of its text model if it is one of `WRAPPERS`."""
    model_type, text = str(config.get("model_type")), config.get("text_config")
    if model_type not in WRAPPERS or not isinstance(text, Mapping):
        return model_type
    return str(text.get("model_type", WRAPPERS[model_type][0]))


def methods_help() -> str:
    """A sentence for --help: which families honour which methods of scaling."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in sorted(FAMILIES.items()):
        groups.setdefault(row.methods, []).append(name)
    some = {" and ".join(methods): names for methods, names in groups.items() if methods != METHODS}
    parts = [f"only {methods} for {', '.join(names)}" for methods, names in sorted(some.items())]
    return f"{'; '.join(parts)}; all for {', '.join(groups[METHODS])}"


def family(config: Mapping[str, Any]) -> Family:
    """The row of `FAMILIES` for a config; ValueError that names what is missing if its model_type has none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError("the config has no model_type")
    if model_type in WRAPPERS:
        if (inner := text_type(config)) not in WRAPPERS[model_type]:
            raise ValueError(
                f"the text model of {model_type!r} is not supported: it is {inner!r}, not "
                f"{' or '.join(WRAPPERS[model_type])}"
            )
        return FAMILIES[inner]
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    reason = "it is multimodal, and only text models are" if "text_config" in config else "it is not"
    raise ValueError(f"model_type {model_type!r}: {reason} among {', '.join(sorted(FAMILIES))}")


def family_or_default(config: Mapping[str, Any]) -> Family:
    """The row of `FAMILIES` for a config, or a family without peculiarities."""
    return FAMILIES.get(text_type(config), Family())


def native_window(config: Mapping[str, Any]) -> int:
    """The number of positions that the model was trained for, as its own config states it.

    That is max_position_embeddings, also under a native scaling: Llama 3.1 states 131072 there, and the 8192 of
    its pre-training inside its scaling. ValueError if the config does not state it.
    """
    text = config.get("text_config")
    inside = text.get("max_position_embeddings") if isinstance(text, Mapping) else None
    window = config.get("max_position_embeddings", inside)
    if isinstance(window, bool) or not isinstance(window, int | float) or not 1 <= window < LONGEST or window % 1:
        raise ValueError(f"the config's max_position_embeddings must be a positive integer, not {window!r}")
    return int(window)


def window_binds(config: Mapping[str, Any]) -> bool:
    """Whether the config states a sliding window that is shorter than the model's own window."""
    sliding, window = config.get("sliding_window"), config.get("max_position_embeddings")
    return sliding is not None and window is not None and number("sliding_window", sliding) < window
