"""How good news is, in one word; the report's box has a colour for each."""

from __future__ import annotations

GOOD, PARTLY, BAD, UNKNOWN = "good", "partly", "bad", "unknown"


def both(short: str, long: str) -> str:
    """Of short text and of the long window together."""
    if UNKNOWN in (short, long):
        return BAD if BAD in (short, long) else UNKNOWN
    if short == long:
        return short
    return BAD if short == BAD else PARTLY
