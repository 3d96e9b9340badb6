"""Checks and loads a model directory's tokenizer, and rebuilds one from sentencepiece's pieces.

transformers loads a tokenizer.json. A directory that has only sentencepiece's tokenizer.model gets one built from
its pieces; a GGUF file that stores sentencepiece pieces uses the same functions (convert/gguf_tokenizer.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from ..data import tokenizer_errors
from ..errors import UserError, one_line
from ..files import CONFIG, GENERATION_CONFIG, read_object, read_text
from .tokenizer_files import MORE_TEMPLATES, TOKENIZER_CONFIG, check_settings

# Token types: the same numbers in GGUF and in sentencepiece's ModelProto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"  # sentencepiece's sign for a space
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType

# The special tokens of Llama 2's tokenizer.model, used if tokenizer_config.json names no others.
_USUAL = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}

# A text that exercises a tokenizer: words, spaces, digits, accents, other scripts, and signs of several bytes.
PROBE = "The 1234 words,  naïve café\n\tÅngström 日本語 Привет 🤗 ﬁ½"

Piece = tuple[str, float, int]  # text, score, type


@dataclass
class Rebuilt:
    """A rebuilt tokenizer and the values of the files beside tokenizer.json.

    tokenizer       becomes tokenizer.json
    config          becomes tokenizer_config.json
    chat_template   becomes chat_template.jinja, if there is one
    more_templates  become additional_chat_templates/NAME.jinja
    token_ids       `bos_token_id`, `eos_token_id` and `pad_token_id` for config.json: an id, None if unknown, or the
                    list of all ids that end a text
    """

    tokenizer: Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    more_templates: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, int | list[int] | None] = field(default_factory=dict)


# -- check and load --


def check_tokenizer(directory: Path) -> None:
    """Raise UserError if a model directory has no tokenizer, if one of its files is damaged, or if it needs code.

    A damaged tokenizer.json may load and fail later, so a few characters of many kinds are encoded too.
    """
    check_settings(directory)
    path = directory / "tokenizer.json"
    if path.is_file():
        text = read_text(path)
        with tokenizer_errors(f"{path} is damaged"):
            tokenizer = Tokenizer.from_str(text)
            for special in (True, False):
                with suppress(Exception):  # a text may have no tokens, but must not make Rust code panic
                    tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=special).ids)
    elif (directory / "tokenizer.model").is_file():
        from_sentencepiece(directory / "tokenizer.model")
    elif not ((directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()):
        raise UserError(f"{directory} has no tokenizer: it needs tokenizer.json or tokenizer.model")


def tokenizer_of(directory: Path, config: Mapping[str, Any]) -> Any:
    """Load a model directory's tokenizer in mlx-lm's wrapper.

    config is the model's config; generation stops at its end tokens (see `end_tokens`).
    Raises UserError if transformers cannot load the tokenizer.
    """
    from mlx_lm.utils import load_tokenizer

    ends = end_tokens(directory, config)
    options = {**check_settings(directory), "trust_remote_code": False}
    with tokenizer_errors(f"the tokenizer of {directory} cannot be loaded"):
        return load_tokenizer(directory, options, eos_token_ids=ends)


def end_tokens(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """The ids at which generation stops: those of generation_config.json, else those of config, as in mlx-lm.

    Raises UserError if a file does not hold an id or a list of ids.
    """
    source, ends = directory / CONFIG, config.get("eos_token_id")
    if (directory / GENERATION_CONFIG).is_file():
        generation = read_object(directory / GENERATION_CONFIG).get("eos_token_id")
        if generation is not None:
            source, ends = directory / GENERATION_CONFIG, generation
    try:
        return token_ids("eos_token_id", ends)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def token_ids(name: str, value: Any) -> list[int]:
    """The token ids of a setting: none, one, or for eos_token_id a list; ValueError for any other value."""
    ids = [] if value is None else value if isinstance(value, list) and name == "eos_token_id" else [value]
    if not all(type(token) is int for token in ids):
        several = " or a list of token ids" if name == "eos_token_id" else ""
        raise ValueError(f"{name} must be a token id{several}")
    return ids


# -- write --


def finish(
    tokenizer: Tokenizer,
    tokens: Sequence[str],
    ids: Mapping[str, int | None],
    *,
    add_bos: bool,
    add_eos: bool = False,
    chat_template: str | None = None,
) -> Rebuilt:
    """Add the beginning and end tokens to a tokenizer, and write the same settings into its config.

    tokens are the vocabulary in order of id; ids are the special tokens' ids by name (bos, eos, unk, pad).
    """
    special = {name: tokens[index] for name, index in ids.items() if index is not None}
    before = [special["bos"]] if add_bos and "bos" in special else []
    after = [special["eos"]] if add_eos and "eos" in special else []
    if before or after:
        second = [f"{token}:1" for token in (*before, "$B", *after)]
        template = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *second],
            special_tokens=[(special[name], int(ids[name] or 0)) for name in ("bos", "eos") if name in special],
        )
        earlier = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence([*earlier, template])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **{f"{name}_token": token for name, token in special.items()},
    }
    return Rebuilt(
        tokenizer,
        config,
        chat_template or None,
        token_ids={f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")},
    )


def write(directory: Path, rebuilt: Rebuilt) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates."""
    (directory / "tokenizer.json").write_text(rebuilt.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    text = json.dumps(rebuilt.config, indent=2, ensure_ascii=False, sort_keys=True)
    (directory / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
    if rebuilt.chat_template:
        (directory / "chat_template.jinja").write_text(rebuilt.chat_template, encoding="utf-8")
    for name, template in rebuilt.more_templates.items():
        (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
        (directory / MORE_TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8")


# -- sentencepiece --


def from_sentencepiece(path: Path) -> Rebuilt:
    """Rebuild the tokenizer of a tokenizer.model, following sentencepiece_model.proto.

    Reads tokenizer_config.json and added_tokens.json beside the file. Without them texts begin with <s>, as Llama 2's
    do. Raises UserError if the file is damaged or holds a word or char model.
    """
    with tokenizer_errors(f"{path} is not a sentencepiece model"):
        model = _parse(path)
        kind = model.trainer_spec.model_type
        build = {UNIGRAM: sentencepiece_unigram, BPE: sentencepiece_bpe}.get(kind)
        if build is None:
            raise UserError(f"{path} is a sentencepiece word or char model: only unigram and bpe models are read")
        pieces = _pieces(model)
        tokenizer = build(
            pieces,
            add_prefix=model.normalizer_spec.add_dummy_prefix,
            charsmap=model.normalizer_spec.precompiled_charsmap,
            collapse_spaces=model.normalizer_spec.remove_extra_whitespaces,
        )
    tokens = [text for text, _, _ in pieces]
    tokens += _add_tokens_from(tokenizer, path.with_name("added_tokens.json"), len(tokens))
    settings = _settings(path.with_name(TOKENIZER_CONFIG))
    template = settings.get("chat_template")
    rebuilt = finish(
        tokenizer,
        tokens,
        {name: _special_id(settings, name, default, tokens) for name, default in _USUAL.items()},
        add_bos=settings.get("add_bos_token", True) is not False,
        add_eos=settings.get("add_eos_token") is True,
        chat_template=template if isinstance(template, str) else None,
    )
    if isinstance(settings.get("model_max_length"), int):
        rebuilt.config["model_max_length"] = settings["model_max_length"]
    return rebuilt


def pieces_of(path: Path) -> list[Piece]:
    """The pieces of a tokenizer.model in order of id; UserError if the file is damaged."""
    with tokenizer_errors(f"{path} is not a sentencepiece model"):
        return _pieces(_parse(path))


def _pieces(model: Any) -> list[Piece]:
    return [(piece.piece, piece.score, piece.type) for piece in model.pieces]


def _parse(path: Path) -> Any:
    """The ModelProto in `path`; ValueError if it has no pieces or a score that is not finite."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # not installed, or a protobuf older than the one sentencepiece was built with
        raise UserError(f"{path} needs sentencepiece's protobuf ({one_line(error)}): update protobuf") from None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not model.pieces:
        raise ValueError("it has no pieces")
    if not all(math.isfinite(piece.score) for piece in model.pieces):
        raise ValueError("a score is not finite")
    return model


def sentencepiece_bpe(
    pieces: Sequence[Piece],
    *,
    add_prefix: bool = True,
    charsmap: bytes = b"",
    collapse_spaces: bool = False,
) -> Tokenizer:
    """A tokenizer that merges as sentencepiece's BPE does: always the pair whose piece has the highest score.

    pieces are in order of id. Every way to split a piece into two pieces becomes a merge, in the order of the pieces'
    scores. Raises ValueError if a piece occurs twice.
    """
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError("a piece occurs twice")
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, vocab),
        unk_token=next((text for text, _, kind in pieces if kind == UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )
    return _with_spaces(Tokenizer(model), pieces, add_prefix, charsmap, collapse_spaces)


def sentencepiece_unigram(
    pieces: Sequence[Piece],
    *,
    add_prefix: bool = True,
    charsmap: bytes = b"",
    collapse_spaces: bool = False,
) -> Tokenizer:
    """A tokenizer that splits as sentencepiece's unigram model does: the split with the highest total score.

    pieces are in order of id. Raises ValueError if a piece occurs twice.
    """
    if len({text for text, _, _ in pieces}) != len(pieces):
        raise ValueError("a piece occurs twice")
    model = models.Unigram(
        [(text, score) for text, score, _ in pieces],
        unk_id=next((index for index, piece in enumerate(pieces) if piece[2] == UNKNOWN), None),
        byte_fallback=any(kind == BYTE for _, _, kind in pieces),
    )
    return _with_spaces(Tokenizer(model), pieces, add_prefix, charsmap, collapse_spaces)


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


def _with_spaces(
    tokenizer: Tokenizer, pieces: Sequence[Piece], add_prefix: bool, charsmap: bytes, collapse_spaces: bool
) -> Tokenizer:
    """Add sentencepiece's normalizer and decoder: spaces are ▁, unknown bytes are <0x..>."""
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
    add_tokens(tokenizer, texts, [CONTROL if kind == UNKNOWN else kind for kind in types])
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make each control and user-defined token one id wherever it occurs in a text.

    tokens and types have the same length and are in order of id.
    """
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])


def _settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file beside tokenizer.model, or an empty dict if there is no such file."""
    return read_object(path) if path.is_file() else {}


def _add_tokens_from(tokenizer: Tokenizer, path: Path, count: int) -> list[str]:
    """Add the tokens of added_tokens.json, whose ids must follow the model's `count` ids without a gap."""
    added = _settings(path)
    in_order = sorted(added.items(), key=lambda item: str(item[1]).zfill(12))
    new = [token for token, index in in_order if not (isinstance(index, int) and index < count)]
    if [added[token] for token in new] != list(range(count, count + len(new))):
        raise UserError(f"{path}: its ids do not follow the {count} of tokenizer.model")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
    return new


def _special_id(settings: Mapping[str, Any], name: str, default: str, tokens: Sequence[str]) -> int | None:
    """The id of a special token: tokenizer_config.json's name for it, else the usual one; None if not a token."""
    token = settings.get(f"{name}_token", default)
    token = token.get("content") if isinstance(token, dict) else token
    return tokens.index(token) if token in tokens else None
