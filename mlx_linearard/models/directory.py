"""What input must get past before a byte of it is used: headers, names, shapes, numbers.

Nothing here unpickles, imports a model's own code or follows a name out of its directory. Everything that is
wrong ends in one UserError; where several tensors are wrong, all are named.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError, one_line
from ..files import CONFIG, WEIGHTS, WEIGHTS_INDEX, read_config, read_json
from ..rope import FAMILIES, family, normalise
from .dtypes import DTYPES
from .tokenizer import check_tokenizer

# What a hub repository is fetched for; weights in any other format are left where they are.
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]

MAX_HEADER = 100 << 20  # the limit of the safetensors library
NAMED = 20  # how many bad tensors a message names before it counts the rest
RECOMPUTED = "rotary_emb.inv_freq"  # stored by some old checkpoints, recomputed by every library
_UNTRUSTED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its type, shape, and where its bytes lie in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors and metadata of a safetensors file, checked against its length; UserError otherwise.

    As the format demands: types known, sizes matching shapes, and the bytes covered without gap or overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise UserError(f"{path} is damaged: its header of {length} bytes does not fit its {size}")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header is not JSON ({one_line(error)})") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is damaged: its __metadata__ is not a JSON object")
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors, metadata


def _entry(path: Path, name: str, value: Any, base: int) -> Stored:
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        start, end = offsets
        numbers = [*shape, start, end]
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path} is damaged: the entry of {name!r} is incomplete") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: {name} has type {dtype!r}; only {', '.join(DTYPES)} are read")
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 1 << 62 for n in numbers):
        raise UserError(f"{path} is damaged: the shape or offsets of {name!r} are not sizes")
    if end - start != math.prod(shape) * DTYPES[dtype].size or math.prod(shape) >= 1 << 62:
        raise UserError(f"{path} is damaged: {name!r} of shape {shape} cannot lie in [{start}, {end}]")
    if len(shape) > 8 or max(shape, default=0) >= 1 << 31:
        raise UserError(f"{path}: {name!r} has a shape that mlx cannot hold: {shape}")
    return Stored(path, dtype, tuple(shape), base + start, end - start)


def _check_coverage(path: Path, tensors: Mapping[str, Stored], base: int, size: int) -> None:
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start + tensor.nbytes > size:
            raise UserError(f"{path} is truncated: {name!r} ends beyond its {size} bytes; download it again")
        if tensor.start != position:
            what = "overlaps another tensor" if tensor.start < position else "leaves a gap before it"
            raise UserError(f"{path} is damaged: {name!r} {what}")
        position = tensor.start + tensor.nbytes
    if position != size:
        raise UserError(f"{path} is damaged: {size - position} bytes belong to no tensor")


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, by its index where it has one; none lies elsewhere."""
    index = directory / WEIGHTS_INDEX
    if (directory / WEIGHTS).is_file():
        if index.is_file():  # mlx-lm writes an index beside a single file too
            _indexed(directory, index)
        return [directory / WEIGHTS]
    if index.is_file():
        return sorted({directory / name for name in _indexed(directory, index).values()})
    found = sorted(directory.glob("model*.safetensors"))
    if found:
        return found
    if any(True for pattern in _UNTRUSTED for _ in directory.glob(pattern)):
        raise UserError(f"{directory} holds only pickled weights, which can run any code: convert them to safetensors")
    raise UserError(f"{directory} holds no model*.safetensors")


def _indexed(directory: Path, index: Path) -> dict[str, str]:
    """The index's weight map; every file named must be a plain name in the same directory."""
    value = read_json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for name in sorted({str(name) for name in weight_map.values()}):
        if not plain_name(name):
            raise UserError(f"{index} names {name!r}, which is not a file of its own directory")
        if not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a safetensors file")
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing although {index.name} names it; download it again")
    return {str(key): str(name) for key, name in weight_map.items()}


