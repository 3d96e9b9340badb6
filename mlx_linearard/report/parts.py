"""The parts of a report: tables and figures, and the class that colours a model in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..results.rows import NATIVE, RESTORED, SCALED

STYLES = {"relation": "one", "logits": "two", "relation+logits": "three", "ce": "four"}  # CSS classes
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A titled table. The first column is text, all others are numbers; `notes` are below the table."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A titled chart with its legend (name, style), and the same numbers as a table."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    data: Table | None = None


def style_of(name: str) -> str:
    """The CSS class that colours a model."""
    return name if name in (NATIVE, SCALED, RESTORED) else STYLES.get(name, "other")
