"""Converts model directories between Hugging Face and mlx-lm, and makes copies with a scaled RoPE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError, one_line
from ..files import CONFIG, new_directory
from ..models import tokenizer
from ..models.directory import Checked, build, check_model_dir, resolve
from ..models.dtypes import FLOAT_NAMES, FLOATS, HALVES
from ..models.origin import origin_of, write_origin
from ..models.quantization import Scheme, dequantize, scheme_of
from ..models.save import (
    SHARD_BYTES,
    Tensor,
    lazy,
    link_model_files,
    model_directory,
    write_config,
)
from ..models.tokenizer_files import copy_tokenizer
from ..rope import PREFIX, difference, disagreement, family, is_wrapper, scale_rope, text_model
from .experts import unstack
from .linear_attention import as_transformers

Progress = Callable[[str], None]


def from_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Convert a local Hugging Face directory or hub repository to an mlx-lm directory; return its path.

    dtype is float32, float16 or bfloat16 (default: as stored). With `quantize`, linear and embedding layers become
    mlx's affine groups of q_group_size at q_bits; layers that are quantized already stay as they are. Both config
    generations are normalised; a tokenizer.model without a tokenizer.json gets one. Tensors are read and written one
    at a time.
    Raises UserError if the source is damaged or unsupported, or if mlx-lm would compute different logits.
    """
    directory = resolve(source)
    checked = check_model_dir(directory)
    config = dict(checked.config)
    if reason := disagreement(config):
        raise UserError(f"{directory / CONFIG}: {reason}")
    arrays = checked.arrays
    if dtype is not None:
        arrays = _cast(arrays, dtype)
        config["dtype"] = config["torch_dtype"] = dtype
    if quantize:
        arrays, settings = _quantize(checked, arrays, scheme_of({"bits": q_bits, "group_size": q_group_size}, "-q"))
        config["quantization"] = config["quantization_config"] = settings
    with model_directory(
        target,
        _clean(config),
        _tensors(arrays),
        overwrite=overwrite,
        sources=[directory],
        shard_bytes=shard_bytes,
        progress=progress,
    ) as output:
        _write_tokenizer(directory, output)
        write_origin(output, origin_of(directory))
    return Path(target)


def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Convert an mlx-lm directory to one that transformers' AutoModelForCausalLM loads; return its path.

    Quantized layers are dequantized: to `dtype`, or by default to the type of their scales. The config carries RoPE in
    both spellings. A multimodal config becomes that of its text model, which is all that mlx-lm keeps. Raises
    UserError if the source is damaged or if mlx-lm and transformers would disagree.
    """
    directory = resolve(source)
    checked = check_model_dir(directory)
    config = _clean(checked.config)
    if reason := disagreement(config):
        raise UserError(f"{directory / CONFIG}: {reason}")
    kind = family(config)
    if not kind.architecture:
        raise UserError(f"{directory}: transformers has no {config['model_type']} model that it could load")
    if progress and (note := difference(config)):
        progress(note)
    arrays = dequantized(checked, FLOATS.get(dtype or ""))
    if is_wrapper(config):  # mlx-lm's directories have no vision tower: what is left is a text model
        config = text_model(config)
        arrays = {name.removeprefix(PREFIX): arrays.pop(name) for name in list(arrays)}
    if kind.experts:
        arrays = unstack(arrays, kind.experts)
    if kind.pattern in ("interval", "conv"):
        arrays = as_transformers(arrays, kind.shifted)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    if dtype is not None:
        arrays = _cast(arrays, dtype)
    kinds = {FLOAT_NAMES[a.dtype] for a in arrays.values() if a.dtype in FLOAT_NAMES}
    if len(kinds) == 1:
        config["dtype"] = config["torch_dtype"] = kinds.pop()
    if progress and checked.quantized and config.get("dtype") in HALVES:
        progress(f"note: dequantized weights are rounded to {config['dtype']}; --dtype float32 keeps their values")
    if not config.get("architectures") or is_wrapper(checked.config):
        config["architectures"] = [kind.architecture]
    with model_directory(
        target,
        config,
        _tensors(arrays),
        framework="pt",
        overwrite=overwrite,
        sources=[directory],
        shard_bytes=shard_bytes,
        progress=progress,
    ) as output:
        _write_tokenizer(directory, output)
        write_origin(output, origin_of(directory))
    return Path(target)


def scale(
    source: str | Path,
    target: str | Path,
    *,
    method: str,
    factor: float,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a copy of a model directory with its RoPE scaled; return its path.

    Only the config is new. The weights are hard links, so that neither directory breaks when the other is moved or
    removed; they are copies if the file system cannot link. Raises UserError if the family does not honour the
    method.
    """
    directory = resolve(source)
    checked = check_model_dir(directory)
    try:
        config = scale_rope(_clean(checked.config), method, factor, beta_fast=beta_fast, beta_slow=beta_slow)
    except ValueError as error:
        raise UserError(one_line(error)) from None
    with new_directory(target, overwrite=overwrite, sources=[directory]) as output:
        link_model_files(directory, output, window=config["max_position_embeddings"])
        write_origin(output, origin_of(directory))
        write_config(output, config)
    return Path(target)


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the keys that name a folder or the model's own code."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")}


