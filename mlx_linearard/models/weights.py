"""The weights of a model directory: the files that hold them, their checked headers, and lazy arrays.

Nothing here unpickles a file or follows a name out of the directory. If several tensors are wrong, the error names
them all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line
from ..files import WEIGHTS, WEIGHTS_INDEX, check_file, read_config, read_object, reading
from .dtypes import DTYPES

NAMED = 20  # bad tensors that a message names before it counts the rest
PIECE = 1 << 18  # bytes or numbers that are examined at once

LOADED_BY_MLX_LM = "model*.safetensors"  # mlx-lm loads every file of this name
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its type, its shape, and the place of its bytes in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


# -- which files --


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    These are the files that the index names; without an index model.safetensors; without either the numbered
    shards. UserError if one is missing, or if there is any other model*.safetensors, because mlx-lm would load it
    too.
    """
    with reading(directory):
        names = sorted(path.name for path in directory.iterdir())
    if WEIGHTS_INDEX in names:
        chosen = sorted(set(read_index(directory).values()))
    elif WEIGHTS in names:
        chosen = [WEIGHTS]
    else:
        chosen = _numbered(directory, names)
    others = [name for name in names if fnmatchcase(name, LOADED_BY_MLX_LM) and name not in chosen]
    if others:
        raise UserError(
            f"{directory} holds {others[0]} beside its weights in {chosen[0]}, and mlx-lm would load both: "
            f"move {others[0]} elsewhere"
        )
    return [directory / name for name in chosen]


def _numbered(directory: Path, names: list[str]) -> list[str]:
    """The complete set of numbered shards; UserError if there is none."""
    shards = {name: match for name in names if (match := _NUMBERED.fullmatch(name))}
    if not shards:
        if any(fnmatchcase(name, pattern) for name in names for pattern in _PICKLED):
            raise UserError(
                f"{directory} holds only pickled weights, which can run any code: convert them to safetensors"
            )
        raise UserError(f"{directory} holds no weights: it needs {WEIGHTS}, or numbered shards")
    count = int(next(iter(shards.values()))[2])
    wanted = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, min(count, 99_999) + 1)]
    missing = [name for name in wanted if name not in shards]
    if missing:
        raise UserError(f"{directory / missing[0]} is missing beside the other shards; download it again")
    return wanted


def read_index(directory: Path) -> dict[str, str]:
    """The index's file name of each tensor; UserError for a name that is not a safetensors file of the directory."""
    path = directory / WEIGHTS_INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map")
    for name in sorted({str(name) for name in weight_map.values()}):
        if not plain_name(name):
            raise UserError(f"{path} names {name!r}, which is not a file of its own directory")
        if not name.endswith(".safetensors"):
            raise UserError(f"{path} names {name!r}, which is not a safetensors file")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing although {path.name} names it; download it again")
        if not fnmatchcase(name, LOADED_BY_MLX_LM):
            raise UserError(f"{path} names {name!r}, which mlx-lm does not load: it loads {LOADED_BY_MLX_LM}")
    return {str(key): str(name) for key, name in weight_map.items()}


def plain_name(name: str) -> bool:
    """Whether `name` is a file name without any directory in it."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


# -- headers --


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a safetensors file; UserError if the file is damaged.

    The safetensors library checks the header against the file: known types, sizes that match shapes, and bytes
    covered without gap or overlap.
    """
    check_file(path)
    with reading(path), path.open("rb") as stream:  # safe_open calls every failure a missing file
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            reason = one_line(error).removeprefix("Error while deserializing header: ")[:200]
            raise UserError(f"{path} is damaged or truncated: {reason}; download it again") from None
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: _stored(path, name, value, 8 + length) for name, value in header.items()}, metadata


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    """A header's entry; UserError for a type or shape that mlx cannot hold."""
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name} has type {dtype!r}; only {', '.join(DTYPES)} are read")
    if len(shape) > 8 or max(shape, default=0) >= 1 << 31 or math.prod(shape) >= 1 << 62:
        raise UserError(f"{path}: {name!r} has a shape that mlx cannot hold: {shape}")
    return Stored(name, path, dtype, tuple(shape), base + start, end - start)


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory by name; UserError if a header is bad or two files hold the same name.

    If there is an index, it must name the tensors that its shards hold, each in its shard.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(directory):
        for name, tensor in read_header(path)[0].items():
            if name in tensors:
                raise UserError(f"{name} is in {tensors[name].file.name} and again in {path}")
            tensors[name] = tensor
    if (directory / WEIGHTS_INDEX).is_file():
        _compare_index(directory, tensors)
    return tensors


def _compare_index(directory: Path, tensors: Mapping[str, Stored]) -> None:
    claimed = read_index(directory)
    wrong = [f"{name} is missing from {file}" for name, file in sorted(claimed.items()) if name not in tensors]
    wrong += [
        f"{name} is in {tensors[name].file.name}, not {file}"
        for name, file in sorted(claimed.items())
        if name in tensors and tensors[name].file.name != file
    ]
    wrong += [f"{name} is not in the index" for name in sorted(tensors.keys() - claimed.keys())]
    refuse(wrong, f"{directory / WEIGHTS_INDEX} and its shards disagree")


# -- arrays --


def load_lazily(tensors: Mapping[str, Stored]) -> dict[str, mx.array]:
    """mlx arrays of checked tensors; each is read from its file only when it is evaluated."""
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.file for tensor in tensors.values()}):
        try:
            loaded: Any = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be loaded: {one_line(error)}") from None
        arrays.update({name: loaded[name] for name, tensor in tensors.items() if tensor.file == path})
    return arrays


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors of the same shape hold the same numbers, in the same or in different types."""
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        left, right = (load_lazily({t.name: t})[t.name].astype(mx.float32) for t in (one, other))
        return bool(mx.array_equal(left, right).item())
    with reading(one.file), one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        sizes = [min(PIECE, one.nbytes - start) for start in range(0, one.nbytes, PIECE)]
        return all(first.read(size) == second.read(size) for size in sizes)


def refuse(problems: list[str], what: str) -> None:
    """UserError that names the first problems and counts the rest; nothing if there are no problems."""
    if problems:
        rest = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{what}: {'; '.join(problems[:NAMED])}{rest}")


def check_finite(arrays: Mapping[str, mx.array], where: Path) -> None:
    """UserError that names the weights that hold NaN or infinity; reads every weight, one at a time."""
    wrong = []
    for name, array in sorted(arrays.items()):
        if not is_finite(array):
            wrong.append(name)
        mx.clear_cache()
    refuse(wrong, f"{where} holds weights that are not finite")


def is_finite(array: mx.array) -> bool:
    """Whether an array of any type holds neither NaN nor infinity; with little memory beyond the array."""
    if not mx.issubdtype(array.dtype, mx.floating) or not array.size:
        return True
    flat = array.reshape(-1)
    return all(mx.isfinite(flat[i : i + PIECE]).all().item() for i in range(0, flat.size, PIECE))


# -- identity --

EDGE = 1 << 20  # bytes at each end of a file that identify its content


def hash_of_model(directory: Path) -> str:
    """A short hash of a model: its config, and of each weight file the length and the first and last MiB."""
    digest = hashlib.sha256(json.dumps(read_config(directory), sort_keys=True).encode())
    for weights in weight_files(directory):
        with reading(weights), weights.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{weights.name}:{size}:".encode())
            file.seek(0)
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:16]
