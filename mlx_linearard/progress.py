"""What a long job prints while it runs."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """'45 s', '12 min' or '3 h 05 min'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
