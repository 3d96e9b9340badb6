"""Files of text and of rows. To add a form, give its suffix a reader in `read_file`."""

from __future__ import annotations

import gzip
import importlib
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import UserError, one_line
from ..files import check_file, parse_json, reading
from .rows import FIELDS, ROW_FORMS, Document, documents_from

TEXTS = (".txt", ".md")
ROWS = (".jsonl", ".json", ".parquet")
FORMS = (
    f"text as .txt or .md; or rows with {ROW_FORMS} as .jsonl, .json or .parquet; all but .parquet also as .gz or .xz"
)
PIECE = 1 << 16  # characters that are read at once
MAX_LINE = 1 << 26  # characters of a line of .jsonl
MAX_JSON = 1 << 28  # characters of a .json
_BATCH = 64  # rows of a .parquet that are read at once
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}

PlacedRows = Iterator[tuple[str, Any]]  # ("FILE line N", the row)


def form_of(path: Path) -> str:
    """The suffix that tells the form of a file: that before .gz or .xz, if the form can be compressed."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in _OPENERS and inner != ".parquet" else suffix


def suffixes(form: str) -> list[str]:
    """The suffixes of files of a form, compressed or not."""
    return [form] if form == ".parquet" else [form, *(form + packed for packed in _OPENERS)]


def read_file(path: Path) -> Iterator[Document]:
    """The documents of a file; UserError if its form is not supported, or if it is empty, binary or damaged."""
    form = form_of(path)
    if form not in TEXTS + ROWS:
        raise UserError(f"{path} is not a supported form of text: give {FORMS}")
    check_file(path)
    if form in TEXTS:
        yield _pieces(path)
    else:
        reader = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[form]
        yield from documents_from(reader(path), path)


def open_text(path: Path) -> IO[str]:
    """A UTF-8 file, plain or compressed as .gz or .xz, open for reading without its byte order mark."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    handle: IO[str] = opener(path, "rt", encoding="utf-8-sig")
    return handle


def _pieces(path: Path) -> Iterator[str]:
    """The pieces of a text file."""
    empty = True
    with reading(path), open_text(path) as handle:
        while piece := handle.read(PIECE):
            if "\0" in piece:
                raise UserError(f"{path} is binary, not text")
            empty = empty and piece.isspace()
            yield piece
    if empty:
        raise UserError(f"{path} is empty: give a file with text")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; `place` is "FILE line N". UserError if the file is damaged."""
    with reading(path), open_text(path) as handle:
        number = 0
        while line := handle.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path} line {number} has more than {MAX_LINE} characters: split it, or give a .txt")
            if line.strip():
                yield f"{path} line {number}", line


def _json_lines(path: Path) -> PlacedRows:
    for place, line in read_lines(path):
        yield place, parse_json(line, place, replace_surrogates=True)


def _json(path: Path) -> PlacedRows:
    """The rows of a list, or of lines: both are called .json."""
    with reading(path), open_text(path) as handle:
        begin = handle.read(PIECE)
        if not begin.lstrip().startswith("["):
            handle.close()
            yield from _json_lines(path)
            return
        text = begin + handle.read(MAX_JSON)
    if len(text) > MAX_JSON:
        raise UserError(f"{path} has more than {MAX_JSON} characters: make it a .jsonl, which is read line by line")
    for number, row in enumerate(parse_json(text, str(path), replace_surrogates=True), start=1):
        yield f"{path} row {number}", row


def _parquet(path: Path) -> PlacedRows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path} needs the extra `datasets`: pip install 'mlx-linearard[datasets]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if wanted := [name for name in names if name in FIELDS]:
                for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path} row {number}", row
                return
    except Exception as error:  # pyarrow raises errors of many types for a damaged file
        raise UserError(f"{path} is damaged, or not a parquet file: {one_line(error)[:200]}") from None
    raise UserError(f"{path} has no column `text`, but {', '.join(names)[:200]}: rows have {ROW_FORMS}")
