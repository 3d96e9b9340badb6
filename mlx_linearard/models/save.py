"""Writes a model directory: shards, index, config, tokenizer files.

Tensors are written one at a time, so the memory needed is that of the largest tensor and not of a shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..files import CONFIG, WEIGHTS, WEIGHTS_INDEX, new_directory, read_config
from ..rope import written
from .directory import copied_head
from .dtypes import DTYPE_NAMES
from .tokenizer_files import copy_tokenizer
from .weights import is_finite, load_lazily, stored_tensors, weight_files

SHARD_BYTES = 5 << 30  # the shard size of mlx-lm


@dataclass(frozen=True)
class Tensor:
    """A tensor that will be written: its name, shape and type, and a function that makes the array."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype
    make: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        size = self.dtype.size
        for extent in self.shape:
            size *= extent
        return size


def lazy(name: str, array: mx.array) -> Tensor:
    """A Tensor of an mlx array, which is not evaluated before it is written."""
    return Tensor(name, tuple(array.shape), array.dtype, lambda: array)


@contextmanager
def model_directory(
    target: str | Path,
    config: Mapping[str, Any],
    tensors: Iterable[Tensor],
    *,
    overwrite: bool = False,
    sources: Iterable[str | Path] = (),
    shard_bytes: int = SHARD_BYTES,
    framework: str = "mlx",
    progress: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """Write config and weights, then yield the directory for the tokenizer; complete or not at all.

    `overwrite` and `sources` mean the same as in `new_directory`. Raises UserError if the target exists, the disk is
    full, or a weight is not finite.
    """
    with new_directory(target, overwrite=overwrite, sources=sources) as directory:
        write_weights(directory, tensors, shard_bytes=shard_bytes, framework=framework, progress=progress)
        write_config(directory, config)
        yield directory


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json with sorted keys, as mlx-lm and transformers sort them; without NaN or Infinity."""
    text = json.dumps(written(config), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def write_weights(
    directory: Path,
    tensors: Iterable[Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    framework: str = "mlx",
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write model.safetensors, or numbered shards and their index if the weights exceed `shard_bytes`."""
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(count):
        name = WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        shard = shards[number]
        total += sum(tensor.nbytes for tensor in shard)
        weight_map.update({tensor.name: name for tensor in shard})
        write_safetensors(directory / name, _drain(shard), {"format": framework})
        if progress:
            progress(f"wrote {name} ({number + 1} of {count})")
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor; UserError if a weight is not finite.

    The wide types come first, so that every tensor is aligned to its own type.
    """
    pending = sorted(tensors, key=lambda tensor: (-tensor.dtype.size, tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "mlx"})}
    offset = 0
    for tensor in pending:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    pending.reverse()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        while pending:
            _write_tensor(file, pending.pop())


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    array = tensor.make()
    if tuple(array.shape) != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"{tensor.name} became {array.shape} {array.dtype}")
    if not is_finite(array):
        raise UserError(f"{tensor.name} holds weights that are not finite: the source is damaged")
    file.write(raw(array).data)
    del array
    mx.clear_cache()


def raw(array: mx.array) -> np.ndarray:
    """The bytes of an array as a contiguous numpy array (bfloat16 as its 16 bits)."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.ascontiguousarray(np.array(array, copy=False))


def _drain(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors without keeping them, so that each is freed once it is written."""
    while tensors:
        yield tensors.pop()


def _shards(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def link(source: Path, target: Path) -> None:
    """Hard-link a file (the target, if it is a symbolic link), or copy it if the file system cannot link."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def link_model_files(source: Path, target: Path, *, window: int | None = None) -> None:
    """Give `target` the weights, index, tokenizer and generation config of `source`; weights are linked.

    `window` is the window of the model in `target`, if it is another one (see `copy_tokenizer`).

    If the weights repeat the embedding as an output head, which mlx-lm refuses for some families, they are written
    again without this head.
    """
    stored = stored_tensors(source)
    if unneeded := copied_head(read_config(source), stored):
        arrays = load_lazily({name: tensor for name, tensor in stored.items() if name not in unneeded})
        write_weights(target, (lazy(name, array) for name, array in sorted(arrays.items())))
    else:
        for path in weight_files(source):
            link(path, target / path.name)
        if (source / WEIGHTS_INDEX).is_file():
            shutil.copyfile(source / WEIGHTS_INDEX, target / WEIGHTS_INDEX)
    copy_tokenizer(source, target, window=window)
