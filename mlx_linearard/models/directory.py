"""A model directory: found, checked before anything loads it, and loaded.

Nothing here runs a model's own code. Everything that is wrong ends in one UserError that names the file.
"""

from __future__ import annotations

import copy
import glob
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..cli import path_word, shell_command
from ..errors import UserError, one_line
from ..files import CONFIG, read_config, reading
from ..rope import FAMILIES, PREFIX, WRAPPERS, family, ignored_setting, native_window, normalise, wrap
from .experts import compute_in_float32
from .quantization import Scheme, quantize_structure
from .tokenizer import check_tokenizer, token_ids
from .tokenizer_files import MORE_TEMPLATES
from .weights import Stored, check_finite, load_lazily, refuse, same_values, stored_tensors

# The files of a hub repository that are downloaded. A variant such as model.fp16.safetensors is not.
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "README.md"]
VARIANTS = ["model.*.safetensors", "model.*-of-*.safetensors"]

RECOMPUTED = "rotary_emb.inv_freq"  # stored by some old checkpoints, recomputed by every library
EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."  # prefixes of the tensors that tied models share
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a hub cache names a blob by its hash


# -- finding --


def resolve(source: str | Path) -> Path:
    """A local directory as it is, or a hub repository's snapshot; UserError if it is neither."""
    path = Path(source)
    with reading(source):
        if path.is_dir():
            return path
        exists = path.exists()
    text = str(source)
    if exists and text.endswith(".gguf"):
        words = ("mlx_linearard.convert", "from-gguf", path_word(text), "DIR")
        raise UserError(f"{source} is a GGUF file, not a model directory: make one with {shell_command(*words)}")
    if exists or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(f"{source} is not a model directory: give one, or a hub repository (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=PATTERNS, ignore_patterns=VARIANTS))
    except Exception as error:  # no network, no such repository, a gated one: each library has its own
        raise UserError(
            f"{source} is neither a local directory nor a repository that the hub can provide "
            f"({type(error).__name__}): check the name and the connection"
        ) from None


@contextmanager
def path_for_mlx_lm(directory: Path) -> Iterator[Path]:
    """The path of a model directory for mlx-lm's own loader, which reads brackets in a path as a pattern.

    A path with such characters is replaced by a link without them while the block runs.
    """
    if glob.escape(str(directory)) == str(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model"
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield link


# -- checking --


def check_config(directory: Path, *, runs_in_mlx_lm: bool = True) -> dict[str, Any]:
    """The directory's config, normalised; UserError if the model is not supported or asks to run code.

    `runs_in_mlx_lm` false allows what only transformers reads.
    """
    directory = Path(directory)
    with reading(directory):
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory")
    check_links(directory)
    config = read_config(directory)
    if config.get("model_file") is not None:
        raise UserError(f"{directory / CONFIG} asks to run {config['model_file']!r}; models run no code here")
    config.pop("auto_map", None)  # names the model's own code: every supported family is built without it
    model_type = config.get("model_type")
    if runs_in_mlx_lm and isinstance(model_type, str) and model_type in FAMILIES and not in_mlx_lm(model_type):
        around = [name for name, texts in WRAPPERS.items() if model_type in texts and in_mlx_lm(name)]
        lacks = f"reads as the text_config of {around[0]} only" if around else "lacks: update mlx-lm"
        raise UserError(f"{directory / CONFIG} has model_type {model_type!r}, which this mlx-lm {lacks}")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        raise UserError(f"{directory / CONFIG}: tie_word_embeddings must be true or false")
    try:
        family(config)
        config = normalise(config)
        _check_values(config)
        if reason := ignored_setting(config):
            raise ValueError(reason)
        return config
    except ValueError as error:
        raise UserError(f"{directory / CONFIG}: {one_line(error)}") from None


def _check_values(config: Mapping[str, Any]) -> None:
    """ValueError if the window or a token id that the config states is of the wrong type."""
    if config.get("max_position_embeddings") is not None:
        native_window(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token_ids(name, config.get(name))


def check_links(directory: Path) -> None:
    """UserError if a link in the directory leads out of it, unless it leads to a blob of a hub cache."""
    with reading(directory):
        root = directory.resolve()
        for path in [*sorted(directory.iterdir()), *sorted(directory.glob(f"{MORE_TEMPLATES}/*"))]:
            if path.is_symlink() and not _stays(path.resolve(), root):
                raise UserError(f"{path} is a link that leads out of its directory: replace it by the file itself")


def _stays(target: Path, root: Path) -> bool:
    """Whether a link's target is in the directory, or in models--OWNER--NAME/blobs of a hub cache."""
    blobs = target.parent
    in_cache = blobs.name == "blobs" and blobs.parent.name.startswith("models--") and _BLOB.fullmatch(target.name)
    return target.is_relative_to(root) or bool(in_cache)


def in_mlx_lm(model_type: str) -> bool:
    """Whether the installed mlx-lm has a model for the model_type of a config."""
    from mlx_lm.utils import MODEL_REMAPPING

    return importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}") is not None


def build(config: Mapping[str, Any], tensors: int, where: Path) -> nn.Module:
    """The mlx-lm model of a config, nothing evaluated; UserError if the config does not describe one.

    `tensors` bounds the layers: a config with more layers than the weights have tensors is refused before
    anything is built.
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
        return model_class(args_class.from_dict(copy.deepcopy(dict(config))))  # mlx-lm changes a text_config
    except Exception as error:  # mlx-lm's constructors raise many types for a bad value
        text = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where} does not describe a {config['model_type']} model ({text})") from None


def sanitize(model: nn.Module, arrays: dict[str, mx.array], where: Path) -> dict[str, mx.array]:
    """mlx-lm's own renaming of a checkpoint's tensors, lazily; UserError if it fails."""
    if not hasattr(model, "sanitize"):
        return arrays
    try:
        return dict(model.sanitize(dict(arrays)))
    except Exception as error:  # missing tensors raise a KeyError here in some families
        raise UserError(f"{where}: mlx-lm cannot read these weights ({type(error).__name__}: {error})") from None


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


@dataclass(frozen=True)
class Checked:
    """A model directory that passed: its normalised config, and its arrays, not yet evaluated, by mlx-lm's names.

    `quantized` are the quantized layers by path.
    """

    directory: Path
    config: dict[str, Any]
    arrays: dict[str, mx.array]
    stored: dict[str, Stored]
    quantized: dict[str, Scheme]


def check_model_dir(path: str | Path, *, tokenizer: bool = True, finite: bool = False) -> Checked:
    """Check a Hugging Face or mlx-lm directory before anything loads it; UserError for anything that is wrong.

    The check covers links, config, index, headers, architecture, the names and shapes of all tensors, and the
    tokenizer. With `finite` it covers the values of the weights too, which reads them all.

    The returned config states `tie_word_embeddings`: false if the weights hold an output head of their own.
    """
    directory = Path(path)
    _, checked = _assemble(directory, check_config(directory))
    if tokenizer:
        check_tokenizer(directory)
    if finite:
        check_finite(checked.arrays, directory)
    return checked


def load(path: str | Path, config: Mapping[str, Any]) -> nn.Module:
    """mlx-lm's model for `config` with the weights in `path`, checked, and not yet evaluated.

    The same as mlx-lm's own loader, from exactly the files that `check_model_dir` checks; experts that the device
    multiplies in float32 only are computed so (`models.experts`).
    """
    model, checked = _assemble(Path(path), dict(config))
    model.eval()
    model.load_weights(list(checked.arrays.items()))
    compute_in_float32(model)
    return model


def _assemble(directory: Path, config: dict[str, Any]) -> tuple[nn.Module, Checked]:
    """A model of `config` without its weights, and the arrays that fit it."""
    stored = stored_tensors(directory)
    where = directory / CONFIG
    unneeded = copied_head(config, stored)
    heads = [name for name in stored if _is_head(name) and name not in unneeded]
    if heads or config.get("tie_word_embeddings") is None:  # the libraries have different defaults for it
        config["tie_word_embeddings"] = not heads
        wrap(config)
    model = build(config, len(stored), where)
    used = {name: tensor for name, tensor in stored.items() if name not in unneeded}
    arrays = sanitize(model, load_lazily(used), directory)
    arrays = {name: array for name, array in arrays.items() if not name.endswith(RECOMPUTED)}
    quantized = quantize_structure(model, config, arrays, where)
    if quantized and "quantization" not in config:  # mlx-lm's own loader looks for it under this name
        config["quantization"] = config["quantization_config"]
    parameters: Any = tree_flatten(model.parameters())
    wanted = {name: tuple(value.shape) for name, value in parameters}
    if lost := [name for name in heads if not any(other.endswith(name) for other in wanted)]:
        raise UserError(
            f"{directory}: {lost[0]} differs from the embedding, and mlx-lm's {config['model_type']} has no output "
            "head of its own: it would compute different logits"
        )
    check_tensors(wanted, arrays, directory)
    return model, Checked(directory, config, arrays, stored, quantized)


def copied_head(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> list[str]:
    """The stored tensors of an output head that only repeat the embedding of a tied model."""
    if config.get("tie_word_embeddings") is False:
        return []
    heads = [name for name in stored if _is_head(name)]
    twins = {name: stored.get(name.replace(HEAD, EMBEDDING)) for name in heads}
    return heads if all(twin and same_values(stored[name], twin) for name, twin in twins.items()) else []


def _is_head(name: str) -> bool:
    return name.removeprefix(PREFIX).startswith(HEAD)
