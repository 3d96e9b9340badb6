"""Tokenizers rebuilt from what a GGUF or a bare tokenizer.model says, as files that transformers loads.

Two kinds: byte-level BPE (merges in the metadata) and sentencepiece (pieces with scores).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import load_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import UserError, one_line
from ..files import read_json

# Token types, the same numbers in GGUF and in sentencepiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"

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
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), bytes_])


# tokenizer.ggml.pre -> (how text is split before BPE, whether whole words in the vocabulary skip the merges)
_PRE = {
    "gpt-2": (_gpt2, False),
    "gpt2": (_gpt2, False),
    "smollm": (_single_digits, False),
    "starcoder": (_single_digits, False),
    "llama-bpe": (lambda: _split("{1,3}"), True),
    "llama3": (lambda: _split("{1,3}"), True),
    "qwen2": (lambda: _split(""), False),
}


@dataclass
class Parts:
    """A tokenizer and what stands beside it: tokenizer_config.json's values, the chat template, token ids."""

    tokenizer: Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    token_ids: dict[str, int | None] = field(default_factory=dict)


def write(directory: Path, parts: Parts) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
    (directory / "tokenizer.json").write_text(parts.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    text = json.dumps(parts.config, indent=2, ensure_ascii=False, sort_keys=True)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if parts.chat_template:
        (directory / "chat_template.jinja").write_text(parts.chat_template, encoding="utf-8")


def from_gguf(metadata: Mapping[str, Any], source: str) -> Parts:
    """The tokenizer that a GGUF's metadata describes; UserError by name for a kind we do not rebuild."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{source} carries no tokenizer")
    types = _array(metadata, "tokenizer.ggml.token_type", len(tokens), NORMAL, source)
    try:
        if kind == "gpt2":
            tokenizer = _bpe(metadata, tokens, [int(t) for t in types], source)
        elif kind == "llama":
            scores = _array(metadata, "tokenizer.ggml.scores", len(tokens), 0.0, source)
            pieces = list(zip(tokens, (float(s) for s in scores), (int(t) for t in types), strict=True))
            prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
            tokenizer = sentencepiece_bpe(pieces, add_prefix=prefix)
        else:
            raise UserError(f"{source} has a tokenizer of kind {kind!r}; only gpt2 and llama are rebuilt")
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions for what it refuses
        raise UserError(f"{source}: its tokenizer is damaged: {one_line(error)}") from None
    ids = {
        name: _token_id(metadata, f"tokenizer.ggml.{key}_token_id", len(tokens), source)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    return finish(tokenizer, tokens, ids, add_bos=add_bos, add_eos=add_eos, chat_template=template)


def finish(
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    ids: Mapping[str, int | None],
    *,
    add_bos: bool,
    add_eos: bool = False,
    chat_template: str | None = None,
) -> Parts:
    """Add the beginning and end tokens to a tokenizer, and say the same in its config."""
    special = {name: tokens[index] for name, index in ids.items() if index is not None}
    before = [special["bos"]] if add_bos and "bos" in special else []
    after = [special["eos"]] if add_eos and "eos" in special else []
    if before or after:
        used = {special[name]: int(ids[name] or 0) for name in ("bos", "eos") if name in special}
        pair = [
            *before,
            "$A",
            *after,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{t}:1" for t in after),
        ]
        tokenizer.post_processor = processors.Sequence(
            [
                *([tokenizer.post_processor] if tokenizer.post_processor else []),
                processors.TemplateProcessing(
                    single=[*before, "$A", *after], pair=pair, special_tokens=list(used.items())
                ),
            ]
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **{f"{name}_token": token for name, token in special.items()},
    }
    token_ids = {f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")}
    return Parts(tokenizer, config, chat_template or None, token_ids)


# -- byte-level BPE --


def _bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in _PRE:
        raise UserError(f"{source} splits text by {pre!r}; only {', '.join(_PRE)} are rebuilt")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise UserError(f"{source}: its vocabulary names a token twice")
    split, whole_words = _PRE[pre]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(tokenizer, tokens, types)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control and user-defined tokens single ids wherever they stand in a text."""
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in defined])


# -- sentencepiece --

Piece = tuple[str, float, int]


def sentencepiece_bpe(
    pieces: Sequence[Piece],
    *,
    add_prefix: bool = True,
    charsmap: bytes = b"",
    collapse_spaces: bool = False,
) -> Tokenizer:
    """A tokenizer that merges as sentencepiece's BPE does: always the pair whose piece scores highest.

    pieces are (text, score, type) in order of id. Every way to split a piece into two pieces is a merge, in
    the order of the pieces' scores.
    """
    tokens = [text for text, _, _ in pieces]
    vocab = {text: index for index, text in enumerate(tokens)}
    if len(vocab) != len(pieces):
        raise UserError("the sentencepiece vocabulary names a piece twice")
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, vocab),
        unk_token=_unknown(pieces),
        fuse_unk=True,
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )
    return _sentencepiece(Tokenizer(model), pieces, add_prefix, charsmap, collapse_spaces)


def sentencepiece_unigram(
    pieces: Sequence[Piece],
    *,
    add_prefix: bool = True,
    charsmap: bytes = b"",
    collapse_spaces: bool = False,
) -> Tokenizer:
    """A tokenizer that splits as sentencepiece's unigram model does: the split of the highest total score."""
    unknown = next((index for index, piece in enumerate(pieces) if piece[2] == UNKNOWN), None)
    model = models.Unigram(
        [(text, score) for text, score, _ in pieces],
        unk_id=unknown,
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )
    return _sentencepiece(Tokenizer(model), pieces, add_prefix, charsmap, collapse_spaces)


