"""Text in any supported form -> token stream -> blocks of one length, in an order that a cursor can resume.

Text is read and tokenized in pieces, so memory does not grow with the length of a file, compressed or not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import itertools
import lzma
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from .errors import UserError, one_line
from .files import check_file, parse_json, reading, without_surrogates
from .rope import family_or_default

HUB_PREFIX = "hf:"
FORMS = ".txt or .jsonl, each optionally .gz or .xz"
PIECE = 1 << 16  # characters that are read and tokenized at once
MAX_LINE = 1 << 26  # characters of a line of .jsonl
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}

Document = str | Iterable[str]  # a text, or its consecutive pieces


class Tokenizer(Protocol):
    """The part of a tokenizer that this file uses; mlx-lm's wrapper and transformers' tokenizers have it."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


# ---------------------------------------------------------------------------------------------------
# Text: to add a form, give its suffix a reader in `_file`.


def read_documents(source: str) -> Iterator[str]:
    """The documents of `source` as complete texts; see `read_pieces`."""
    return map("".join, read_pieces(source))


def read_pieces(source: str) -> Iterator[Iterable[str]]:
    """The documents of `source`, each as its pieces, which must be read before the next document.

    source: a .txt, a folder of .txt, a .jsonl with `text` (each optionally .gz or .xz), or hf:NAME. A lone
    surrogate in JSON becomes U+FFFD. Raises UserError if the source is missing, empty, binary, or damaged.
    """
    if source.startswith(HUB_PREFIX):
        return _hub(source.removeprefix(HUB_PREFIX))
    path = Path(source)
    with reading(path):
        try:
            folder = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist: give {FORMS}, a folder of .txt, or {HUB_PREFIX}NAME for a hub dataset"
            ) from None
    return _folder(path) if folder else _file(path)


def _folder(path: Path) -> Iterator[Iterable[str]]:
    with reading(path):
        next(path.iterdir(), None)  # raises without permission, where rglob yields nothing
        files = sorted(p for p in path.rglob("*") if _kind(p) == ".txt" and p.is_file())
    if not files:
        raise UserError(f"{path} holds no .txt file")
    for file in files:
        yield from _file(file)


def _kind(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _OPENERS else path.suffix.lower()


def _file(path: Path) -> Iterator[Iterable[str]]:
    kind = _kind(path)
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{path} is not a supported form of text: give {FORMS}")
    check_file(path)
    if kind == ".txt":
        yield _text(path)
    else:
        yield from ([text] for text in _json_lines(path))


def open_text(path: Path) -> IO[str]:
    """A UTF-8 file, plain or compressed as .gz or .xz, open for reading without its byte order mark."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    handle: IO[str] = opener(path, "rt", encoding="utf-8-sig")
    return handle


def _text(path: Path) -> Iterator[str]:
    """The pieces of a text file."""
    empty = True
    with reading(path), open_text(path) as handle:
        while piece := handle.read(PIECE):
            if "\0" in piece:
                raise UserError(f"{path} is binary, not text")
            empty = empty and piece.isspace()
            yield piece
    if empty:
        raise UserError(f"{path} is empty")


def _json_lines(path: Path) -> Iterator[str]:
    empty = True
    for place, line in read_lines(path):
        value = parse_json(line, place, replace_surrogates=True)
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place} has no `text` field that holds text")
        empty = empty and not text.strip()
        yield text
    if empty:
        raise UserError(f"{path} is empty")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is not blank; `place` is "FILE line N". UserError if the file is damaged."""
    with reading(path), open_text(path) as handle:
        number = 0
        while line := handle.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(f"{path} line {number} has more than {MAX_LINE} characters: split it, or give a .txt")
            if line.strip():
                yield f"{path} line {number}", line


def _hub(name: str) -> Iterator[Iterable[str]]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"{HUB_PREFIX}{name} needs the extra `datasets`: pip install 'mlx-linearard[datasets]'"
        ) from None
    try:
        rows = iter(datasets.load_dataset(name, split="train", streaming=True))
        while (row := next(rows, None)) is not None:
            if not isinstance(row.get("text"), str):
                raise UserError(f"{HUB_PREFIX}{name} has no `text` column, but {', '.join(sorted(row))}")
            yield [without_surrogates(row["text"])]
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many types for a wrong name or without a network
        raise UserError(f"{HUB_PREFIX}{name} cannot be loaded: {one_line(error)}") from None


