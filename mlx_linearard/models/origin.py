"""Where a model comes from: the base model, the licence and the languages that its card (README.md) states.

The card of another model is only data here: of its YAML front matter, a few short strings are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..files import CARD, write_text

MAX_CARD = 1 << 20  # characters that are read of a card
MAX_VALUE, MAX_LANGUAGES = 200, 100  # characters of a value, entries of a list
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """The hub repository of the base model if it is known, and the entries of its card that a copy must keep."""

    base_model: str | None = None
    entries: Mapping[str, str | list[str]] = field(default_factory=dict)  # license..., language

    def __bool__(self) -> bool:
        return bool(self.base_model or self.entries)

    @property
    def front(self) -> dict[str, Any]:
        """The same as entries of a card's front matter."""
        return {**({"base_model": self.base_model} if self.base_model else {}), **self.entries}


def origin_of(directory: str | Path) -> Origin:
    """What the card in a model directory says; a snapshot in the hub's cache is its own base model."""
    directory = Path(directory)
    origin = stated_origin(front_matter(directory / CARD))
    return Origin(_cached_repository(directory) or origin.base_model, origin.entries)


def stated_origin(stated: Mapping[str, Any]) -> Origin:
    """The entries of a front matter that are kept; those of another type are left out."""
    entries: dict[str, str | list[str]] = {}
    for key in _LICENCE:
        if value := _plain(stated.get(key)):
            entries[key] = value
    if languages := _languages(stated.get("language")):
        entries["language"] = languages
    return Origin(_repository(stated.get("base_model")), entries)


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML front matter of a card; {} if there is no card, or none that can be read."""
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            match = _FRONT.match(file.read(MAX_CARD))
        value = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def write_origin(directory: Path, origin: Origin) -> None:
    """A card of front matter alone, as mlx-lm writes for a converted model; nothing if nothing is known."""
    if origin:
        tags = ["mlx"]
        front = {**origin.front, "library_name": "mlx", "pipeline_tag": "text-generation", "tags": tags}
        write_text(directory / CARD, f"---\n{dump(front)}---\n")


def dump(front: Mapping[str, Any]) -> str:
    """Entries as YAML: any string is quoted where it must be."""
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any) -> str | None:
    """A short string on one line, or None."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_VALUE and value.isprintable() else None


def _languages(value: Any) -> str | list[str] | None:
    """One language or a list of them. YAML reads Norway's `no` as false."""
    named = [
        "no" if item is False else item for item in (value if isinstance(value, list) else [value])[:MAX_LANGUAGES]
    ]
    kept = [item for item in named if _plain(item)]
    return (kept if isinstance(value, list) else kept[0]) if kept else None


def _repository(value: Any) -> str | None:
    """A hub repository; of a list, the only one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) and _REPOSITORY.fullmatch(value) else None


def _cached_repository(directory: Path) -> str | None:
    """The repository of a snapshot in the hub's cache: .../models--OWNER--NAME/snapshots/REVISION."""
    parts = directory.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return _repository(parts[-3].removeprefix("models--").replace("--", "/", 1))
