"""Items of multiple choice, last words and questions: from JSONL files, named sets of the hub, or Python objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data import HUB_PREFIX, read_lines
from ...errors import UserError
from ...files import check_file, parse_json
from . import hub

Items = str | Path | Iterable[Mapping[str, Any]]
Check = Callable[[Mapping[str, Any], str], dict[str, Any]]  # (item, its place) -> the checked item


def checked_items(source: Items, check: Check, limit: int | None = None) -> list[dict[str, Any]]:
    """At most `limit` checked items of a JSONL file, of a named set (hf:NAME), or of Python objects.

    Raises UserError if there are none, or if one is not valid.
    """
    if not isinstance(source, str | Path):
        placed = [(f"item {number}", dict(item)) for number, item in enumerate(itertools.islice(source, limit))]
    elif str(source).startswith(HUB_PREFIX):
        rows = hub.load_set(str(source).removeprefix(HUB_PREFIX), limit)
        placed = [(f"{source} item {number}", row) for number, row in enumerate(rows)]
    else:
        placed = list(itertools.islice(read_items(source), limit))
    if not placed:
        raise UserError("there are no items: give at least one")
    return [check(item, place) for place, item in placed]


def name_of(source: str | Path) -> str:
    """The name of a set of items: piqa for hf:piqa, piqa.jsonl and piqa.jsonl.gz."""
    if str(source).startswith(HUB_PREFIX):
        return str(source).removeprefix(HUB_PREFIX)
    path = Path(source)
    return Path(path.stem).stem if path.suffix.lower() in (".gz", ".xz") else path.stem


def read_items(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSONL file, plain or compressed; a lone surrogate becomes U+FFFD.

    Raises UserError that names the line that is not a JSON object.
    """
    path = check_file(source)
    empty = True
    for place, line in read_lines(path):
        value = parse_json(line, place, replace_surrogates=True)
        if not isinstance(value, dict):
            raise UserError(f"{place} must hold a JSON object, not a {type(value).__name__}")
        empty = False
        yield place, value
    if empty:
        raise UserError(f"{path} is empty")
