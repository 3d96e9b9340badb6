"""Converts a model directory to a GGUF file that llama.cpp, Ollama and LM Studio read, with its RoPE scaling.

The metadata keys and the order of rows are those of llama.cpp's convert_hf_to_gguf.py; the file itself is written by
the `gguf` package, one tensor at a time. What was written is read back by this package's own reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..files import new_file, refuse_existing
from ..models.directory import Checked, check_model_dir, resolve
from ..models.origin import Origin, origin_of
from ..models.save import raw
from ..models.weights import is_finite
from ..rope import disagreement, inverse_frequencies, rotary_dims
from . import names
from .gguf import config_of
from .gguf_file import Gguf
from .gguf_vocab import metadata_of
from .hf import dequantized

# Families whose architecture in llama.cpp computes the same; `llama` rotates neighbouring pairs, the others halves.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type, llama_ftype of llama.h
_Q8_GROUP = 32
_NATIVE = {"qwen3": ("attn_q_norm", "attn_k_norm")}


@dataclass(frozen=True)
class _Planned:
    """One tensor to write: its name and shape in the file, its type, and a function that makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]


def to_gguf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the model directory `source` as the GGUF file `target`; return its path.

    dtype: float32, float16, bfloat16 or q8_0 (8 bits, one scale for 32 weights) for the matrices; by default as they
    are stored. Vectors are float32, as llama.cpp demands. Quantized layers are dequantized first.
    Raises UserError if the family, its scaling or its tokenizer is not written to GGUF.
    """
    gguf = _package()
    target = Path(target)
    if target.suffix != ".gguf":
        raise UserError(f"{target} must end in .gguf: llama.cpp reads no other name")
    refuse_existing(target)
    directory = resolve(source)
    checked = check_model_dir(directory)
    architecture = check_family(checked.config, directory)
    config = checked.config
    metadata = metadata_of(directory, config)
    planned = _plan(checked, architecture, _kind(checked, dtype))
    with new_file(target) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _write_general(writer, _FILE_TYPES[_most(planned)], origin_of(directory))
            _write_model(writer, config, len(planned))
            for key, value in metadata.items():
                _write_key(writer, gguf, key, value)
            _write_tensors(writer, gguf, planned)
        finally:
            writer.close()
        if architecture == "llama":
            _check(temporary, target, config)
    if progress:
        progress(f"wrote {len(planned)} tensors to {target}")
    return target


def check_family(config: Mapping[str, Any], where: Path) -> str:
    """llama.cpp's architecture for a config; UserError if the family or its scaling is not written."""
    name = str(config.get("model_type"))
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where}: {name} is not written to GGUF, only {', '.join(ARCHITECTURES)} are; "
            "llama.cpp's convert_hf_to_gguf.py may read an --format hf export"
        )
    if reason := disagreement(config):
        raise UserError(f"{where}: {reason}")
    kind = _scaling(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3") or (kind == "llama3" and ARCHITECTURES[name] != "llama"):
        raise UserError(f"{where}: llama.cpp's {ARCHITECTURES[name]} does not read {kind} scaling")
    extra = sorted(_scaling(config).keys() & {"attention_factor", "mscale", "mscale_all_dim", "truncate"})
    if extra:
        raise UserError(f"{where}: llama.cpp does not compute {', '.join(extra)} of its RoPE scaling")
    if rotary_dims(config) != _head_dim(config):
        raise UserError(f"{where} rotates a part of each head only, which is not written to GGUF")
    return ARCHITECTURES[name]


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the gguf package: pip install 'mlx-linearard[gguf]'") from None
    return gguf


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or {})


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


# -- the metadata --


def _write_general(writer: Any, file_type: int, origin: Origin) -> None:
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    if origin.base_model:
        organization, name = origin.base_model.split("/")
        writer.add_name(name)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{origin.base_model}")
    for key, add in (
        ("license", writer.add_license),
        ("license_name", writer.add_license_name),
        ("license_link", writer.add_license_link),
    ):
        if key in origin.entries:
            add(origin.entries[key])
    if languages := origin.entries.get("language"):
        writer.add_languages([languages] if isinstance(languages, str) else list(languages))


def _write_model(writer: Any, config: Mapping[str, Any], tensors: int) -> None:
    """The sizes of the model, and its RoPE as llama.cpp reads it."""
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(rotary_dims(config))
    writer.add_rope_freq_base(config["rope_theta"])
    scaling = _scaling(config)
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32.0))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1.0))