def python_prose() -> Iterator[str]:
    """The prose in every Python installation: its language reference, as pydoc shows it."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError("this Python has no documentation to train on: give text with --data") from None
    for name in sorted(topics):
        yield topics[name]


# ---------------------------------------------------------------------------------------------------
# Tokens


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, *, limit: int) -> np.ndarray:
    """The first `limit` tokens of the documents, each followed by the end-of-text token if there is one; (N,) int32.

    Documents are tokenized in pieces; the tokens are those of the complete text (see `_pieces_of_tokens`).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[np.ndarray] = []
    have = 0
    for document in documents:
        for ids in _with_end(_pieces_of_tokens(document, tokenizer), end):
            pieces.append(np.asarray(ids, np.int32))
            have += len(ids)
            if have >= limit:
                return np.concatenate(pieces)[:limit]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def _with_end(pieces: Iterator[list[int]], end: list[int]) -> Iterator[list[int]]:
    yield from pieces
    yield end


@contextlib.contextmanager
def tokenizer_errors(subject: str) -> Iterator[None]:
    """Turn any failure of the tokenizer libraries in the block into a UserError that starts with `subject`.

    The tokenizers library raises bare Exceptions. When its Rust code panics, it prints on standard error and raises
    pyo3's PanicException, which is not an Exception.
    """
    try:
        with _no_standard_error():
            yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{subject}: {one_line(error)[:200]}") from None