def _tensors(arrays: dict[str, mx.array]) -> Iterator[Tensor]:
    """The arrays as Tensors in order of name. `arrays` is emptied, so that each array is freed once it is written."""
    for name in sorted(arrays):
        yield lazy(name, arrays.pop(name))


def _cast(arrays: dict[str, mx.array], dtype: str) -> dict[str, mx.array]:
    """The arrays with floats cast, lazily. `arrays` is emptied, so that each source is freed once it is written."""
    if dtype not in FLOATS:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(FLOATS)}")
    result = {}
    for name in list(arrays):
        array = arrays.pop(name)
        result[name] = array.astype(FLOATS[dtype]) if mx.issubdtype(array.dtype, mx.floating) else array
    return result


def _quantize(
    checked: Checked, arrays: dict[str, mx.array], scheme: Scheme
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Quantize, lazily, the layers that mlx-lm would quantize; the arrays, and the settings for the config.

    Layers that are quantized already keep their scheme. UserError if no other layer is left.
    """
    settings: dict[str, Any] = {**scheme.settings()}
    for path, own in checked.quantized.items():
        if own != scheme:
            settings[path] = own.settings()
    model = build(checked.config, len(checked.stored), checked.directory)
    predicate = getattr(model, "quant_predicate", None)  # some families keep their routers at 8 bits
    count = 0
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if path in checked.quantized or not hasattr(module, "to_quantized") or name not in arrays:
            continue
        if arrays[name].shape[-1] % scheme.group_size:
            continue
        answer = predicate(path, module) if predicate else True
        if not answer:
            continue
        own = scheme_of(answer, path) if isinstance(answer, dict) else scheme
        if own is not scheme:
            settings[path] = own.settings()
        weight, scales, *biases = mx.quantize(arrays.pop(name), **own.settings())
        arrays.update({name: weight, f"{path}.scales": scales})
        arrays.update({f"{path}.biases": array for array in biases})
        count += 1
    if checked.quantized and not count:
        raise UserError(f"{checked.directory} is already quantized; convert the original")
    return arrays, settings


def quantized_bytes(directory: Path, bits: int, group_size: int, dtype: str | None = None) -> tuple[int, int]:
    """The bytes of the weights in a model directory, and those after `from_hf(quantize=True)`; nothing is computed."""
    checked = check_model_dir(directory)
    before = sum(array.nbytes for array in checked.arrays.values())
    scheme = scheme_of({"bits": bits, "group_size": group_size}, "-q")
    arrays = checked.arrays if dtype is None else _cast(checked.arrays, dtype)
    arrays, _ = _quantize(checked, arrays, scheme)
    return before, sum(array.nbytes for array in arrays.values())


def dequantized(checked: Checked, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """The arrays with quantized layers dequantized, lazily, to `dtype`.

    None: to the type of their scales, or without float scales to that of the other weights.
    """
    arrays = checked.arrays
    floats = {a.dtype for name, a in arrays.items() if mx.issubdtype(a.dtype, mx.floating)}
    other = floats.pop() if len(floats) == 1 else None
    for path, scheme in checked.quantized.items():
        weight = dequantize(path, arrays, scheme, dtype or (None if scheme.mode == "affine" else other))
        for leaf in ("weight", "scales", "biases"):
            arrays.pop(f"{path}.{leaf}", None)
        arrays[f"{path}.weight"] = weight
    return arrays


def _write_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files; rebuild the tokenizer if there is only a tokenizer.model."""
    copy_tokenizer(source, target)
    if not (source / "tokenizer.json").is_file() and (source / "tokenizer.model").is_file():
        tokenizer.write(target, tokenizer.from_sentencepiece(source / "tokenizer.model"))
