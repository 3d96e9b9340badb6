"""Items of multiple choice, last words and questions: from JSONL files, named sets of the hub, or Python objects."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ...data import HUB_PREFIX
from ...errors import UserError, one_line
from . import hub

Items = str | Path | Iterable[Mapping[str, Any]]
Check = Callable[[Mapping[str, Any], str], dict[str, Any]]  # (item, its place) -> the checked item


def checked_items(source: Items, check: Check, limit: int | None = None) -> list[dict[str, Any]]:
    """At most `limit` checked items of a JSONL file, of a named set (hf:NAME), or of Python objects.

    Raises UserError if there are none, or if one is not valid.
    """
    if not isinstance(source, str | Path):
        placed = [(f"item {number}", dict(item)) for number, item in enumerate(source)]
    elif str(source).startswith(HUB_PREFIX):
        rows = hub.load_set(str(source).removeprefix(HUB_PREFIX), limit)
        placed = [(f"{source} item {number}", row) for number, row in enumerate(rows)]
    else:
        placed = list(read_items(source))
    if not placed:
        raise UserError("there are no items: give at least one")
    return [check(item, place) for place, item in placed[:limit]]


def name_of(source: str | Path) -> str:
    """The name of a set of items: piqa for hf:piqa, piqa.jsonl and piqa.jsonl.gz."""
    if str(source).startswith(HUB_PREFIX):
        return str(source).removeprefix(HUB_PREFIX)
    path = Path(source)
    return Path(path.stem).stem if path.suffix.lower() in (".gz", ".xz") else path.stem


def read_items(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSONL file; UserError names the line that is not a JSON object."""
    path = Path(source)
    try:
        with opened(path) as handle:  # not splitlines: a JSON text may contain U+2028
            lines = handle.read().removeprefix("\ufeff").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a .jsonl file with one item per line") from None
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{path} line {number}", _object(line, f"{path} line {number}")


def opened(path: Path) -> IO[str]:
    """A text file, plain or compressed as .gz or .xz, open for reading."""
    openers: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold a JSON object, not a {type(value).__name__}")
    return value