def _write_key(writer: Any, gguf: Any, key: str, value: Any) -> None:
    """One key of the tokenizer's metadata, with GGUF's type for it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)


def _check(path: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Read the file back: its config must rotate as the source's does, to the precision of float32."""
    found = config_of(Gguf(path))
    ours, theirs = inverse_frequencies(config), inverse_frequencies(found)
    same = all(np.allclose(ours[kind], theirs[kind], rtol=1e-6) for kind in ours)
    if not same or found["max_position_embeddings"] != config["max_position_embeddings"]:
        raise UserError(f"{target}: the RoPE scaling cannot be written to GGUF so that it reads back the same")


# -- the weights --


def _kind(checked: Checked, dtype: str | None) -> str:
    """The type of the file's matrices: `dtype`, else as most of the weights are stored."""
    if dtype is not None:
        if dtype not in TYPES:
            raise UserError(f"--dtype {dtype}: choose one of {', '.join(TYPES)}")
        return TYPES[dtype]
    floats = {array.dtype for array in checked.arrays.values() if mx.issubdtype(array.dtype, mx.floating)}
    return "F32" if mx.float32 in floats and len(floats) == 1 else "BF16" if mx.bfloat16 in floats else "F16"


def _plan(checked: Checked, architecture: str, kind: str) -> list[_Planned]:
    """Every tensor of the file, with llama's rows of q and k in the order that its rotation expects."""
    config, arrays = checked.config, dequantized(checked)
    heads, unknown, planned = {}, [], []
    if architecture == "llama":
        many = config["num_attention_heads"]
        heads = {"attn_q": many, "attn_k": config.get("num_key_value_heads") or many}
    for name in sorted(arrays):
        theirs = names.to_gguf(name, _NATIVE.get(architecture, ()))
        if theirs is None:
            unknown.append(name)
            continue
        array = arrays[name]
        own = kind if array.ndim > 1 and (kind != "Q8_0" or array.shape[-1] % _Q8_GROUP == 0) else "F32"
        part = theirs.split(".")[2] if theirs.startswith("blk.") else ""
        planned.append(_Planned(theirs, tuple(array.shape), own, _maker(array, name, own, heads.get(part, 0))))
    if unknown:
        raise UserError(f"{checked.directory} holds tensors that {architecture} has not: {', '.join(unknown[:20])}")
    if _scaling(config).get("rope_type") == "llama3":
        native = inverse_frequencies({**config, "rope_scaling": None, "rope_parameters": None})["full_attention"]
        factors = (native / inverse_frequencies(config)["full_attention"]).astype(np.float32)
        planned.append(_Planned("rope_freqs.weight", factors.shape, "F32", lambda: factors))
    return planned


def _maker(array: mx.array, name: str, kind: str, heads: int) -> Callable[[], np.ndarray]:
    """A function that makes one tensor as it stands in the file: bfloat16 and q8_0 as bytes."""

    def make() -> np.ndarray:
        if not is_finite(array):
            raise UserError(f"{name} holds weights that are not finite: the source is damaged")
        values = permute(array, heads) if heads else array
        if kind == "BF16":
            return raw(values.astype(mx.bfloat16)).view(np.uint8)
        if kind == "F16":
            half = values.astype(mx.float16)
            if not is_finite(half):
                raise UserError(f"{name} does not fit in float16: use --dtype bfloat16 or float32")
            return raw(half)
        full = raw(values.astype(mx.float32))
        if kind == "F32":
            return full
        gguf = _package()
        quantized: np.ndarray = gguf.quants.quantize(full, gguf.GGMLQuantizationType[kind])
        return quantized

    return make


def permute(rows: mx.array, heads: int) -> mx.array:
    """Rows of q or k from Hugging Face's order (two halves) to GGUF's (each rotated pair side by side).

    rows (heads * head_dim, ...); the inverse of `gguf.unpermute`.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return mx.contiguous(halves.swapaxes(1, 2)).reshape(rows.shape)


def _most(planned: list[_Planned]) -> str:
    """The type of the matrices."""
    return next((tensor.kind for tensor in planned if tensor.kind != "F32"), "F32")


def _write_tensors(writer: Any, gguf: Any, planned: list[_Planned]) -> None:
    """The header, then one tensor after the other."""
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(tensor.make())
        mx.clear_cache()
