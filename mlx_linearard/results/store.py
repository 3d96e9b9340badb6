"""The files of results: results.json, read, merged and replaced in one place, and the item logs of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import disk_errors, new_file, read_json, write_json
from .fields import Field
from .rows import Results

Record = dict[str, Any]  # one measured item: `id`, `samples` (metric -> number), and what a reader may want to see


def read_results(path: Path) -> Results:
    """The content of results.json; empty if there is no such file.

    Raises UserError if the file cannot be read or a value in it is not what belongs there.
    """
    return Results.from_json(read_json(path), Field(path)) if path.exists() else Results()


def write_results(path: Path, results: Results) -> Results:
    """Replace results.json, completely or not at all; returns `results`.

    Raises UserError, before anything is written, if a number is not finite.
    """
    value = results.as_json()
    Results.from_json(json.loads(json.dumps(value)), Field(path))
    write_json(path, value)
    return results


def update_results(path: Path, change: Callable[[Results], Results]) -> Results:
    """Read results.json, apply `change` to its content, and replace the file; returns the new content."""
    return write_results(path, change(read_results(path)))


def merge_results(path: Path, new: Results) -> Results:
    """Put `new` into results.json; everything else in the file stays. Returns the new content."""
    return update_results(path, lambda old: old.merged(new))


class ItemLog:
    """The records of one suite of one model, in a JSONL file: an interrupted evaluation reads them back."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def beside(cls, results: Path, label: str, suite: str, key: str) -> ItemLog:
        """The log for the row `label` of results.json; `key` keeps other models and options apart."""
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{label}-{suite}")[:80]
        return cls.named(results, f"{plain}-{key}.jsonl")

    @classmethod
    def named(cls, results: Path, name: str) -> ItemLog:
        """The log of that file name among the logs of a results.json."""
        return cls(results.with_name(f"{results.stem}.items") / Path(name).name)

    def read(self) -> dict[str, Record]:
        """Records by item. A line that was cut while it was written is removed from the file."""
        if not self.path.exists():
            return {}
        records: list[Record] = []
        with disk_errors(self.path):
            *lines, cut = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and "id" in record and isinstance(record.get("samples"), dict):
                records.append(record)
        if cut or len(records) < len(lines):
            with new_file(self.path) as file:
                file.write_text("".join(_line(record) for record in records), encoding="utf-8")
        return {record["id"]: record for record in records}

    def append(self, record: Record) -> None:
        """Add a record. The record is in the file when this returns."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
