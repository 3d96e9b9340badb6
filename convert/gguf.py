"""From a llama GGUF file to an mlx-lm directory.

The file is read here rather than by mlx, whose reader casts every type it does not know to float16 and
trusts the header. Layout: the GGUF specification, version 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..files import disk_errors, write_json
from ..models import tokenizer
from ..models.dtypes import FLOATS
from ..models.save import Tensor, model_directory
from ..rope import inverse_frequencies, normalise
from . import names

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4

# Metadata value types: number -> struct format; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# ggml type -> (values in a block, numpy layout of a block)
_BLOCK = 32
_LAYOUTS: dict[str, tuple[int, np.dtype]] = {
    "F32": (1, np.dtype("<f4")),
    "F16": (1, np.dtype("<f2")),
    "BF16": (1, np.dtype("<u2")),
    "Q8_0": (_BLOCK, np.dtype([("d", "<f2"), ("q", "i1", 32)])),
    "Q4_0": (_BLOCK, np.dtype([("d", "<f2"), ("q", "u1", 16)])),
    "Q4_1": (_BLOCK, np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)])),
}
# The type that a file's weights become where --dtype is not given. Quantized blocks carry float16 scales,
# so float16 is within half a unit in its last place of what the file means; bfloat16 is 8 times coarser.
_NATURAL = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED_DTYPE = "float16"


@dataclass(frozen=True)
class Entry:
    """A tensor as the file holds it: its ggml type, shape (outermost first) and place in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Gguf:
    """A GGUF file: `metadata` and `tensors` by name; values are read when asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = self.path.stat().st_size
                if size < 24:
                    raise UserError(f"{self.path} is not a GGUF file: it has {size} bytes")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        try:
            cursor = _Cursor(self._data, self.path)
            self.metadata, entries = _header(cursor)
            self.tensors = _place(entries, cursor.position, self.metadata, len(self._data), self.path)
        except (UnicodeDecodeError, RecursionError, OverflowError, MemoryError) as error:
            raise UserError(f"{self.path} is a damaged GGUF file: {error}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value."""
        return self.metadata.get(key, default)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, dequantized to float32."""
        entry = self.tensors[name]
        block, layout = _LAYOUTS[entry.kind]
        count = math.prod(entry.shape) // block
        stored = np.frombuffer(self._data, dtype=layout, count=count, offset=entry.start)
        return _dequantize(entry.kind, stored).reshape(entry.shape)


class _Cursor:
    """Reads little-endian values from bytes and refuses to pass their end."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.position = data, path, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.position + count > len(self.data):
            raise UserError(f"{self.path} is truncated: its header names more than its {len(self.data)} bytes")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

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
        if kind in _SCALARS:
            layout = np.dtype("<" + _SCALARS[kind])
            if count * layout.itemsize > len(self.data):
                raise UserError(f"{self.path} is truncated: an array of {count} values does not fit")
            return np.frombuffer(self.take(count * layout.itemsize), dtype=layout)
        if count > len(self.data):
            raise UserError(f"{self.path} is truncated: an array of {count} values does not fit")
        return [self.value(kind, depth + 1) for _ in range(count)]


