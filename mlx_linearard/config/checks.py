"""Checks of the values of options. A check returns the complaint about a value, or None if the value is valid."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

OBJECTIVES = ("relation", "logits", "relation+logits", "ce")
LONG_OBJECTIVES = ("ce", "longce", "recall", "ce+recall", "longce+recall")
FINE_TUNE_TYPES = ("lora", "dora", "full")
NORMALIZATIONS = ("heads", "paper-code")
KEEPS = ("best", "last")
LOGGERS = ("csv", "tensorboard", "wandb", "swanlab", "trackio")
RECOMPUTES = ("auto", "all", "feed-forward", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST = 2**31 - 1  # the largest integer option: mlx counts rows and columns in 32 bits
LARGEST_COUNT = 2**53  # the largest number of tokens in a text, and the largest seed
LARGEST_FACTOR = 10**6

Check = Callable[[Any], str | None]  # the complaint, or None if the value is valid


def positive(value: Any) -> str | None:
    return None if value > 0 else "must be above 0"


def not_negative(value: Any) -> str | None:
    return None if value >= 0 else "must not be negative"


def fraction(value: Any) -> str | None:
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


def extends(value: Any) -> str | None:
    if value <= 1:
        return "must be above 1: a factor of 1 extends nothing"
    return None if value <= LARGEST_FACTOR else f"must be at most {LARGEST_FACTOR}"


def one_of(choices: Sequence[str]) -> Check:
    def check(value: Any) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}"

    return check


def _is_number(text: str) -> bool:
    """Whether `text` is a whole number of at most nine ASCII digits."""
    return re.fullmatch(r"[0-9]{1,9}", text.strip()) is not None


def layer_list(value: str) -> str | None:
    if value in ("last", "all") or all(map(_is_number, value.split(","))):
        return None
    return "must be last, all, or layer numbers such as 0,5,11"


def relation_names(value: str) -> str | None:
    if value and set(value) <= set("qkv") and len(set(value)) == len(value):
        return None
    return "must name relations among q, k and v, each once, such as qkv or qk"


def objectives_of(compare: Any) -> tuple[str, ...]:
    """The objectives of `--compare a,b`, or of `compare` in a config.yaml, in order; () if it is not set."""
    return tuple(filter(None, (part.strip() for part in str(compare or "").split(","))))


def loggers(value: str) -> str | None:
    names = value.split(",")
    if all(name in LOGGERS for name in names) and len(set(names)) == len(names):
        return None
    return f"must name some of {', '.join(LOGGERS)}, each once, separated by commas"


def several_objectives(value: str) -> str | None:
    names = [part.strip() for part in value.split(",")]
    if len(names) > 1 and len(set(names)) == len(names) and set(names) <= set(OBJECTIVES):
        return None
    return f"must name two or more of {', '.join(OBJECTIVES)}, each once, separated by commas"


def length_list(value: str) -> str | None:
    if value == "auto" or all(_is_number(part) and int(part) > 1 for part in value.split(",")):
        return None
    return "must be auto or token counts above 1, such as 2048,16384"


def is_finite(value: Any) -> bool:
    """Whether a number is finite and not above the largest float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # the integer is too large for a float
        return False


def is_utf8(text: str) -> bool:
    """Whether a text can be written to a file, and can be the name of a file."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # a byte of the command line that is not UTF-8
        return False


def quoted(value: Any) -> str:
    """A value quoted for a message, shortened if it is long."""
    return shortened(repr(value))


def shortened(value: Any) -> str:
    """A value for a message, shortened if it is long, in characters that any terminal prints."""
    if isinstance(value, int) and abs(value) > LARGEST_COUNT:
        return "the given number"  # Python refuses to write integers of thousands of digits
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else text[:57] + "..."
