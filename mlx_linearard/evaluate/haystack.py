"""Text to hide something in, cut to a number of tokens in a model's own tokenizer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..errors import UserError

CLOSE = 0.995  # share of the budget at which the search may stop
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Prose:
    """A user's text as words, taken from anywhere and cycled where it is short."""

    text: str
    _words: list[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_words", self.text.split())
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
        """`count` words from word `start` on, going round at the end."""
        if count < 1:
            return []
        rounds = self._words[start % self.words :]
        while len(rounds) < count:
            rounds = rounds + self._words
        return rounds[:count]


def prose(documents: Iterable[str], limit: int = 4_000_000) -> Prose:
    """The beginning of some documents, at most about `limit` characters."""
    pieces, have = [], 0
    for text in documents:
        pieces.append(text[:limit])
        have += len(text)
        if have >= limit:
            break
    return Prose("\n\n".join(pieces))


def noise(words: int) -> str:
    """`words` words of a repeated five-sentence filler, a line a round."""
    unit = NOISE.split()
    rounds, rest = divmod(words, len(unit))
    return "\n".join([NOISE] * rounds + ([" ".join(unit[:rest])] if rest else []))


def sentences(words: list[str]) -> list[str]:
    """Words joined again and split behind full stops, question and exclamation marks."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(words)) if s]


def fill(
    build: Callable[[int], str],
    count: Callable[[str], int],
    budget: int,
    what: str,
    *,
    least: int = 0,
    most: int | None = None,
) -> int:
    """The size whose text build(size) has as many tokens as `budget` allows, and never more.

    Each guess lies where the budget would if tokens grew evenly with size; the search stops where no larger
    size fits, at `most`, or when 99.5% of the budget are used.

    Raises UserError where even build(least) is over the budget.
    """
    low = least
    tokens = smallest = count(build(least))
    if tokens > budget:
        raise UserError(f"{what}: its question alone takes {tokens} of {budget} tokens; give longer --lengths")
    high = None if most is None else most + 1  # the smallest size known not to fit
    slope = 1.0  # tokens a unit of size
    while tokens < CLOSE * budget and (high is None or high - low > 1):
        guess = low + max(1, int((budget - tokens) / slope))
        guess = guess if high is None else min(guess, high - 1)
        found = count(build(guess))
        if found > budget:
            high, slope = guess, max((found - tokens) / (guess - low), 0.01)
        else:
            low, tokens = guess, found
            slope = max((tokens - smallest) / (low - least), 0.01)
    return low
