"""Rebuilds the tokenizer that a GGUF file's metadata describes, as files that transformers loads.

Two kinds: `gpt2` is byte-level BPE with its merges in the metadata, `llama` is sentencepiece's BPE with a score per
piece. The keys are those of the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..data import tokenizer_errors
from ..errors import UserError
from ..models.tokenizer import CONTROL, NORMAL, Rebuilt, add_tokens, finish, sentencepiece_bpe
from ..models.weights import plain_name
from .gguf_file import short

# The split of GPT-2 with the digits of Llama 3 (up to three) and of Qwen 2 (one).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(_SPLIT.replace("{DIGITS}", digits))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), to_bytes])


@dataclass(frozen=True)
class _Pre:
    """What llama.cpp does for a value of tokenizer.ggml.pre.

    split         how text is split before BPE
    skips_merges  whether a word that is in the vocabulary skips the merges
    adds_bos      whether texts begin with the beginning token, unless the file states it
    normalizer    changes the text before the split
    """

    split: Callable[[], pre_tokenizers.PreTokenizer]
    skips_merges: bool = False
    adds_bos: bool = False
    normalizer: Callable[[], normalizers.Normalizer] | None = None


_LLAMA3 = _Pre(lambda: _split("{1,3}"), skips_merges=True, adds_bos=True)
_PRE = {
    "gpt-2": _Pre(_gpt2),
    "gpt2": _Pre(_gpt2),
    "smollm": _Pre(_single_digits),
    "starcoder": _Pre(_single_digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    "qwen2": _Pre(lambda: _split(""), normalizer=normalizers.NFC),
}
# The special tokens that llama.cpp assumes for a sentencepiece vocabulary if the file does not name them.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}
# Control tokens with which a chat model ends its turn; llama.cpp finds them by name too.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_TEMPLATE = "tokenizer.chat_template"


def from_metadata(metadata: Mapping[str, Any], source: str) -> Rebuilt:
    """Rebuild the tokenizer that a GGUF file's metadata describes.

    source is the file's name for messages. Raises UserError for a tokenizer that is missing, damaged or of a kind
    that is not rebuilt.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{source} carries no tokenizer")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise UserError(f"{source} has a tokenizer of kind {short(kind)}; only gpt2 and llama are rebuilt")
    types = [int(t) for t in _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), NORMAL, source)]
    usual: Mapping[str, int] = {}
    with tokenizer_errors(f"{source}: its tokenizer is damaged"):
        if kind == "gpt2":
            pre = _pre(metadata, source)
            tokenizer, adds_bos = _byte_level(metadata, tokens, types, pre, source), pre.adds_bos
        else:
            scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens), 0.0, source)
            pieces = list(zip(tokens, (float(s) for s in scores), types, strict=True))
            prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True, source)
            tokenizer, adds_bos, usual = sentencepiece_bpe(pieces, add_prefix=prefix), True, _SENTENCEPIECE_IDS
    ids = {
        name: _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens), source, usual.get(name))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    add_bos = _flag(metadata, "tokenizer.ggml.add_bos_token", adds_bos, source)
    add_eos = _flag(metadata, "tokenizer.ggml.add_eos_token", False, source)
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and ids[name] is None:
            raise UserError(f"{source} adds a {name} token to texts, but has no tokenizer.ggml.{name}_token_id")
    templates = _templates(metadata, source)
    with tokenizer_errors(f"{source}: its tokenizer is damaged"):
        rebuilt = finish(
            tokenizer, tokens, ids, add_bos=add_bos, add_eos=add_eos, chat_template=templates.pop("default", None)
        )
    rebuilt.more_templates.update(templates)
    rebuilt.token_ids["eos_token_id"] = _end_ids(metadata, tokens, types, ids["eos"], source)
    return rebuilt


def _end_ids(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], eos: int | None, source: str
) -> int | list[int] | None:
    """The ids at which generation stops: end of text, end of turn, end of message; a list if there are several."""
    ends = [] if eos is None else [eos]
    for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"):
        index = _token_id(metadata, key, len(tokens), source)
        ends += [] if index is None else [index]
    control = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == CONTROL}
    ends += [control[token] for token in _END_OF_TURN if token in control]
    unique = list(dict.fromkeys(ends))
    return unique if len(unique) > 1 else next(iter(unique), None)


def _templates(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """The chat templates by name; the one without a name is `default`."""
    templates = {}
    for key, value in metadata.items():
        if key != _TEMPLATE and not key.startswith(f"{_TEMPLATE}."):
            continue
        name = key.removeprefix(_TEMPLATE).removeprefix(".") or "default"
        if not isinstance(value, str) or not plain_name(name):
            raise UserError(f"{source}: {key} is not a chat template: it must be a string under a plain name")
        templates[name] = value
    return templates


def _pre(metadata: Mapping[str, Any], source: str) -> _Pre:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE:
        raise UserError(f"{source} splits text by {short(name)}; only {', '.join(_PRE)} are rebuilt")
    return _PRE[name]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: _Pre, source: str) -> Tokenizer:
    """The byte-level BPE tokenizer of the metadata's tokens and merges."""
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{source}: its vocabulary names a token twice")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.skips_merges))
    if pre.normalizer:
        tokenizer.normalizer = pre.normalizer()
    tokenizer.pre_tokenizer = pre.split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    add_tokens(tokenizer, tokens, types)
    return tokenizer


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: float, source: str) -> Sequence[Any]:
    """The metadata's array of `count` numbers, or `count` times the default if there is none."""
    values = metadata.get(key)
    if values is None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise UserError(f"{source}: {key} does not hold {count} numbers")
    return list(values.tolist())


def _flag(metadata: Mapping[str, Any], key: str, default: bool, source: str) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {key} must be true or false, not {short(value)}")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, count: int, source: str, default: int | None = None) -> int | None:
    """The token id under `key`, else `default` if the vocabulary has it; UserError if it is not below `count`."""
    value = metadata.get(key)
    if value is None:
        return default if default is not None and default < count else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise UserError(f"{source}: {key} must be an id below {count}, not {short(value)}")
    return value
