"""Tiny random models of real architectures, with a real tokenizer, for tests that need a whole directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 258,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def tiny_model(folder: Path, *, seed: int = 0, dtype: str = "float32", bits: int | None = None, **changes: Any) -> Path:
    """Write a model directory: config, random weights (optionally quantized), byte-level tokenizer."""
    from mlx_lm.utils import _get_classes

    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.update(_louder(model))
    model.set_dtype(getattr(mx, dtype))
    if bits:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(folder)
    return folder


def _louder(model: Any) -> Any:
    """Weights large enough that attention is not uniform, so that relations differ; none that are all zero."""
    from mlx.utils import tree_unflatten

    def louder(name: str, value: mx.array) -> mx.array:
        if not mx.any(value).item():  # routers, sinks and biases begin at zero, where experts tie and nothing is seen
            return 0.5 * mx.random.normal(value.shape)
        return value * 3 if value.ndim == 2 and "embed" not in name else value

    return tree_unflatten([(name, louder(name, value)) for name, value in tree_flatten(model.parameters())])


def tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def reload(folder: Path) -> Any:
    """The directory as stock mlx-lm loads it."""
    return load_model(folder)[0]
