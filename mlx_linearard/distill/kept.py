"""Which layers keep the student's activations for the backward pass, instead of computing them again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Of the layers that run, the last `whole` keep everything.

    The `attention` layers before these keep what the backward pass needs of their attention, and compute the
    feed-forward part again: of all that a layer can keep, attention saves most time for its memory.
    """

    whole: int = 0
    attention: int = 0

    def __bool__(self) -> bool:
        return self.whole + self.attention > 0

    def of_layer(self, distance: int) -> tuple[bool, bool]:
        """(keeps its attention, keeps its feed-forward part) of the layer `distance` before the last one."""
        return distance < self.whole + self.attention, distance < self.whole


NOTHING = Kept()


def kept_always(recompute: str, layers: int) -> Kept | None:
    """What --recompute all, feed-forward or none lets `layers` layers keep; None for auto, which needs a plan."""
    choices = {"all": NOTHING, "feed-forward": Kept(attention=layers), "none": Kept(whole=layers)}
    return choices.get(recompute)
