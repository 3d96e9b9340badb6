"""Writes a model directory's tokenizer as the metadata of a GGUF file.

GGUF names the rule by which text is split; it does not hold it. So every rule that llama.cpp has and this package can
rebuild is tried, and the one under which the rebuilt tokenizer encodes a set of awkward texts as the original does is
written. If none does, the tokenizer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..data import tokenizer_errors
from ..errors import UserError
from ..files import read_text
from ..models import tokenizer as tokenizers_of_models
from ..models.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PROBE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    end_tokens,
    tokenizer_of,
)
from .gguf_tokenizer import from_metadata

PROBES = (
    PROBE,
    "I'll don't WE'RE they'VE it's ' s 'tis",
    "3 14 159 2653 58979 1,234.50 v2.0 x86_64 ²³",
    "a  b   c    d\t\te\n\nf \n g\r\nh\r\n\r\n   i   ",
    " leading, trailing ",
    "e\u0301 é Å ﬀ Ⅳ ½ 한국어 ไทย हिन्दी العربية עברית",
    "🤗👩‍👩‍👧🇫🇷 ∑∞ «x» “y” — … {}[]()<>|\\/@#$%^&*",
    "def f(x):\n    return x ** 2  # comment\n\nclass A: pass",
    "camelCase snake_case SCREAMING kebab-case http://a.b/c?d=e&f=1",
)
OWN_TEXTS, OWN_TOKENS = 64, 64
SPLITS = ("smollm", "gpt-2", "llama-bpe", "qwen2")  # values of tokenizer.ggml.pre that differ, as llama.cpp has them
Metadata = dict[str, Any]


def metadata_of(directory: Path, config: Mapping[str, Any]) -> Metadata:
    """The keys `tokenizer.ggml.*` and `tokenizer.chat_template*` for a directory's tokenizer.

    Arrays of numbers are numpy's. Raises UserError if the tokenizer is of a kind that is not written.
    """
    backend, pieces = _backend(directory)
    described = _as_json(backend)
    tokens, types = _tokens(described, backend, pieces, int(config["vocab_size"]), directory)
    original = tokenizer_of(directory, config)
    shared: Metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        **_special(original, config, directory, len(tokens)),
        **_templates(original),
    }
    with tokenizer_errors(f"the tokenizer of {directory}"):
        probes = (*PROBES, *_own_probes(backend, types))
        wanted = [list(original.encode(text)) for text in probes]
    fitting = []
    for kind in _kinds(described, pieces, tokens):
        candidate = {**kind, **shared}
        with tokenizer_errors(f"the tokenizer of {directory}"):
            rebuilt = from_metadata(candidate, str(directory)).tokenizer
            if [rebuilt.encode(text).ids for text in probes] == wanted:
                fitting.append((_as_json(rebuilt)["pre_tokenizer"] != described["pre_tokenizer"], candidate))
    if fitting:  # the rule that is written the same way, if there is one
        return min(fitting, key=lambda pair: pair[0])[1]
    raise UserError(
        f"the tokenizer of {directory} splits text in a way that is not written to GGUF: llama.cpp's own "
        "convert_hf_to_gguf.py may know it"
    )


def _own_probes(backend: Tokenizer, types: list[int]) -> Iterator[str]:
    """Texts of the tokenizer's own ordinary tokens, so that what its merges reach across is tried."""
    ordinary = [index for index, kind in enumerate(types) if kind == NORMAL]
    step = max(1, len(ordinary) // (OWN_TEXTS * OWN_TOKENS))
    chosen = ordinary[::step]
    for first in range(0, len(chosen), OWN_TOKENS):
        yield backend.decode(chosen[first : first + OWN_TOKENS])


def _as_json(backend: Tokenizer) -> dict[str, Any]:
    """A tokenizer as the content of its tokenizer.json."""
    value: dict[str, Any] = json.loads(backend.to_str())
    return value


def _backend(directory: Path) -> tuple[Tokenizer, list[tokenizers_of_models.Piece] | None]:
    """The tokenizer, and the pieces with scores of a tokenizer.model."""
    path, model = directory / "tokenizer.json", directory / "tokenizer.model"
    pieces = tokenizers_of_models.pieces_of(model) if model.is_file() else None
    if path.is_file():
        with tokenizer_errors(f"{path} is damaged"):
            return Tokenizer.from_str(read_text(path)), pieces
    if pieces is None:
        raise UserError(f"{directory} has neither tokenizer.json nor tokenizer.model, one of which GGUF needs")
    return tokenizers_of_models.from_sentencepiece(model).tokenizer, pieces


def _tokens(
    described: Mapping[str, Any],
    backend: Tokenizer,
    pieces: list[tokenizers_of_models.Piece] | None,
    size: int,
    directory: Path,
) -> tuple[list[str], list[int]]:
    """Every token by its id and its type; ids without a token are filled, up to the number of embeddings."""
    by_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if not by_id or max(by_id) >= size:
        raise UserError(f"{directory}: its tokenizer has ids up to {max(by_id, default=0)}, its model only {size}")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    types = [NORMAL if index in by_id else UNUSED for index in range(size)]
    unknown = described["model"].get("unk_token")
    falls_back = described["model"].get("byte_fallback")
    for index, token in by_id.items():
        if falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = BYTE
    for entry in described.get("added_tokens") or []:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    if unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    for index, (text, _, kind) in enumerate(pieces or ()):
        if tokens[index] == text and kind in (UNKNOWN, CONTROL, BYTE, UNUSED):
            types[index] = kind
    return tokens, types


def _kinds(
    described: Mapping[str, Any], pieces: list[tokenizers_of_models.Piece] | None, tokens: list[str]
) -> Iterator[Metadata]:
    """The ways to describe the tokenizer: its kind, its merges or scores, and its rule for splitting."""
    model = described["model"]
    if model.get("type") != "BPE":
        return
    if not model.get("byte_fallback"):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        for split in SPLITS:
            yield {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": split,
                "tokenizer.ggml.merges": merges,
            }
        return
    scores = _scores(model, pieces, tokens)
    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _scores(model: Mapping[str, Any], pieces: list[tokenizers_of_models.Piece] | None, tokens: list[str]) -> np.ndarray:
    """A score for each token: sentencepiece's own, else the rank of the first merge that makes the token."""
    scores = np.zeros(len(tokens), np.float32)
    if pieces:
        for index, (_, score, _) in enumerate(pieces[: len(tokens)]):
            scores[index] = score
        return scores
    ids = {token: index for index, token in enumerate(tokens)}
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        made = "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
        if made in ids:
            scores[ids[made]] = -rank
    return scores


def _special(original: Any, config: Mapping[str, Any], directory: Path, count: int) -> Metadata:
    """The ids of special tokens, and which of them a text begins and ends with."""
    found: Metadata = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = getattr(original, f"{name}_token_id", None)
        if isinstance(index, int) and 0 <= index < count:
            found[f"tokenizer.ggml.{key}_token_id"] = index
    ends = [index for index in end_tokens(directory, config) if 0 <= index < count]
    if ends:
        eos = found.setdefault("tokenizer.ggml.eos_token_id", ends[0])
        others = [index for index in ends if index != eos]
        if others:
            found["tokenizer.ggml.eot_token_id"] = others[0]
    ids = list(original.encode("x"))
    bos, eos = found.get("tokenizer.ggml.bos_token_id"), found.get("tokenizer.ggml.eos_token_id")
    found["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    found["tokenizer.ggml.add_eos_token"] = eos is not None and ids[-1:] == [eos]
    return found


def _templates(original: Any) -> Metadata:
    """The chat templates, the default one and those with a name."""
    template = getattr(original, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = template if isinstance(template, dict) else {}
    return {"tokenizer.chat_template" + ("" if name == "default" else f".{name}"): text for name, text in named.items()}
