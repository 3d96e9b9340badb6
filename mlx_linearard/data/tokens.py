"""A tokenizer behind one-line errors: ids of a text, the first token, and the check of ids against a model."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import UserError, one_line
from ..files import without_surrogates
from ..rope import family_or_default


class Tokenizer(Protocol):
    """The part of a tokenizer that this room uses; mlx-lm's wrapper and transformers' tokenizers have it.

    Conversations also need `apply_chat_template` (see chat.py).
    """

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


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
    return checked(ids)


def checked(ids: list[int]) -> list[int]:
    """`ids`; UserError if one of them is a number that no model has."""
    if ids and max(ids) > np.iinfo(np.int32).max:
        raise UserError(
            f"the tokenizer makes token {max(ids)}, a number that no model has; is its tokenizer.json damaged?"
        )
    return ids


def added_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts (before, after) a text when it adds special tokens."""
    plain, special = encode(tokenizer, "a"), encode(tokenizer, "a", special=True)
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start], special[start + len(plain) :]
    return [], []


def first_token(tokenizer: Tokenizer, config: Mapping[str, Any] | None = None) -> int | None:
    """The token that a text must begin with; None if there is none.

    This is the token that the tokenizer puts before a text when it adds special tokens. Some families
    always have a first token, because they compute nonsense without one (`Family.first_token`).
    """
    before, _ = added_tokens(tokenizer)
    if len(before) == 1:
        return int(before[0])
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
