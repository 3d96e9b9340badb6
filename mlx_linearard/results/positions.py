"""Numbers by position in a text, as results.json has them. The end of a range of positions is not included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .fields import Field, Json, optional, present


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the tokens at positions from `start` to `end`, `end` not included."""

    start: int
    end: int
    perplexity: float

    def as_json(self) -> Json:
        return {"start": self.start, "end": self.end, "perplexity": self.perplexity}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Bucket:
        entries = at.mapping(value)
        return cls(
            (at / "start").count(entries.get("start")),
            (at / "end").count(entries.get("end"), 1),
            (at / "perplexity").positive(entries.get("perplexity")),
        )


@dataclass(frozen=True)
class Gain:
    """The mean gain, in nats per token, of the tokens at positions from `start` to `end`; see the suite `far`.

    stderr: the standard error over texts; None if there is one text.
    """

    start: int
    end: int
    gain: float
    stderr: float | None = None

    @property
    def middle(self) -> float:
        return (self.start + self.end) / 2

    def as_json(self) -> Json:
        return {"start": self.start, "end": self.end, "gain": self.gain, **present(stderr=self.stderr)}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Gain:
        entries = at.mapping(value)
        start = (at / "start").count(entries.get("start"))
        end = (at / "end").count(entries.get("end"), 1)
        if end <= start:
            at.fail(f"has a range of positions from {start} to {end}")
        return cls(
            start,
            end,
            (at / "gain").number(entries.get("gain"), MAX_GAIN),
            optional((at / "stderr").number, entries.get("stderr")),
        )


MAX_GAIN = 1e9  # nats; charts divide such numbers


def gains_of(value: Any, at: Field) -> dict[int, Sequence[Gain]]:
    """Gains by length of the text, and within a length in ascending order of position."""
    lengths = at.by_length(value)
    read = {n: [Gain.from_json(entry, at / n) for entry in (at / n).items(own)] for n, own in lengths.items()}
    return {n: tuple(sorted(gains, key=lambda gain: gain.start)) for n, gains in read.items() if gains}