_ONE_THREAD = threading.RLock()  # two threads that replace standard error would restore the wrong file


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
    """Drop what is written to standard error while the block runs, by code in any language."""
    with _ONE_THREAD:
        try:
            saved = os.dup(2)
        except OSError:  # closed
            yield
            return
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def encode(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """The token ids of `text`, with the special tokens that the tokenizer adds if `special`.

    Lone surrogates become U+FFFD. Raises UserError if the tokenizer fails.
    """
    with tokenizer_errors("the tokenizer failed on text; is its tokenizer.json damaged? The cause"):
        ids = list(tokenizer.encode(without_surrogates(text), add_special_tokens=special))
    if ids and max(ids) > np.iinfo(np.int32).max:
        raise UserError(
            f"the tokenizer makes token {max(ids)}, a number that no model has; is its tokenizer.json damaged?"
        )
    return ids


def first_token(tokenizer: Tokenizer, config: Mapping[str, Any] | None = None) -> int | None:
    """The token that a text must begin with; None if there is none.

    This is the token that the tokenizer puts before a text when it adds special tokens. Some families
    always have a first token, because they compute nonsense without one (`Family.first_token`).
    """
    plain, special = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    if len(special) > len(plain) and special[1 : 1 + len(plain)] == plain:
        return int(special[0])
    if family_or_default(config or {}).first_token:
        return getattr(tokenizer, "bos_token_id", None)
    return None


def check_ids(ids: Sequence[int] | np.ndarray, config: Mapping[str, Any], name: object) -> None:
    """UserError if a token id has no row in the embedding of the model `name`."""
    rows = config.get("vocab_size")
    if isinstance(rows, int) and len(ids) and (largest := int(np.max(ids))) >= rows:
        raise UserError(
            f"the tokenizer of {name} makes token {largest}, but the model has only {rows} embeddings: use the "
            "tokenizer that belongs to the model"
        )


# A cut in a document is safe if the tokens on each side of it do not depend on the text on the other side.
_OVERLAP = 2048  # characters that are tokenized twice to find a safe cut
_SHIFTS = 16  # places that are tried: runs of one character or digit are tokenized in groups of up to this many
_LONGEST = 1 << 24  # characters without a safe cut, after which a cut is made even if it is not safe


def _pieces_of_tokens(document: Document, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The tokens of a document, piece by piece.

    A piece ends where its tokens agree with those of a text that begins later. So the pieces are the tokens of the
    complete document, for any tokenizer whose tokens depend on the text near them.
    """
    text, skip, size = "", 0, PIECE  # the text that is left; the tokens of it that are done; when a cut is tried
    for part in _parts(document):
        text += part
        if len(text) < size:
            continue
        ids = encode(tokenizer, text)
        cut = _safe_cut(text, ids, tokenizer)
        if cut and cut.done >= skip:
            yield ids[skip : cut.done]
            text, skip, size = text[cut.start :], cut.skip, PIECE
        elif len(text) >= _LONGEST:
            yield ids[skip:]
            text, skip, size = "", 0, PIECE
        else:
            size = 2 * len(text)
    if text:
        yield encode(tokenizer, text)[skip:]


def _parts(document: Document) -> Iterator[str]:
    """The text of a document in parts of at most PIECE characters."""
    for text in [document] if isinstance(document, str) else document:
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]


@dataclass(frozen=True)
class _Cut:
    """Tokens before `done` are final. The rest are those of the text from `start` on, without its first `skip`."""

    done: int
    start: int
    skip: int


def _safe_cut(text: str, ids: list[int], tokenizer: Tokenizer) -> _Cut | None:
    """A safe cut near the end of `text`, whose tokens are `ids`; None if there is none."""
    for start in _starts(text):
        later = encode(tokenizer, text[start:])
        same = _common(reversed(ids), reversed(later))  # tokens that do not depend on the text before `start`
        skip = len(later) - same
        shorter = encode(tokenizer, text[start : (start + len(text)) // 2])
        if 2 * same > len(later) > 8 and _common(later, shorter) > skip:  # nor do those at the cut on the end of `text`
            return _Cut(len(ids) - same, start, skip)
    return None


def _starts(text: str) -> Iterator[int]:
    """Places for a cut: the first white space in the overlap, then a few places in a row."""
    begin = len(text) - _OVERLAP
    spaces = (i for i in range(begin, begin + _OVERLAP // 4) if text[i].isspace() and not text[i - 1].isspace())
    yield from itertools.islice(spaces, 1)
    yield from range(begin, begin + _SHIFTS)


def _common(a: Iterable[int], b: Iterable[int]) -> int:
    """How many leading items of `a` and `b` are equal."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def hash_of(*tokens: np.ndarray) -> str:
    """A short hash of token arrays in order."""
    digest = hashlib.sha256()
    for array in tokens:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Blocks:
    """Training blocks cut from one token stream, in an order that depends on the seed alone.

    Batch number n does not depend on earlier batches, so the number of batches taken is the cursor: a resumed run
    continues with the blocks that the stopped run would have read.

    tokens: (N,) int32. first: the token that each block begins with, if the model needs one.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int
    first: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"the training text has {len(self.tokens)} tokens, too few for one block of {self.seq_len + 1}: "
                "give more text with --data or a shorter --seq-len"
            )

    @property
    def count(self) -> int:
        """Blocks in one pass over the text."""
        return (len(self.tokens) - (self.first is None)) // self.seq_len

    def batch(self, number: int, size: int) -> np.ndarray:
        """Batch `number` of `size` blocks, (size, seq_len + 1) int32. The last token of a block is only a target."""
        return np.stack([self._block(number * size + i) for i in range(size)])

    def _block(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.count)
        start = int(self._order(epoch)[place]) * self.seq_len
        if self.first is None:
            return self.tokens[start : start + self.seq_len + 1]
        return np.concatenate([[self.first], self.tokens[start : start + self.seq_len]]).astype(np.int32)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


def windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` windows of length + 1 tokens, spaced evenly over the stream; (n, length + 1) int32."""
    possible = (len(tokens) - 1) // length
    taken = min(count, possible)
    starts = [(i * possible // taken) * length for i in range(taken)]
    return np.stack([tokens[s : s + length + 1] for s in starts]) if taken else np.zeros((0, length + 1), np.int32)


def split(tokens: np.ndarray, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out): the last `held_out` tokens are held out, but never more than a fifth of all tokens."""
    cut = len(tokens) - min(held_out, len(tokens) // 5)
    return tokens[:cut], tokens[cut:]
