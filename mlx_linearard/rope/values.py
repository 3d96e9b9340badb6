"""Numbers and objects of a config, checked; ValueError names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def number(name: str, value: Any) -> float:
    """`value` as a float; ValueError if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """`value` as a float; ValueError if it is not a finite number greater than 0."""
    result = number(name, value)
    if result <= 0:
        raise ValueError(f"{name} must be greater than 0, not {value!r}")
    return result


def mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object at `key` without its nulls; empty if there is none. ValueError for any other value."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a JSON object, not {type(value).__name__}")
    return {name: entry for name, entry in value.items() if entry is not None}
