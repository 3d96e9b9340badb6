"""The tokens of a long text, piece by piece; they are the tokens of the complete text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .tokens import Tokenizer, encode

Text = str | Iterable[str]  # a text, or its consecutive pieces
PIECE = 1 << 16  # characters that are tokenized at once

# A cut in a document is safe if the tokens on each side of it do not depend on the text on the other side.
_OVERLAP = 2048  # characters that are tokenized twice to find a safe cut
_SHIFTS = 16  # places that are tried: runs of one character or digit are tokenized in groups of up to this many
_LONGEST = 1 << 24  # characters without a safe cut, after which a cut is made even if it is not safe


def pieces_of_tokens(document: Text, tokenizer: Tokenizer) -> Iterator[list[int]]:
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


def _parts(document: Text) -> Iterator[str]:
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
