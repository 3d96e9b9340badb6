"""What an option is: a dataclass field with its help, its check and its heading, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from .checks import LARGEST, Check, is_finite, is_utf8, one_of

KINDS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    group: str = "run",
    most: int = LARGEST,
) -> Any:
    """A dataclass field with everything that defines an option.

    Args:
        check: returns a complaint about a wrong value, or None.
        group: the heading of the option in --help.
        most: the largest value of an integer.
    """
    if choices is not None:
        check = one_of(choices)
        metavar = metavar or "|".join(choices)
    metadata = {"help": help, "check": check, "metavar": metavar, "group": group, "most": most}
    return field(default=default, metadata=metadata)


def complaint(item: dataclasses.Field[Any], value: Any) -> str | None:
    """Why `value` is wrong for an option, or None."""
    if value is None:
        return None if item.default is None else "must have a value"
    kind, check, most = type_of(item), item.metadata["check"], item.metadata["most"]
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if type(value) is not kind and not (kind is float and numeric):
        return f"must be a {kind.__name__}, not a {type(value).__name__}"
    if kind is float and not is_finite(value):
        return "must be a finite number"
    if kind is int and abs(value) > most:
        return f"must be at most {most}"
    if kind is str and not is_utf8(value):
        return "must be UTF-8 text"
    return check(value) if check else None


def flag(name: str) -> str:
    """The spelling of an option on the command line, without its dashes."""
    return name.replace("_", "-")


def type_of(item: dataclasses.Field[Any]) -> type:
    """The plain type of an option's field, with `| None` taken off."""
    return KINDS[str(item.type).removesuffix(" | None")]


def documented(options: type) -> str:
    """The docstring of a dataclass of options, with a line for each field."""
    lines = (
        f"    {item.name} ({item.type}, default {item.default!r}): {item.metadata['help']}."
        for item in dataclasses.fields(options)
    )
    return "\n".join([options.__doc__ or "", "Fields:", *lines])
