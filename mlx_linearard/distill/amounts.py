"""How much text a run has and reads, in the lines that end its plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .sizing import Sizing


@dataclass(frozen=True)
class Amount:
    """How much text there is.

    training: tokens. more: the text was not counted to its end. windows: held-out windows of the first length, as many
    as are measured or fewer; None if they were not counted.
    """

    training: int
    windows: int | None = None
    more: bool = False

    def lines(self, sizing: Sizing) -> Iterator[str]:
        """The tokens of text, how often training reads them, the held-out text, and the time."""
        read = sizing.steps * sizing.tokens_per_step
        epochs = f"{read / max(1, self.training):.2g}"
        counted, less = ("more than ", "less than ") if self.more else ("", "")
        yield (
            f"training text: {counted}{grouped(self.training)} tokens; the run reads {grouped(read)}, {less}{epochs} "
            f"{'epoch' if epochs == '1' else 'epochs'}"
        )
        first = sizing.eval_lengths[0]
        measured = min(sizing.eval_tokens, sizing.eval_tokens if self.windows is None else self.windows * first)
        lengths = " and ".join(map(str, sizing.eval_lengths))
        yield f"held-out text: {grouped(max(measured, first))} tokens in windows of {lengths}"
        yield sizing.times.line()


def grouped(number: int) -> str:
    """A number with spaces between thousands: 16 000 000."""
    return f"{number:,}".replace(",", " ")
