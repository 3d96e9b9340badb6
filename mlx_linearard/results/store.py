"""The files of results: results.json, read, merged and replaced in one place, and the item logs of an evaluation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import disk_errors, locked, read_json, reading, write_json, write_text
from .fields import Field, exists
from .rows import Results

LOCK_SECONDS = 60.0  # how long a process waits for others that change the same results

Record = dict[str, Any]  # one measured item: `id`, `samples` (metric -> number), and details for the reader


def read_results(path: Path) -> Results:
    """The content of results.json; empty if there is no such file.

    Raises UserError if the file cannot be read, a value in it is not valid, or it is another JSON file.
    """
    if not exists(path):
        return Results()
    results = Results.from_json(read_json(path), Field(path))
    if results.is_foreign():
        raise UserError(f"{path} holds no results, but something else: choose another file")
    return results


def write_results(path: Path, results: Results) -> Results:
    """Replace results.json, completely or not at all; returns `results`.

    Raises UserError, before anything is written, if a number is not finite or another process keeps the file locked.
    """
    with locked(path, wait=LOCK_SECONDS):
        return _replace(path, results)


def _replace(path: Path, results: Results) -> Results:
    value = results.as_json()
    Results.from_json(json.loads(json.dumps(value)), Field(path))
    write_json(path, value)
    return results


def update_results(path: Path, change: Callable[[Results], Results]) -> Results:
    """Read results.json, apply `change` to its content, and replace the file; returns the new content.

    Other processes that do the same wait meanwhile, so no change is lost.
    """
    with locked(path, wait=LOCK_SECONDS):
        return _replace(path, change(read_results(path)))


class ItemLog:
    """The records of one suite of one model, in a JSONL file: an interrupted evaluation reads them back.

    Any process may read a log. The process that appends to it holds it (see `held`).
    """

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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the log for appending while the block runs, and remove damaged lines from it.

        Raises UserError if another process holds it.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path):
                text, records = self._text(), self.read()
                undamaged = "".join(map(_line, records.values()))
                if text != undamaged:
                    write_text(self.path, undamaged)
                yield
        finally:
            with contextlib.suppress(OSError):
                if not self.path.stat().st_size:  # nothing could be written
                    self.path.unlink()
            with contextlib.suppress(OSError):  # it holds other logs
                self.path.parent.rmdir()

    def read(self) -> dict[str, Record]:
        """Records by item, without lines that were damaged or cut while they were written."""
        return valid_records(map(_parsed, self._text().split("\n")))

    def elsewhere(self) -> dict[str, Record]:
        """Records by item of logs with the same key: of other results files in the folder, and under other labels."""
        found: dict[str, Record] = {}
        key = self.path.stem.rpartition("-")[2]
        for path in sorted(self.path.parent.parent.glob(f"*.items/*-{key}.jsonl")):
            if path != self.path:
                with contextlib.suppress(UserError):  # one that cannot be read is of no use
                    found |= ItemLog(path).read()
        return found

    def _text(self) -> str:
        with reading(self.path):
            return self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""

    def append(self, record: Record) -> None:
        """Add a record. The record is in the file when this returns."""
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parsed(line: str) -> Any:
    """The value of a line of a log; None if the line is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def valid_records(values: Iterable[Any]) -> dict[str, Record]:
    """The records among some values, by item."""
    return {value["id"]: value for value in values if _is_record(value)}


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        return False
    samples = value.get("samples")
    return isinstance(samples, dict) and all(
        isinstance(number, int | float) and math.isfinite(number) for number in samples.values()
    )