def plain_name(name: str) -> bool:
    """Whether `name` is a file name without any directory in it."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model directory by name; UserError where a header is bad or a name stands twice.

    Where there is an index, it must name the tensors that its shards hold, each in its shard.
    """
    tensors: dict[str, Stored] = {}
    for path in shards(directory):
        for name, tensor in read_header(path)[0].items():
            if name in tensors:
                raise UserError(f"{name} stands in {tensors[name].file.name} and again in {path}")
            tensors[name] = tensor
    index = directory / WEIGHTS_INDEX
    if index.is_file():
        claimed = _indexed(directory, index)
        wrong = [f"{name} is missing from {file}" for name, file in sorted(claimed.items()) if name not in tensors]
        wrong += [
            f"{name} is in {tensors[name].file.name}, not {file}"
            for name, file in sorted(claimed.items())
            if name in tensors and tensors[name].file.name != file
        ]
        wrong += [f"{name} is not in the index" for name in sorted(tensors.keys() - claimed.keys())]
        refuse(wrong, f"{index} and its shards disagree")
    return tensors


def load_lazily(tensors: Mapping[str, Stored]) -> dict[str, mx.array]:
    """mlx arrays of checked tensors; each is read from its file only when evaluated."""
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.file for tensor in tensors.values()}):
        try:
            held: Any = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be loaded: {one_line(error)}") from None
        arrays.update({name: held[name] for name, tensor in tensors.items() if tensor.file == path})
    return arrays


def check_config(directory: Path) -> dict[str, Any]:
    """The directory's config, normalised; UserError for what we do not convert or would run code for."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    config = read_config(directory)
    if config.get("model_file") is not None:
        raise UserError(f"{directory / CONFIG} asks to run {config['model_file']!r}; models run no code here")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES and not _in_mlx_lm(kind):
        raise UserError(f"{directory / CONFIG} has model_type {kind!r}, which this mlx-lm lacks: update mlx-lm")
    try:
        family(config)
        return normalise(config)
    except ValueError as error:
        raise UserError(f"{directory / CONFIG}: {one_line(error)}") from None


def _in_mlx_lm(kind: str) -> bool:
    from mlx_lm.utils import MODEL_REMAPPING

    return importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is not None


def build(config: Mapping[str, Any], tensors: int, where: Path) -> nn.Module:
    """The mlx-lm model of a config, nothing evaluated; UserError where the config does not describe one.

    tensors bounds the layers: a config that claims more layers than the weights have tensors is refused
    before anything is built.
    """
    from mlx_lm.utils import _get_classes

    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 28:
            raise UserError(f"{where}: {key} must be a positive integer, not {value!r}")
    if config["num_hidden_layers"] > tensors:
        raise UserError(f"{where}: {config['num_hidden_layers']} layers, but the weights have {tensors} tensors")
    try:
        model_class, args_class = _get_classes(dict(config))
        return model_class(args_class.from_dict(dict(config)))
    except Exception as error:  # whatever mlx-lm's constructors make of a bad value
        text = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where} does not describe a {config['model_type']} model ({text})") from None


def sanitize(model: nn.Module, arrays: dict[str, mx.array], where: Path) -> dict[str, mx.array]:
    """mlx-lm's own renaming of a checkpoint's tensors, lazily; UserError where it fails."""
    if not hasattr(model, "sanitize"):
        return arrays
    try:
        return dict(model.sanitize(dict(arrays)))
    except Exception as error:  # missing tensors surface here as KeyErrors in some families
        raise UserError(f"{where}: mlx-lm cannot read these weights ({type(error).__name__}: {error})") from None


def quantization_of(config: Mapping[str, Any], where: Path) -> dict[str, Any] | None:
    """mlx's quantization settings of a config, checked; None where it is not quantized."""
    settings = config.get("quantization")
    if settings is None:
        method = config.get("quantization_config")
        if isinstance(method, Mapping) and "quant_method" in method:
            raise UserError(f"{where} is quantized by {method['quant_method']!r}; convert an unquantized copy")
        settings = method
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise UserError(f"{where}: quantization must be a JSON object")
    bits, group, mode = settings.get("bits"), settings.get("group_size"), settings.get("mode", "affine")
    if mode != "affine" or bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
        raise UserError(f"{where}: quantization of {bits!r} bits, groups of {group!r}, mode {mode!r} is not read")
    return dict(settings)


