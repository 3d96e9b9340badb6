"""Documents -> one stream of tokens, equal to what mlx-lm's data set classes make of the same rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .chat import chat_tokens
from .pieces import pieces_of_tokens
from .rows import Conversation, Document, TextRow, kind_of
from .tokens import Tokenizer, added_tokens

Around = Callable[[], tuple[list[int], list[int]]]  # the tokens before and after a row with `text`
Part = tuple[list[int], bool]  # token ids, and whether they count in cross-entropy


@dataclass(frozen=True)
class Stream:
    """The tokens of documents, one document after another.

    tokens: (N,) int32. starts: (D,) int64, where each document begins; in a text, an end-of-text token ends a document,
    in a conversation it does not. kinds: how many tokens are of each kind of
    document. answers: (N,) bool, the tokens that count in cross-entropy; None if all count.
    """

    tokens: np.ndarray
    starts: np.ndarray
    kinds: Mapping[str, int] = field(default_factory=dict)
    answers: np.ndarray | None = None


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, *, limit: int) -> np.ndarray:
    """The first `limit` tokens of the documents, (N,) int32; see `read_stream`."""
    return read_stream(documents, tokenizer, limit=limit).tokens


def read_stream(
    documents: Iterable[Document], tokenizer: Tokenizer, *, limit: int, mask_prompt: bool = False
) -> Stream:
    """The stream of the first `limit` tokens of the documents.

    A text is followed by the end-of-text token if there is one. A row has the tokens that mlx-lm's data set classes
    make of it: `text` with the tokenizer's special tokens and the end-of-text token, a conversation as the chat
    template renders it. Texts are tokenized in pieces; the tokens are those of the complete text.

    Args:
        mask_prompt: only the last message of each conversation counts in cross-entropy.
    Raises:
        UserError: the tokenizer or its chat template fails on a document, or prompts are to be masked in text.
    """
    arrays: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    starts: list[int] = []
    kinds: dict[str, int] = {}
    have = 0
    end = _end(tokenizer)
    around = functools.cache(lambda: added_tokens(tokenizer))
    for document in documents:
        starts.append(have)
        kind = kind_of(document)
        for ids, counts in _parts(document, tokenizer, mask_prompt, around):
            ids = ids[: limit - have]
            arrays.append(np.asarray(ids, np.int32))
            if not isinstance(document, Conversation) and end:
                starts += (have + 1 + np.flatnonzero(arrays[-1] == end[0])).tolist()
            answers.append(np.full(len(ids), counts))
            kinds[kind] = kinds.get(kind, 0) + len(ids)
            have += len(ids)
            if have >= limit:
                break
        if have >= limit:  # before another document is read
            break
    return Stream(
        np.concatenate(arrays) if arrays else np.zeros(0, np.int32),
        np.unique(np.asarray([start for start in starts if start < have], np.int64)),
        kinds,
        np.concatenate([*answers, np.zeros(0, bool)]) if mask_prompt else None,
    )


def _parts(document: Document, tokenizer: Tokenizer, mask_prompt: bool, around: Around) -> Iterator[Part]:
    """The tokens of one document, part by part."""
    if isinstance(document, Conversation):
        ids, prompt = chat_tokens(document, tokenizer, mask_prompt=mask_prompt)
        yield ids[:prompt], False
        yield ids[prompt:], True
    elif mask_prompt:
        place = document.place if isinstance(document, TextRow) else "--data"
        raise UserError(
            f"{place} is text without prompts: --mask-prompt needs rows with `messages`, or `prompt` and `completion`"
        )
    elif isinstance(document, TextRow):
        yield from _text_row(document.text, tokenizer, around)
    else:
        for ids in pieces_of_tokens(document, tokenizer):
            yield ids, True
        yield _end(tokenizer), True


def _text_row(text: str, tokenizer: Tokenizer, around: Around) -> Iterator[Part]:
    """The tokens of a row with `text`; the end-of-text token is not repeated, as in mlx-lm."""
    before, after = around()
    last: list[int] = []
    for ids in (before, *pieces_of_tokens(text, tokenizer), after):
        yield ids, True
        last = ids[-1:] or last
    if last != _end(tokenizer):
        yield _end(tokenizer), True


def _end(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
