"""Checks of the values in a JSON file. Every error is one line that names the file and the field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import UserError, one_line
from ..files import reading

Json = dict[str, Any]
T = TypeVar("T")

LARGEST, SMALLEST = 1e306, 1e-300  # limits of the numbers that statistics and charts accept
LONGEST = 15  # digits of a length, a position or a count
SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class Field:
    """A value's place: the file and the dotted name inside it; the empty name is the whole file."""

    file: str | Path
    name: str = ""

    def __truediv__(self, key: object) -> Field:
        """The place of an entry of this field."""
        return Field(self.file, f"{self.name}.{key}" if self.name else str(key))

    def fail(self, text: str) -> NoReturn:
        """Raise the UserError for this place."""
        place = f"{self.file}: {self.name}" if self.name else str(self.file)
        raise UserError(one_line(f"{place} {text}"))

    def mapping(self, value: Any) -> Mapping[str, Any]:
        """A JSON object."""
        if not isinstance(value, dict):
            self.fail(f"must be a JSON object, not a {type(value).__name__}")
        return value

    def items(self, value: Any) -> list[Any]:
        """A JSON list."""
        if not isinstance(value, list):
            self.fail(f"must be a JSON list, not a {type(value).__name__}")
        return value

    def number(self, value: Any, largest: float = LARGEST) -> float:
        """A finite number between -largest and largest; an integer stays one."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            self.fail(f"must be a finite number, not {shown(value)}")
        if abs(value) > largest:
            self.fail(f"must be at most {largest:g}, not {shown(value)}")
        return value

    def positive(self, value: Any) -> float:
        """A finite number above 0."""
        if self.number(value) < SMALLEST:
            self.fail(f"must be above 0, not {shown(value)}")
        return value

    def fraction(self, value: Any) -> float:
        """A number from 0 to 1."""
        if not 0 <= self.number(value) <= 1:
            self.fail(f"must be a number from 0 to 1, not {shown(value)}")
        return value

    def count(self, value: Any, least: int = 0) -> int:
        """A whole number, `least` or more."""
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 10**LONGEST:
            self.fail(f"must be a whole number, {least} or more, not {shown(value)}")
        return value

    def by_length(self, value: Any) -> dict[int, Any]:
        """A JSON object by length in tokens, in ascending order."""
        return self.by_number(value, "a length in tokens", 1)

    def text(self, value: Any) -> str:
        """A string."""
        if not isinstance(value, str):
            self.fail(f"must be a string, not {shown(value)}")
        return value

    def one_of(self, value: Any, choices: Sequence[str]) -> str:
        """A string from `choices`."""
        if value not in choices:
            self.fail(f"must be one of {', '.join(choices)}, not {shown(value)}")
        return str(value)

    def by_number(self, value: Any, kind: str, least: int) -> dict[int, Any]:
        """A JSON object whose keys are whole numbers, `least` or more, in ascending order; `kind` is what they are."""
        entries = self.mapping(value)
        for key in entries:
            if not is_whole(key) or int(key) < least:
                self.fail(f"has the key {shown(key)}, which is not {kind}")
        return {int(key): entries[key] for key in sorted(entries, key=int)}


def exists(path: Path) -> bool:
    """Whether `path` exists. Raises UserError if that cannot be known, for example without permission."""
    with reading(path):
        return path.exists()


def is_whole(text: str) -> bool:
    """Whether `text` is a whole number in ASCII digits, short enough to be a count."""
    return text.isascii() and text.isdigit() and len(text) <= LONGEST


def visible(text: str) -> str:
    """`text` with U+FFFD for each control character, direction mark and half of a surrogate pair."""
    return _HIDDEN.sub("\ufffd", text)


_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def shown(value: Any) -> str:
    """`value` for a message: short, whatever it is."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "an integer of more than 60 digits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def optional(read: Callable[[Any], T], value: Any) -> T | None:
    """`read` applied to `value`; None stays None."""
    return None if value is None else read(value)


def present(**values: Any) -> Json:
    """The values that are there."""
    return {name: value for name, value in values.items() if value is not None}


def other_entries(entries: Mapping[str, Any], names: Sequence[str]) -> Json:
    """The entries whose keys are not among `names`."""
    return {key: value for key, value in entries.items() if key not in names}
