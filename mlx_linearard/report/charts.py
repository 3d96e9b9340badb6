"""Inline SVG charts for the report: lines and a heat map. The page's style sheet colours them.

A chart names no colour and no font, only `class` attributes, so dark mode and print can restyle it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
SMALLEST = 1e-300  # the smallest range or value that an axis shows
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """A line: its name, the CSS class that colours it, and its points in ascending x.

    band: the range of a point's error, as (x, low, high).
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """Converts data to pixels; `ticks` are the marked values. `log`: the axis is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """The pixel of a value between `start` and `end`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        fraction = 0.5 if high == low else (value - low) / (high - low)
        return start + fraction * (end - start)


def linear_axis(values: Sequence[float], *, zero: bool = False, count: int = 5) -> Axis:
    """An axis with round ticks that enclose finite values; it includes 0 if `zero` is set."""
    low, high = float(min(values)), float(max(values))
    low = min(0.0, low) if zero else low
    if high - low <= SMALLEST + 1e-12 * abs(high):  # no range that ticks could divide
        around = max(0.5, abs(high) / 8)
        low, high = (low - around, high + around) if abs(low) > SMALLEST else (0.0, 1.0)
    step = _round_step(high / count - low / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 2.5 and 5 times a power of ten that is not smaller than `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive values. Ticks are at 1, 2 and 5 times powers of ten, or at fewer of these."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [factor * 10.0**p for p in powers for factor in (1, 2, 5)]
    start = max((t for t in fine if t <= low * 1.001), default=low)
    end = min((t for t in fine if t >= high * 0.999), default=high)
    if end == start:
        end = next(t for t in fine if t > start) if fine[-1] > start else start * 2
    ticks = [t for t in fine if start <= t <= end]
    if len(ticks) > 7:
        ticks = [t for t in ticks if math.log10(t).is_integer()] or ticks
    ticks = ticks[:: math.ceil(len(ticks) / 9)]
    return Axis(start, end, tuple(ticks), log=True)


def doubling_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis for lengths in tokens, with ticks at no more than six of the values themselves."""
    distinct = sorted(set(values))
    every = math.ceil(len(distinct) / 6)
    return Axis(distinct[0], distinct[-1], tuple(distinct[::-1][::every][::-1]), log=len(distinct) > 1)


def number(value: float) -> str:
    """A tick's label: 0.05, 12, 1 500, 2·10⁶."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        power = math.floor(math.log10(abs(value)))
        factor = f"{value / 10**power:.3g}"
        return ("" if factor == "1" else f"{factor}·") + "10" + str(power).translate(SUPERSCRIPTS)
    return f"{value:,.6g}".replace(",", " ")  # a narrow space


def tokens(value: float) -> str:
    """A length in tokens: 512, 2K, 16K (K is 1024)."""
    length = int(value)
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else number(length)


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, x_label: str, y_label: str, x_format: Callable[[float], str] = number
) -> str:
    """Lines over two axes as an <svg> that scales with its container. The points of a short line are drawn as dots."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">',
        *_y_axis(y),
        *_x_axis(x, x_format),
        _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 4, x_label, "label middle"),
    ]
    for item in series:
        parts += _band(item, x, y)
    for item in series:
        parts += _line(item, x, y)
    return "\n".join([*parts, "</svg>"])


def _y_axis(y: Axis) -> list[str]:
    parts = []
    for tick in y.ticks:
        at = y.place(tick, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 4, number(tick), "tick end"))
    return parts


def _x_axis(x: Axis, form: Callable[[float], str]) -> list[str]:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for tick in x.ticks:
        at = x.place(tick, LEFT, WIDTH - RIGHT)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(_text(at, base + 17, form(tick), "tick middle"))
    return parts


def _band(item: Series, x: Axis, y: Axis) -> list[str]:
    """The area between the lower and the upper ends of a line's errors; nothing if they are the line itself."""
    if all(low == high for _, low, high in item.band):
        return []
    edge = [(a, high) for a, _, high in item.band] + [(a, low) for a, low, _ in reversed(item.band)]
    places = [(x.place(a, LEFT, WIDTH - RIGHT), y.place(b, HEIGHT - BOTTOM, TOP)) for a, b in edge]
    path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
    return [f'<path class="band {item.style}" d="{path} Z"/>']


def _line(item: Series, x: Axis, y: Axis) -> list[str]:
    places = [(x.place(a, LEFT, WIDTH - RIGHT), y.place(b, HEIGHT - BOTTOM, TOP)) for a, b in item.points]
    path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(places))
    name = f"<title>{escape(item.name)}</title>"
    parts = [f'<path class="line {item.style}" d="{path}">{name}</path>'] if len(places) > 1 else []
    if len(places) <= 16:
        parts += [
            f'<circle class="dot {item.style}" cx="{a:.1f}" cy="{b:.1f}" r="3">{name}</circle>' for a, b in places
        ]
    return parts


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def heat_map(grid: Mapping[int, Mapping[int, float]], *, x_label: str, y_label: str) -> str:
    """Fractions from 0 to 1 by column (ascending) and row (ascending, downwards); each cell shows its per cent."""
    columns = sorted(grid)
    rows = sorted({row for cells in grid.values() for row in cells})
    width, height = (WIDTH - LEFT - RIGHT) / len(columns), 26
    total = TOP + height * len(rows) + BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {total}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for i, row in enumerate(rows):
        parts.append(_text(LEFT - 8, TOP + height * i + 17, f"{row}%", "tick end"))
        for j, column in enumerate(columns):
            if row in grid[column]:
                parts += _cell(LEFT + width * j, TOP + height * i, width, height, grid[column][row])
    for j, column in enumerate(columns):
        parts.append(_text(LEFT + width * (j + 0.5), TOP + height * len(rows) + 17, tokens(column), "tick middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, total - 4, x_label, "label middle"))
    return "\n".join([*parts, "</svg>"])


def _cell(x: float, y: float, width: float, height: float, fraction: float) -> list[str]:
    place = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2}" rx="3"'
    style = "cell-text on-dark middle" if fraction > 0.55 else "cell-text middle"
    return [
        f'<rect class="cell-back" {place}/>',
        f'<rect class="cell" {place} fill-opacity="{fraction:.2f}"/>',
        _text(x + width / 2, y + height / 2 + 4, f"{fraction:.0%}", style),
    ]
