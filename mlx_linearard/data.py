"""Text of any form the contract lists -> token blocks of one length, in an order that a cursor resumes."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .errors import UserError, one_line

HUB_PREFIX = "hf:"
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMS = ".txt or .jsonl, each optionally .gz or .xz"


class Tokenizer(Protocol):
    """What is asked of a tokenizer (mlx-lm's wrapper and transformers' both have it)."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


# ---------------------------------------------------------------------------------------------------
# Text: add a form by giving its suffix a reader here.


def read_documents(source: str) -> Iterator[str]:
    """Documents of `source`: a .txt, a folder of .txt, a .jsonl with `text` (.gz, .xz), or hf:NAME.

    Raises UserError where it is missing, empty, binary, or not what its name says.
    """
    if source.startswith(HUB_PREFIX):
        yield from _hub(source.removeprefix(HUB_PREFIX))
        return
    path = Path(source)
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield from _file(path)
    else:
        raise UserError(
            f"{source} does not exist: give {_FORMS}, a folder of .txt, or {HUB_PREFIX}NAME for a hub dataset"
        )


def _folder(path: Path) -> Iterator[str]:
    found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) == ".txt")
    if not found:
        raise UserError(f"{path} holds no .txt file")
    for file in found:
        yield from _file(file)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _OPENERS else path.suffix.lower()


def _file(path: Path) -> Iterator[str]:
    readers = {".txt": _text, ".jsonl": _json_lines}
    reader = readers.get(_kind(path))
    if reader is None:
        raise UserError(f"{path} is not a form of text that is read here: give {_FORMS}")
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            yield from reader(path, handle)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def _text(path: Path, handle: IO[str]) -> Iterator[str]:
    text = handle.read()
    if "\0" in text:
        raise UserError(f"{path} is binary, not text")
    if not text.strip():
        raise UserError(f"{path} is empty")
    yield text


def _json_lines(path: Path, handle: IO[str]) -> Iterator[str]:
    empty = True
    for number, line in enumerate(handle, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not valid JSON: {error}") from None
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path} line {number} has no `text` field that holds text")
        empty = empty and not text.strip()
        yield text
    if empty:
        raise UserError(f"{path} is empty")


def _hub(name: str) -> Iterator[str]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"{HUB_PREFIX}{name} needs the extra `datasets`: pip install 'mlx-linearard[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the hub's client raises, it is the name or the network
        raise UserError(f"{HUB_PREFIX}{name} cannot be loaded: {one_line(error)}") from None
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise UserError(f"{HUB_PREFIX}{name} has no `text` column, but {', '.join(sorted(row))}")
        yield row["text"]


def python_prose() -> Iterator[str]:
    """The prose that every Python installation carries: its language reference, as pydoc shows it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("this Python carries no documentation to train on: give text with --data") from None
    for name in sorted(topics):
        yield topics[name]


# ---------------------------------------------------------------------------------------------------
# Tokens


def tokenize(documents: Iterable[str], tokenizer: Tokenizer, *, limit: int) -> np.ndarray:
    """One stream of at most `limit` tokens, documents ended by the end-of-text token where there is one; (N,) int32."""
    pieces: list[np.ndarray] = []
    have = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in documents:
        ids = np.asarray([*tokenizer.encode(text, add_special_tokens=False), *end], dtype=np.int32)
        pieces.append(ids)
        have += len(ids)
        if have >= limit:
            break
    return np.concatenate(pieces)[:limit] if pieces else np.zeros(0, np.int32)


def hash_of(*tokens: np.ndarray) -> str:
    """A short hash of token arrays, one behind another."""
    digest = hashlib.sha256()
    for array in tokens:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Blocks:
    """Training blocks cut from one token stream, in a seeded order that depends on nothing else.

    Batch number n is the same whatever was read before it, so the number of batches taken is the whole
    cursor: a resumed run continues with the blocks the interrupted one would have read.
    """

    tokens: np.ndarray  # (N,) int32
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens, too few for one block of {self.seq_len + 1}: "
                "give more text with --data or a shorter --seq-len"
            )

    @property
    def count(self) -> int:
        """Blocks in one pass over the text."""
        return (len(self.tokens) - 1) // self.seq_len

    def batch(self, number: int, size: int) -> np.ndarray:
        """Batch `number` of `size` blocks, (size, seq_len + 1) int32; each block's last token is only a target."""
        return np.stack([self._block(number * size + i) for i in range(size)])

    def _block(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.count)
        start = int(self._order(epoch)[place]) * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` windows of length + 1 tokens, spread evenly over the stream; (n, length + 1) int32."""
    possible = (len(tokens) - 1) // length
    taken = min(count, possible)
    starts = [(i * possible // taken) * length for i in range(taken)]
    return np.stack([tokens[s : s + length + 1] for s in starts]) if taken else np.zeros((0, length + 1), np.int32)


def split(tokens: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out): the last `held_out` tokens, but never more than a fifth, are kept from training."""
    cut = len(tokens) - min(held_out, len(tokens) // 5)
    return tokens[:cut], tokens[cut:]