def expected(
    model: nn.Module, config: Mapping[str, Any], arrays: Mapping[str, mx.array], where: Path
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parameters `model` wants, quantized where config and weights say so."""
    settings = quantization_of(config, where)
    if settings is not None:
        # The same rule by which mlx-lm rebuilds a quantized model.
        def quantized(path: str, module: nn.Module) -> bool | dict[str, Any]:
            own = settings.get(path)
            if isinstance(own, dict | bool):
                return own
            return hasattr(module, "to_quantized") and f"{path}.scales" in arrays

        try:
            nn.quantize(model, settings["group_size"], settings["bits"], class_predicate=quantized)
        except Exception as error:  # a width that is not a multiple of the group, a bad setting of one layer
            raise UserError(f"{where}: its quantization does not fit the model ({one_line(error)})") from None
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(value.shape) for name, value in parameters}


def check_tensors(wanted: Mapping[str, tuple[int, ...]], arrays: Mapping[str, mx.array], where: Path) -> None:
    """UserError that names every tensor that is missing, unexpected or of the wrong shape."""
    wrong = [f"missing {name}" for name in sorted(wanted.keys() - arrays.keys())]
    wrong += [f"unexpected {name}" for name in sorted(arrays.keys() - wanted.keys())]
    wrong += [
        f"{name} is {tuple(arrays[name].shape)}, not {wanted[name]}"
        for name in sorted(wanted.keys() & arrays.keys())
        if tuple(arrays[name].shape) != wanted[name]
    ]
    refuse(wrong, f"{where} does not fit its config")


def refuse(problems: list[str], what: str) -> None:
    """UserError that names the first problems and counts the rest; nothing where there are none."""
    if problems:
        rest = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise UserError(f"{what}: {'; '.join(problems[:NAMED])}{rest}")


def check_finite(arrays: Mapping[str, mx.array], where: Path) -> None:
    """UserError naming the weights that hold NaN or infinity; reads every weight, one at a time."""
    wrong = []
    for name, array in sorted(arrays.items()):
        if mx.issubdtype(array.dtype, mx.floating) and array.size and not mx.isfinite(array).all().item():
            wrong.append(name)
        mx.clear_cache()
    refuse(wrong, f"{where} holds weights that are not finite")


@dataclass(frozen=True)
class Checked:
    """A model directory that passed: its normalised config and its tensors, lazily, in mlx-lm's names."""

    directory: Path
    config: dict[str, Any]
    arrays: dict[str, mx.array]
    stored: dict[str, Stored]


def check_model_dir(path: str | Path, *, tokenizer: bool = True, finite: bool = False) -> Checked:
    """Check a Hugging Face or mlx-lm directory before anything loads it; UserError for whatever is wrong.

    Headers, index, config, architecture, names and shapes of all tensors, and the tokenizer; with `finite`
    the weights' values too, which reads them all.
    """
    directory = Path(path)
    config = check_config(directory)
    stored = stored_tensors(directory)
    where = directory / CONFIG
    if config.get("tie_word_embeddings") is None:  # the two libraries assume different things
        config["tie_word_embeddings"] = "lm_head.weight" not in stored
    model = build(config, len(stored), where)
    arrays = sanitize(model, load_lazily(stored), directory)
    arrays = {name: array for name, array in arrays.items() if not name.endswith(RECOMPUTED)}
    check_tensors(expected(model, config, arrays, where), arrays, directory)
    if tokenizer:
        check_tokenizer(directory)
    if finite:
        check_finite(arrays, directory)
    return Checked(directory, config, arrays, stored)


def resolve(source: str | Path) -> Path:
    """A local directory as it is, or a hub repository's snapshot; UserError where it is neither."""
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(f"{source} is not a model directory: give one, or a hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=PATTERNS))
    except Exception as error:  # no network, no such repository, a gated one: each library has its own
        raise UserError(
            f"{source} is neither a local directory nor a repository that the hub gives us "
            f"({type(error).__name__}): check the name and the connection"
        ) from None
