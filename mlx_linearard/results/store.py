"""What an evaluation has measured: a line for each item as it is done, and results.json, merged and never lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import disk_errors, new_file, read_json, write_json

COMPARISONS = "comparisons"
NOT_MODELS = (COMPARISONS, "export", "run")  # the keys of results.json that are no model's row


class ItemLog:
    """The records of one suite of one model, in a JSONL file: an interrupted evaluation reads them back."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def beside(cls, results: Path, label: str, suite: str, key: str) -> ItemLog:
        """The log for results.json's row `label`, named so that other models or options have another."""
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{label}-{suite}")[:80]
        return cls.named(results, f"{plain}-{key}.jsonl")

    @classmethod
    def named(cls, results: Path, name: str) -> ItemLog:
        """The log of that file name among those of a results.json."""
        return cls(results.with_name(f"{results.stem}.items") / Path(name).name)

    def read(self) -> dict[str, Record]:
        """Records by item; a line that was cut while it was written is dropped from the file too."""
        if not self.path.exists():
            return {}
        whole: list[Record] = []
        with disk_errors(self.path):
            *lines, cut = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and "id" in record and isinstance(record.get("samples"), dict):
                whole.append(record)
        if cut or len(whole) < len(lines):
            with new_file(self.path) as file:
                file.write_text("".join(_line(record) for record in whole), encoding="utf-8")
        return {record["id"]: record for record in whole}

    def append(self, record: Record) -> None:
        """Add a record; it is in the file when this returns."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_results(path: Path) -> dict[str, Any]:
    """results.json as it stands, {} where there is none; UserError where it is not an object."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}; move it away")
    return value


def merge_results(path: Path, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Put `parts` into results.json, whole or not at all; everything else in it stays. Returns the result."""
    merged = merged_dict(read_results(path), parts)
    write_json(path, merged)
    return merged


def merged_dict(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with `new` in it: a suite's entry (it has `metrics`) is replaced whole, other objects are merged."""
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged_dict(result[key], value) if both and "metrics" not in value else value
    return result


Record = dict[str, Any]  # one measured item: `id`, `samples` (metric -> number), and what else a reader may want
