"""Converts a llama GGUF file to an mlx-lm directory.

What each metadata key means follows llama.cpp's loader of the llama architecture. An unknown key of RoPE
or attention is refused by name, because ignoring it could change the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError, one_line
from ..files import GENERATION_CONFIG, disk_errors, write_json
from ..models import tokenizer
from ..models.dtypes import FLOATS
from ..models.origin import Origin, stated_origin, write_origin
from ..models.save import Tensor, model_directory
from ..models.weights import refuse
from ..rope import inverse_frequencies, normalise
from . import names
from .gguf_file import Gguf, short
from .gguf_tokenizer import from_metadata

ARCHITECTURE = "llama"
# The type that a file's weights become without --dtype. Quantized blocks carry float16 scales, so float16 is within
# half a unit in its last place of the file's values; bfloat16 is 8 times coarser.
_NATURAL = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED_DTYPE = "float16"

# The keys of RoPE and attention that the conversion reads. Any other such key is refused.
_READ = {
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # a fact about the training, not about the computation
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.scale",
}
# Keys with an effect that mlx-lm's llama does not have, and the values of each key that have no effect.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),  # -1: llama.cpp's default, which is 1 under yarn
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
}


def from_gguf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Convert the llama GGUF file `source` to an mlx-lm directory at `target`; return its path.

    dtype is float32, float16 or bfloat16. The default is the type of the file's matrices, or float16 if they are
    quantized, because their scales are float16. The tokenizer and the chat templates come from the metadata.
    Raises UserError that names the architecture, tensor type, key or tokenizer that is not converted, and for
    damaged files.
    """
    source, target = Path(source), Path(target)
    file = Gguf(source)
    architecture = _text(file, "general.architecture", "")
    if architecture != ARCHITECTURE:
        raise UserError(f"{source} has architecture {short(architecture)}; only {ARCHITECTURE} is converted")
    config = config_of(file)
    dtype = dtype or _natural_dtype(file)
    if dtype not in FLOATS:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(FLOATS)}")
    config["dtype"] = config["torch_dtype"] = dtype
    rebuilt = from_metadata(file.metadata, str(source))
    config.update(rebuilt.token_ids)
    if (tokens := len(file.get("tokenizer.ggml.tokens"))) > config["vocab_size"] > 0:
        raise UserError(f"{source} has {tokens} tokens, but embeddings for only {config['vocab_size']}")
    tensors = list(_tensors(file, config, FLOATS[dtype]))
    _check_complete(file, config, tensors)
    with (
        disk_errors(target),
        model_directory(target, config, tensors, overwrite=overwrite, sources=[source], progress=progress) as directory,
    ):
        tokenizer.write(directory, rebuilt)
        generation = {key: value for key, value in rebuilt.token_ids.items() if value is not None}
        write_json(directory / GENERATION_CONFIG, generation)
        write_origin(directory, _origin(file))
    return target


def _origin(file: Gguf) -> Origin:
    """The licence and the languages that the metadata states."""
    stated = {
        "license": file.get("general.license"),
        "license_name": file.get("general.license.name"),
        "license_link": file.get("general.license.link"),
        "language": file.get("general.languages"),
    }
    return stated_origin(stated)


# -- the config --


def config_of(file: Gguf) -> dict[str, Any]:
    """The Hugging Face config of a llama GGUF file, with RoPE in both spellings.

    Raises UserError for a setting that mlx-lm's llama does not have.
    """
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
    _refuse_unknown(file)
    _refuse_other_attention(file, config)
    try:
        config["rope_scaling"] = _scaling(file, config)
        return normalise(config)
    except ValueError as error:
        raise UserError(f"{file.path}: {one_line(error)}") from None


def _key(key: str) -> str:
    return f"{ARCHITECTURE}.{key}"