def _merges(pieces: Sequence[Piece], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    usable = {text for text, _, kind in pieces if kind in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = []
    for text, score, kind in pieces:
        if kind != NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _unknown(pieces: Sequence[Piece]) -> str | None:
    return next((text for text, _, kind in pieces if kind == UNKNOWN), None)


def _sentencepiece(
    tokenizer: Tokenizer, pieces: Sequence[Piece], add_prefix: bool, charsmap: bytes, collapse_spaces: bool
) -> Tokenizer:
    """The normalizer and decoder around a sentencepiece model (spaces as ▁, bytes as <0x..>)."""
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if add_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    texts, types = [text for text, _, _ in pieces], [kind for _, _, kind in pieces]
    _add_tokens(tokenizer, texts, [CONTROL if kind == UNKNOWN else kind for kind in types])
    return tokenizer


def from_sentencepiece(path: Path) -> Parts:
    """The tokenizer of a bare tokenizer.model (sentencepiece, Llama-2 style); UserError where it is damaged.

    tokenizer_config.json and added_tokens.json beside it are heeded; without them texts begin with <s>, as
    Llama's do.
    """
    try:
        model = _read_model(path.read_bytes())
        build = {1: sentencepiece_unigram, 2: sentencepiece_bpe}.get(model.algorithm)
        if build is None:
            raise UserError(f"{path} is a sentencepiece model of a kind (word or char) that is not rebuilt")
        tokenizer = build(
            model.pieces,
            add_prefix=model.add_prefix,
            charsmap=model.charsmap,
            collapse_spaces=model.collapse_spaces,
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # bare Exceptions of the tokenizers library, and every kind of damage
        raise UserError(f"{path} is not a sentencepiece model: {one_line(error)}") from None
    tokens = [text for text, _, _ in model.pieces]
    tokens += _add_beside(tokenizer, path.with_name("added_tokens.json"), len(tokens))
    settings = _object(path.with_name("tokenizer_config.json"))
    ids = {name: _named(settings, name, default, tokens) for name, default in _USUAL.items()}
    parts = finish(
        tokenizer,
        tokens,
        ids,
        add_bos=settings.get("add_bos_token", True) is not False,
        add_eos=settings.get("add_eos_token") is True,
        chat_template=settings.get("chat_template") if isinstance(settings.get("chat_template"), str) else None,
    )
    if isinstance(settings.get("model_max_length"), int):
        parts.config["model_max_length"] = settings["model_max_length"]
    return parts


_USUAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def _add_beside(tokenizer: Tokenizer, path: Path, count: int) -> list[str]:
    """Add the tokens of added_tokens.json, which must follow the model's own without a gap."""
    added = _object(path)
    order = sorted(added.items(), key=lambda item: str(item[1]).zfill(12))
    new = [token for token, index in order if not (isinstance(index, int) and index < count)]
    if [added[token] for token in new] != list(range(count, count + len(new))):
        raise UserError(f"{path}: its ids do not follow the {count} of tokenizer.model")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
    return new


def _named(settings: Mapping[str, Any], name: str, default: str, tokens: Sequence[str]) -> int | None:
    """The id of a special token as tokenizer_config.json names it, else the usual one, else None."""
    named = settings.get(f"{name}_token", default)
    named = named.get("content") if isinstance(named, dict) else named
    return tokens.index(named) if named in tokens else None


@dataclass
class _Model:
    """What sentencepiece's ModelProto says that matters here."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = 1
    charsmap: bytes = b""
    add_prefix: bool = True
    collapse_spaces: bool = True


def _read_model(data: bytes) -> _Model:
    """Read a serialized ModelProto (sentencepiece_model.proto: pieces 1, trainer 2, normalizer 3)."""
    model = _Model()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            if not math.isfinite(score):
                raise ValueError("a score is not finite")
            model.pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == 2:
            model.algorithm = dict(_fields(value)).get(3, 1)
        elif number == 3:
            normalizer = dict(_fields(value))
            model.charsmap = normalizer.get(2, b"")
            model.add_prefix = bool(normalizer.get(3, 1))
            model.collapse_spaces = bool(normalizer.get(4, 1))
    if not model.pieces:
        raise ValueError("it names no pieces")
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: int, or bytes for anything longer."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, position = _varint(data, position)
        if length is None or position + length > len(data):
            raise ValueError("a field runs past the end")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("a number runs past the end")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


# -- metadata --


def _array(metadata: Mapping[str, Any], key: str, count: int, default: float, source: str) -> Sequence[Any]:
    values = metadata.get(key)
    if values is None:
        return [default] * count
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise UserError(f"{source}: {key} does not hold {count} numbers")
    return list(values.tolist())


def _token_id(metadata: Mapping[str, Any], key: str, count: int, source: str) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise UserError(f"{source}: {key} must be an id below {count}, not {value!r}")
    return value


def tokenizer_of(path: Path, config: dict[str, Any]) -> Any:
    """The tokenizer of a model directory; UserError where transformers cannot make one of its files."""
    try:
        return load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # it reads config.json too, and raises what its validators raise
        raise UserError(f"the tokenizer of {path} cannot be loaded: {one_line(error)[:200]}") from None
