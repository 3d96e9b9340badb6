"""Tiny random models of every family, written without the code under test if possible."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 272
WINDOW = 64
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3")


def config(kind="llama", **over):
    """A Hugging Face config as transformers 4 writes it."""
    base = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": WINDOW,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return {**base, **over}


def weights(settings, seed=0, dtype=mx.float32):
    """Random tensors that the config's model has, large enough that attention matters."""
    model_class, args_class = _get_classes(settings)
    model = model_class(args_class.from_dict(settings))
    random = np.random.default_rng(seed)
    arrays = {}
    for name, value in sorted(tree_flatten(model.parameters())):
        scale = 0.3 if value.ndim == 1 else 1.5 * value.shape[-1] ** -0.5
        centre = 1.0 if "norm" in name and "gemma" not in settings["model_type"] else 0.0
        array = random.normal(centre, scale, value.shape)
        arrays[name] = mx.array(array.astype(np.float32)).astype(dtype)
    return arrays


def tokenizer():
    """Bytes as tokens, and a few specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return made


def write(directory, settings=None, arrays=None, shards=1):
    """Write a model directory like a hub repository's."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    settings = config() if settings is None else settings
    arrays = weights(settings) if arrays is None else arrays
    (directory / "config.json").write_text(json.dumps(settings))
    names = sorted(arrays)
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), arrays)
    else:
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: arrays[name] for name in names[number::shards]}
            mx.save_safetensors(str(directory / file), part)
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "tokenizer.json").write_text(tokenizer().to_str())
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


def ids(length=3 * WINDOW, seed=0):
    """Token ids (1, length), by default well beyond the native window."""
    return np.random.default_rng(seed).integers(3, VOCAB, (1, length))


def logits(directory, tokens=None):
    """Logits (1, T, vocabulary) of stock mlx-lm."""
    model, _ = load_model(Path(directory))
    return np.array(model(mx.array(ids() if tokens is None else tokens)).astype(mx.float32))


def files(directory):
    """Every file of a directory with its bytes."""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}
