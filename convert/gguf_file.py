"""Reads a GGUF file: its metadata, and its tensors as float32.

mlx's own reader is not used: it casts every type it does not know to float16, and it trusts the header. The layout
is that of the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_line
from .gguf_blocks import BLOCKS
from .names import GGML_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NAME = 1024  # characters of a key or of a tensor; ggml allows 64 for a tensor
STEP = 1 << 20  # values that are dequantized in one step

# Metadata value types: number -> struct format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its ggml type, its shape (outermost axis first), and its first byte."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int


_Declared = tuple[str, int, tuple[int, ...], int]  # name, type number, shape, offset


class Gguf:
    """A GGUF file: `metadata` and `tensors` by name. A tensor's values are read on demand, by `read`.

    Raises UserError if the file cannot be read, is damaged or truncated, is one part of several, or holds tensors
    of a type that is not read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data = _map(self.path)
        try:
            cursor = _Cursor(self._data, self.path)
            self.metadata, declared = _header(cursor)
            _refuse_part(self.metadata, self.path)
            self.tensors = _entries(declared, cursor.position, self.metadata, len(self._data), self.path)
        except (ValueError, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.path} is a damaged GGUF file: {one_line(error)[:200]}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value: int, float, bool, str, an array of numbers, or a list; `default` if there is none."""
        return self.metadata.get(key, default)

    def read(self, name: str) -> np.ndarray:
        """The values of the tensor `name`, float32 in the tensor's shape."""
        entry = self.tensors[name]
        block = BLOCKS[entry.kind]
        count = math.prod(entry.shape) // block.size
        stored = np.frombuffer(self._data, dtype=block.layout, count=count, offset=entry.start)
        values = np.empty((count, block.size), np.float32)
        rows = STEP // block.size
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            values[part] = block.values(stored[part]).reshape(-1, block.size)
        return values.reshape(entry.shape)


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, mapped into memory."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise UserError(f"{path} is not a GGUF file: it has {size} bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def short(value: Any) -> str:
    """A metadata value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Cursor:
    """Reads little-endian values from bytes; UserError at their end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            raise UserError(f"{self.path} is truncated: its header needs more than its {len(self.data)} bytes")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def name(self, owner: str) -> str:
        """The name of a key or a tensor, short enough for a message."""
        name = self.string()
        if not name or len(name) > MAX_NAME:
            raise UserError(f"{self.path} is damaged: {owner} has a name of {len(name)} characters")
        return name

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 2:
            return self.array(depth)
        raise UserError(f"{self.path} is damaged: unknown metadata type {kind}")

    def array(self, depth: int) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        layout = np.dtype(f"<{_SCALARS[kind]}") if kind in _SCALARS else None
        if count * (layout.itemsize if layout else 1) > len(self.data):
            raise UserError(f"{self.path} is truncated: an array of {count} values does not fit")
        if layout:
            return np.frombuffer(self.take(count * layout.itemsize), dtype=layout)
        return [self.value(kind, depth + 1) for _ in range(count)]


def _header(cursor: _Cursor) -> tuple[dict[str, Any], list[_Declared]]:
    """The metadata, and the tensors as the header declares them."""
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise UserError(f"{path} is not a GGUF file")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise UserError(f"{path} is GGUF version {version}: only versions 2 and 3 are read")
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensor_count, value_count) > len(cursor.data):
        raise UserError(f"{path} is damaged: its header counts {tensor_count} tensors and {value_count} values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.name("a metadata value")
        if key in metadata:
            raise UserError(f"{path} is damaged: it holds {key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    declared = []
    for _ in range(tensor_count):
        name, dims = cursor.name("a tensor"), cursor.scalar("I")
        if not 1 <= dims <= MAX_DIMS:
            raise UserError(f"{path} is damaged: tensor {name!r} has {dims} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        declared.append((name, cursor.scalar("I"), shape, cursor.scalar("Q")))
    return metadata, declared


def _refuse_part(metadata: dict[str, Any], path: Path) -> None:
    """UserError if the file is one part of a model that was split over several files."""
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count > 1:
        raise UserError(
            f"{path} is one of {short(count)} parts of a split model (split.count): "
            "join the parts first, with llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )


def _entries(
    declared: list[_Declared], header_end: int, metadata: dict[str, Any], size: int, path: Path
) -> dict[str, Entry]:
    """Each tensor by name; UserError for a type that is not read and for bytes outside the file."""
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise UserError(f"{path} is damaged: alignment {short(alignment)}")
    base = -(-header_end // alignment) * alignment
    unread = sorted({GGML_TYPES.get(kind, str(kind)) for _, kind, _, _ in declared} - set(BLOCKS))
    if unread:
        raise UserError(f"{path} holds {', '.join(unread[:20])} tensors; only {', '.join(BLOCKS)} are read")
    tensors: dict[str, Entry] = {}
    for name, number, shape, offset in declared:
        kind = GGML_TYPES[number]
        block = BLOCKS[kind]
        if 0 in shape or shape[-1] % block.size or name in tensors:
            raise UserError(f"{path} is damaged: tensor {name!r} of shape {shape}")
        if base + offset + math.prod(shape) // block.size * block.layout.itemsize > size:
            raise UserError(f"{path} is truncated: tensor {name!r} ends beyond its {size} bytes")
        tensors[name] = Entry(name, kind, shape, base + offset)
    return tensors
