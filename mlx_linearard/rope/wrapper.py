"""Multimodal configs of which mlx-lm reads the text model alone: their text_config, at the top level and back.

The keys of text_config stand at the top level too while this tool reads a config, so every reader finds them where a
text model has them. mlx-lm reads text_config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import WRAPPERS
from .lookup import family_or_default, text_type

PREFIX = "language_model."  # of the text model's tensors, by mlx-lm's names
_WRITTEN = (
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "sliding_window_pattern",
    "layer_types", "tie_word_embeddings",
)  # fmt: skip


_ABOVE = ("architectures", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether the config is of `WRAPPERS`, with a text_config."""
    return config.get("model_type") in WRAPPERS and isinstance(config.get("text_config"), Mapping)


def unwrap(config: dict[str, Any]) -> None:
    """Copy the keys of text_config to the top level; nothing for another config."""
    if is_wrapper(config):
        config.update({key: value for key, value in config["text_config"].items() if key != "model_type"})


def wrap(config: dict[str, Any]) -> None:
    """Write what the top level says back into text_config; nothing for another config."""
    if not is_wrapper(config):
        return
    names = {*config["text_config"], *_WRITTEN, *family_or_default(config).defaults} - {"model_type"}
    text = {key: config[key] for key in names if key in config}
    config["text_config"] = {**config["text_config"], **text, "model_type": text_type(config)}


def text_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model by itself."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return {**ids, **config["text_config"]}


def written(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it is written: what text_config says stands there alone, except for what both libraries read above.

    transformers takes RoPE at the top level of such a config for that of the multimodal model, which has none.
    """
    if not is_wrapper(config):
        return dict(config)
    inner = {*config["text_config"], *_WRITTEN} - {"model_type", "vocab_size", "tie_word_embeddings", *_ABOVE}
    return {key: value for key, value in config.items() if key not in inner}
