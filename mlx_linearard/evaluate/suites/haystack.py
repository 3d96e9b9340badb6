"""Text to hide something in, cut to a number of tokens of a model's own tokenizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ...data import Document, texts_of
from ...errors import UserError

KEPT = 8  # number of texts whose tokens the search for a size keeps
FIRST = 0.1  # the search begins with this share of the size that has one token per word
CLOSE = 0.995  # the search stops at this share of the budget
WORD = 32  # characters; a longer word (of a language without spaces, of a table of digits) is cut into several
# Words; a piece of a long word counts as ten. A longer sentence (text without full stops) is cut, so that needles
# can be placed in it.
SENTENCE = 200
_CUT = "\0"  # marks the end of a word that continues in the next one
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Prose:
    """A user's text as words. They may be taken from any place, and a short text is repeated."""

    text: str
    _words: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_words", [part for word in self.text.split() for part in _parts(word)])
        if not self._words:
            raise UserError("the text for haystacks is empty: give prose with --data")

    @property
    def words(self) -> int:
        return len(self._words)

    @functools.cached_property
    def vocabulary(self) -> list[str]:
        """The distinct lower-case words of four to ten letters, in alphabetical order."""
        return sorted(set(re.findall(r"(?<![A-Za-z'’-])[a-z]{4,10}(?![A-Za-z'’-])", self.text)))

    def take(self, count: int, start: int = 0) -> list[str]:
        """`count` words from word `start` on, then from the first word again. `join` makes text of them."""
        if count < 1:
            return []
        start %= self.words
        first = self._words[start : start + count]
        rounds, rest = divmod(count - len(first), self.words)
        return [*first, *(self._words * rounds), *self._words[:rest]]


def _parts(word: str) -> list[str]:
    """A word, cut into pieces if it is longer than `WORD` characters."""
    if len(word) <= WORD:
        return [word]
    pieces = re.findall(r".{1,15}?[。！？]|.{1,16}", word)
    return [*(piece + _CUT for piece in pieces[:-1]), pieces[-1]]


def join(words: Iterable[str]) -> str:
    """Words as text, with spaces between them but not between the pieces of a long word."""
    return " ".join(words).replace(f"{_CUT} ", "").replace(_CUT, "")


def prose(documents: Iterable[Document], limit: int = 4_000_000) -> Prose:
    """The first documents, up to about `limit` characters."""
    texts: list[str] = []
    left = limit
    for document in documents:
        texts.append(_beginning(document, left))
        left -= len(texts[-1])
        if left <= 0:
            break
    return Prose("\n\n".join(texts))


def _beginning(document: Document, limit: int) -> str:
    """At most `limit` characters of a document."""
    pieces: list[str] = []
    left = limit
    for piece in texts_of(document):
        pieces.append(piece[:left])
        left -= len(pieces[-1])
        if left <= 0:
            break
    return "".join(pieces)


def noise(words: int) -> str:
    """`words` words of a filler of five sentences, repeated in one line each."""
    unit = NOISE.split()
    rounds, rest = divmod(words, len(unit))
    return "\n".join([NOISE] * rounds + ([" ".join(unit[:rest])] if rest else []))


def sentences(words: list[str]) -> list[str]:
    """The sentences of some words: they end at full stops, question marks and exclamation marks, or are cut."""
    complete: list[str] = []
    part: list[str] = []
    taken = 0
    for word in words:
        part.append(word)
        taken += 10 if word.endswith(_CUT) else 1
        if taken >= SENTENCE or _ENDS.search(word):
            complete.append(join(part))
            part, taken = [], 0
    return [*complete, join(part)] if part else complete


_ENDS = re.compile(rf"[.!?。！？]{_CUT}?$")


def fill(
    build: Callable[[int], str],
    count: Callable[[str], int],
    budget: int,
    what: str,
    *,
    least: int = 0,
    most: int | None = None,
) -> int:
    """The size for which the text build(size) has as many tokens as `budget` allows, and never more.

    Each guess assumes that tokens grow evenly with size; guesses are few, because counting a long text takes long.
    The search stops if no larger size fits, at `most`, or if 99.5 % of the budget are used.

    Raises UserError if build(least) exceeds the budget.
    """
    low = least
    tokens = smallest = count(build(least))
    if tokens > budget:
        raise UserError(f"{what}: its question alone takes {tokens} of {budget} tokens; give longer --lengths")
    high = None if most is None else most + 1  # the smallest size known not to fit
    aim = budget * (1 + CLOSE) / 2
    slope = 1.0 / FIRST  # tokens per unit of size; the first guess is only a part, which shows the slope cheaply
    while tokens < CLOSE * budget and (high is None or high - low > 1):
        guess = low + max(1, int((aim - tokens) / slope))
        guess = guess if high is None else min(guess, high - 1)
        reached = count(build(guess))
        if reached > budget:
            high, slope = guess, max((reached - tokens) / (guess - low), 0.01)
        else:
            slope = max((reached - smallest) / (guess - least), 0.01)
            low, tokens = guess, reached
    return low