def _integer(file: Gguf, key: str, default: int | None = None, *, least: int = 1) -> int:
    """An integer of the metadata; an array is accepted if all layers have the same value."""
    value = file.get(_key(key), default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise UserError(f"{file.path}: {_key(key)} must be {kind}, not {short(value)}")
    return value


def _real(file: Gguf, key: str, default: float | None = None) -> float:
    """A positive number of the metadata, in the fewest digits that give its float32 value."""
    value = file.get(_key(key), default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{file.path}: {_key(key)} must be a positive number, not {short(value)}")
    return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06


def _text(file: Gguf, key: str, default: str) -> str:
    value = file.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{file.path}: {key} must be a string, not {short(value)}")
    return value


def _refuse_unknown(file: Gguf) -> None:
    """UserError that names the unknown RoPE and attention keys, or a key whose value mlx-lm cannot express."""
    unknown = [
        key
        for key in sorted(file.metadata)
        if key.startswith((_key("rope."), _key("attention.")))
        and key.removeprefix(_key("")) not in _READ | _NEUTRAL.keys()
    ]
    if unknown:
        raise UserError(f"{file.path} has {', '.join(unknown[:20])}, which the conversion does not know")
    if _integer(file, "expert_count", 0, least=0):
        raise UserError(f"{file.path} is a mixture of experts; only dense llama files are converted")
    for key, neutral in _NEUTRAL.items():
        value = file.get(_key(key), neutral[0])
        if not isinstance(value, int | float) or value not in neutral:
            raise UserError(f"{file.path}: {_key(key)} is {short(value)}, which mlx-lm's llama cannot express")


def _refuse_other_attention(file: Gguf, config: dict[str, Any]) -> None:
    """UserError for rotations, windows, head sizes and scales that mlx-lm's llama does not compute."""
    head_dim, heads, groups = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    if head_dim % 2 or heads % groups:
        raise UserError(f"{file.path} has {heads} heads of {head_dim} dimensions in {groups} groups, which cannot be")
    rotated = _integer(file, "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(f"{file.path} rotates {rotated} of {head_dim} dimensions, which mlx-lm's llama does not")
    width = _integer(file, "attention.value_length", head_dim)
    if width != head_dim:
        raise UserError(f"{file.path} has values of {width} and keys of {head_dim} dimensions: they must be equal")
    sliding = _integer(file, "attention.sliding_window", 0, least=0)
    if sliding and sliding < config["max_position_embeddings"]:
        raise UserError(f"{file.path} has a sliding window of {sliding}, which mlx-lm's llama does not apply")
    scale = file.get(_key("attention.scale"), 0.0)
    unset = isinstance(scale, float) and scale == 0  # llama.cpp's default: the usual scale
    if not unset and not math.isclose(_real(file, "attention.scale"), head_dim**-0.5, rel_tol=1e-5):
        raise UserError(f"{file.path}: {_key('attention.scale')} is {short(scale)}, not head_dim ** -0.5")


def _scaling(file: Gguf, config: dict[str, Any]) -> dict[str, Any] | None:
    """The native RoPE scaling of a GGUF file: from its metadata, or from the stored factors of Llama 3.1."""
    kind = _text(file, _key("rope.scaling.type"), "linear")  # llama.cpp's default, used if there is a factor
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file.path}: RoPE scaling {short(kind)} is not converted")
    factor = "rope.scaling.factor" if _key("rope.scaling.factor") in file.metadata else "rope.scale_linear"
    scaling: dict[str, Any] | None = None
    if kind == "yarn" or (kind == "linear" and _key(factor) in file.metadata):
        scaling = {"rope_type": kind, "factor": _real(file, factor)}
    if kind == "yarn" and scaling:
        scaling["original_max_position_embeddings"] = _integer(file, "rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if _key(f"rope.scaling.yarn_{beta}") in file.metadata:
                scaling[beta] = _real(file, f"rope.scaling.yarn_{beta}")
    if scaling and scaling["factor"] == 1:
        scaling = None
    if "rope_freqs.weight" in file.tensors:
        if scaling:
            raise UserError(f"{file.path} has two RoPE scalings: {kind} and rope_freqs.weight")
        return _llama3_scaling(file, config)
    return scaling


def _llama3_scaling(file: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """The Llama 3 scaling whose factors a file stores; UserError if the factors are different.

    The file does not state the original window. It is Llama 3.1's, or that of a window extended by the factor.
    """
    factors = file.read("rope_freqs.weight").astype(np.float64)
    largest = float(factors.max(initial=0))
    if largest > 0 and math.isfinite(largest):
        native = inverse_frequencies({**config, "rope_scaling": None})["full_attention"]
        for original in (8192, round(config["max_position_embeddings"] / largest)):
            scaling = {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": max(original, 1),
            }
            meant = native / inverse_frequencies({**config, "rope_scaling": scaling})["full_attention"]
            if meant.shape == factors.shape and np.allclose(meant, factors, rtol=1e-4):
                return scaling
    raise UserError(f"{file.path} scales RoPE by factors that are not Llama 3.1's; they cannot be expressed")


# -- the weights --


def _natural_dtype(file: Gguf) -> str:
    """The type of the file's matrices; float16 if any is quantized."""
    kinds = {entry.kind for entry in file.tensors.values() if len(entry.shape) > 1}
    if not kinds <= set(_NATURAL):
        return _QUANTIZED_DTYPE
    return next((_NATURAL[kind] for kind in ("F32", "F16", "BF16") if kind in kinds), _QUANTIZED_DTYPE)


def _tensors(file: Gguf, config: dict[str, Any], dtype: mx.Dtype) -> Iterator[Tensor]:
    """The file's tensors under mlx-lm's names; UserError that lists the tensors llama does not have."""
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
        raise UserError(f"{file.path} holds tensors that llama does not have: {', '.join(sorted(unknown)[:20])}")


def _maker(file: Gguf, name: str, ours: str, heads: int, dtype: mx.Dtype) -> Callable[[], mx.array]:
    """A function that reads one tensor; with `heads`, its rows are put into Hugging Face's order."""

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
    """Rows of q or k from GGUF's order (each rotated pair side by side) to Hugging Face's order (two halves).

    rows (heads * head_dim, ...); within each head, row 2i + h goes to row h * head_dim / 2 + i.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _check_complete(file: Gguf, config: dict[str, Any], tensors: list[Tensor]) -> None:
    """UserError that lists every tensor that is missing, unexpected or of the wrong shape."""
    expected = _expected_shapes(config)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    problems = [f"missing {name}" for name in sorted(expected.keys() - shapes.keys())]
    problems += [f"unexpected {name}" for name in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"{name} is {shapes[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & shapes.keys())
        if shapes[name] != expected[name]
    ]
    refuse(problems, str(file.path))


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a llama model's tensors by mlx-lm's names."""
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