def _header(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple[str, int, tuple[int, ...], int]]]:
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise UserError(f"{path} is not a GGUF file")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise UserError(f"{path} is GGUF version {version}: only versions 2 and 3 are read")
    tensor_count, value_count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensor_count, value_count) > len(cursor.data):
        raise UserError(f"{path} is damaged: it claims {tensor_count} tensors and {value_count} values")
    metadata = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = []
    for _ in range(tensor_count):
        name = cursor.string()
        dims = cursor.scalar("I")
        if not 1 <= dims <= MAX_DIMS:
            raise UserError(f"{path} is damaged: tensor {name!r} has {dims} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        entries.append((name, cursor.scalar("I"), shape, cursor.scalar("Q")))
    return metadata, entries


def _place(
    entries: list[tuple[str, int, tuple[int, ...], int]],
    header_end: int,
    metadata: dict[str, Any],
    size: int,
    path: Path,
) -> dict[str, Entry]:
    """Where each tensor lies; UserError for types we do not read and for places outside the file."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise UserError(f"{path} is damaged: alignment {alignment!r}")
    base = -(-header_end // alignment) * alignment
    tensors: dict[str, Entry] = {}
    unread = sorted({names.GGML_TYPES.get(kind, str(kind)) for _, kind, _, _ in entries} - set(_LAYOUTS))
    if unread:
        raise UserError(f"{path} holds {', '.join(unread)} tensors; only {', '.join(_LAYOUTS)} are read")
    for name, number, shape, offset in entries:
        kind = names.GGML_TYPES[number]
        block, layout = _LAYOUTS[kind]
        if not shape or shape[-1] % block or name in tensors:
            raise UserError(f"{path} is damaged: tensor {name!r} of shape {shape}")
        nbytes = math.prod(shape) // block * layout.itemsize
        if base + offset + nbytes > size:
            raise UserError(f"{path} is truncated: tensor {name!r} ends beyond its {size} bytes")
        tensors[name] = Entry(name, kind, shape, base + offset, nbytes)
    return tensors


def _dequantize(kind: str, stored: np.ndarray) -> np.ndarray:
    """float32 values of stored blocks (ggml's block_q8_0, block_q4_0, block_q4_1)."""
    if kind == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if kind in ("F32", "F16"):
        return stored.astype(np.float32)
    scale = stored["d"].astype(np.float32)[:, None]
    if kind == "Q8_0":
        return stored["q"] * scale
    # The low halves of the 16 bytes are the block's first 16 values, the high halves the other 16.
    quants = np.concatenate([stored["q"] & 0x0F, stored["q"] >> 4], axis=1).astype(np.float32)
    if kind == "Q4_0":
        return (quants - 8) * scale
    return quants * scale + stored["m"].astype(np.float32)[:, None]


# -- the conversion --


def from_gguf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert the llama GGUF `source` to an mlx-lm directory at `target` and return its path.

    dtype float32, float16 or bfloat16; by default what the file's matrices are stored as, and float16 where
    they are quantized (their scales are float16). The tokenizer and chat template come from the metadata.
    UserError for other architectures, tensor types and tokenizers, by name, and for damaged files.
    """
    source, target = Path(source), Path(target)
    file = Gguf(source)
    architecture = file.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{source} has architecture {architecture!r}; only llama is converted")
    config = config_of(file)
    dtype = dtype or _natural_dtype(file)
    if dtype not in FLOATS:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(FLOATS)}")
    config["dtype"] = config["torch_dtype"] = dtype
    parts = tokenizer.from_gguf(file.metadata, str(source))
    config.update(parts.token_ids)
    tensors = list(_tensors(file, config, FLOATS[dtype]))
    _check_complete(file, config, tensors)
    with (
        disk_errors(target),
        model_directory(target, config, tensors, overwrite=overwrite, progress=progress) as directory,
    ):
        tokenizer.write(directory, parts)
        generation = {key: value for key, value in parts.token_ids.items() if value is not None}
        write_json(directory / "generation_config.json", generation)
    return target


def config_of(file: Gguf) -> dict[str, Any]:
    """The Hugging Face config of a llama GGUF, RoPE in both spellings."""
    hidden = _integer(file, "embedding_length")
    heads = _integer(file, "attention.head_count")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": _integer(file, "block_count"),
        "intermediate_size": _integer(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(file, "attention.head_count_kv", heads),
        "head_dim": _integer(file, "attention.key_length", hidden // heads),
        "max_position_embeddings": _integer(file, "context_length"),
        "rms_norm_eps": _real(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _real(file, "rope.freq_base", 10000.0),
        "vocab_size": file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    _refuse_what_llama_has_not(file, config)
    config["rope_scaling"] = _scaling(file, config)
    return normalise(config)


def _integer(file: Gguf, key: str, default: int | None = None) -> int:
    value = file.get(f"llama.{key}", default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{file.path}: llama.{key} must be a positive integer, not {value!r}")
    return value


def _real(file: Gguf, key: str, default: float | None = None) -> float:
    value = file.get(f"llama.{key}", default)
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{file.path}: llama.{key} must be a positive number, not {value!r}")
    return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06


def _refuse_what_llama_has_not(file: Gguf, config: dict[str, Any]) -> None:
    if file.get("llama.expert_count", 0):
        raise UserError(f"{file.path} is a mixture of experts; only dense llama files are converted")
    rotated = _integer(file, "rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        raise UserError(f"{file.path} rotates {rotated} of {config['head_dim']} dimensions, which llama does not")
    sliding = file.get("llama.attention.sliding_window", 0)
    if sliding and sliding < config["max_position_embeddings"]:
        raise UserError(f"{file.path} has a sliding window of {sliding}, which mlx-lm's llama does not apply")


def _scaling(file: Gguf, config: dict[str, Any]) -> dict[str, Any] | None:
    """The native scaling of a GGUF: from its metadata, or from the factors of Llama 3.1."""
    kind = file.get("llama.rope.scaling.type", "none")
    scaling: dict[str, Any] | None = None
    if file.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(f"{file.path} has a RoPE attention factor of its own, which mlx-lm cannot express")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": _real(file, "rope.scaling.factor")}
        if kind == "yarn":
            original = _integer(file, "rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
    elif kind != "none":
        raise UserError(f"{file.path}: RoPE scaling {kind!r} is not converted")
    elif "llama.rope.scale_linear" in file.metadata:
        scaling = {"rope_type": "linear", "factor": _real(file, "rope.scale_linear")}
    if "rope_freqs.weight" in file.tensors:
        if scaling:
            raise UserError(f"{file.path} carries two RoPE scalings")
        return _llama3_scaling(file, config)
    return None if scaling and scaling["factor"] == 1 else scaling


def _llama3_scaling(file: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """The Llama 3.1 scaling whose factors a file stores; UserError where they are of another kind."""
    factors = file.read("rope_freqs.weight").astype(np.float64)
    largest = float(factors.max(initial=0))
    scaling = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if largest > 0 and math.isfinite(largest):
        native = inverse_frequencies({**config, "rope_scaling": None})["full_attention"]
        meant = native / inverse_frequencies({**config, "rope_scaling": scaling})["full_attention"]
        if meant.shape == factors.shape and np.allclose(meant, factors, rtol=1e-4):
            return scaling
    raise UserError(f"{file.path} scales RoPE by factors that are not Llama 3.1's; they cannot be expressed")


def _natural_dtype(file: Gguf) -> str:
    """What the file's matrices are stored as; float16 where any is quantized."""
    kinds = {entry.kind for entry in file.tensors.values() if len(entry.shape) > 1}
    if not kinds <= set(_NATURAL):
        return _QUANTIZED_DTYPE
    for kind in ("F32", "F16", "BF16"):
        if kind in kinds:
            return _NATURAL[kind]
    return _QUANTIZED_DTYPE


def _tensors(file: Gguf, config: dict[str, Any], dtype: mx.Dtype) -> Iterator[Tensor]:
    unknown = []
    for name, entry in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        ours = names.from_gguf(name)
        if ours is None:
            unknown.append(name)
            continue
        heads = 0
        if ".q_proj." in ours:
            heads = config["num_attention_heads"]
        elif ".k_proj." in ours:
            heads = config["num_key_value_heads"]
        yield Tensor(ours, entry.shape, dtype, _maker(file, name, ours, heads, dtype))
    if unknown:
        raise UserError(f"{file.path} holds tensors that llama has not: {', '.join(sorted(unknown))}")


def _maker(file: Gguf, name: str, ours: str, heads: int, dtype: mx.Dtype) -> Callable[[], mx.array]:
    def make() -> mx.array:
        values = file.read(name)
        if not np.isfinite(values).all():
            raise UserError(f"{file.path}: tensor {name} holds weights that are not finite")
        result = mx.array(unpermute(values, heads) if heads else values).astype(dtype)
        if dtype == mx.float16 and not mx.isfinite(result).all().item():
            raise UserError(f"{ours} does not fit in float16: use --dtype bfloat16 or float32")
        return result

    return make


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from GGUF order (each rotated pair side by side) to Hugging Face order (two halves).

    rows (heads * head_dim, ...); within each head, row 2i + h goes to row h * head_dim / 2 + i.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _check_complete(file: Gguf, config: dict[str, Any], tensors: list[Tensor]) -> None:
    """UserError listing every tensor that is missing, superfluous or of the wrong shape."""
    expected = _expected_shapes(config)
    found = {tensor.name: tensor.shape for tensor in tensors}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise UserError(f"{file.path}: {'; '.join(problems)}")


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(min(config["num_hidden_layers"], 1 << 14)):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            bias = config["attention_bias"] if name.startswith("self_attn") else config["mlp_bias"]
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes
