"""The figures of the report: each if there are numbers for it, with the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..results.fields import is_whole
from ..results.long_window import FAR
from ..results.objectives import perplexity_text
from ..results.positions import Gain
from ..results.statistics import MAX_NATS
from .charts import Axis, Series, doubling_axis, heat_map, line_chart, linear_axis, log_axis, tokens
from .load import RunFacts
from .parts import MISSING, Figure, Table, style_of

WIDE = 8.0  # ratio of the largest to the smallest value; above it an axis is logarithmic
FAR_TITLE = "Gain from far text, nats per token"


def figures(facts: RunFacts) -> Iterator[Figure]:
    """Loss, perplexity by length and position, gain from far text, memory, pass key: each if there are numbers."""
    curves = facts.curves or {facts.in_question: facts.steps}
    losses = {name: [(s.step, s.loss) for s in steps if s.loss is not None] for name, steps in curves.items()}
    losses = {name: points for name, points in losses.items() if len(points) > 1}
    for name, points in losses.items():
        title = f"Training loss, {name}" if facts.objectives else "Training loss"
        yield _over_steps({name: points}, title, "nats")
    for of in (lambda name: facts.row(name).perplexity, facts.suite_perplexity):
        by_length = {name: values for name in facts.models if len(values := of(name)) > 1}
        if by_length:
            yield _perplexity_figure("Perplexity by length", "tokens", by_length)
            break
    by_position = max((_by_position(facts, of) for of in (_suite_positions, _held_out_positions)), key=len)
    if by_position:
        yield _perplexity_figure("Perplexity by position", "position in the text, up to", by_position)
    yield from _far_figures(facts)
    if losses:
        memory = {name: [(step.step, step.memory) for step in curves[name]] for name in losses}
        yield _over_steps(memory, "Peak memory", "GB", zero=True)
    for name in facts.models:
        suite = facts.row(name).suites.get("passkey")
        if suite and any(suite.grid.values()):
            yield _passkey_figure(name, suite.grid)


def _by_position(facts: RunFacts, of: Callable[[RunFacts, str], dict[int, float]]) -> dict[str, dict[int, float]]:
    return {name: values for name in facts.models if (values := of(facts, name))}


def _suite_positions(facts: RunFacts, name: str) -> dict[int, float]:
    suite = facts.row(name).suites.get("ppl")
    return {bucket.end: bucket.perplexity for bucket in suite.by_position} if suite else {}


def _held_out_positions(facts: RunFacts, name: str) -> dict[int, float]:
    """By the end of each bucket of positions: the first is a piece long, each other as long as all before it."""
    named = [(metric.partition("perplexity@")[2], values) for metric, values in facts.pieces.get(name, {}).items()]
    by_length = {int(length): values for length, values in named if is_whole(length) and values}
    if not by_length:
        return {}
    length = max(by_length)
    numbered = [(int(piece.split("/")[2]), value) for piece, value in by_length[length].items()]
    count = 1 + max(number for number, _ in numbered)
    if count == 1:  # one point is no curve
        return {}
    buckets: dict[int, list[float]] = {}
    for number, value in numbered:
        buckets.setdefault(min(1 << number.bit_length(), count), []).append(value)
    return {
        round(end * length / count): math.exp(min(math.fsum(values) / len(values), MAX_NATS))
        for end, values in sorted(buckets.items())
    }


def _over_steps(
    curves: Mapping[str, Sequence[tuple[float, float]]], title: str, unit: str, *, zero: bool = False
) -> Figure:
    series = [Series(name, style_of(name), points) for name, points in curves.items()]
    points = [point for item in series for point in item.points]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    x = Axis(first, last, tuple(t for t in linear_axis([first, last]).ticks if first <= t <= last))
    y = linear_axis([y for _, y in points], zero=zero)
    svg = line_chart(series, x, y, x_label="step", y_label=f"{title}, {unit}")
    return Figure(f"{title}, {unit}", svg, [(item.name, item.style) for item in series] if len(series) > 1 else ())


def _perplexity_figure(title: str, x_label: str, rows: Mapping[str, Mapping[int, float]]) -> Figure:
    series = [Series(name, style_of(name), sorted(values.items())) for name, values in rows.items()]
    values = [v for own in rows.values() for v in own.values()]
    lengths = sorted({n for own in rows.values() for n in own})
    y = log_axis(values) if max(values) > WIDE * min(values) else linear_axis(values, zero=True)
    svg = line_chart(series, doubling_axis(lengths), y, x_label=x_label, y_label=title, x_format=tokens)
    cells = [[name, *(perplexity_text(own[n]) if n in own else MISSING for n in lengths)] for name, own in rows.items()]
    data = Table(title, ["", *(tokens(n) for n in lengths)], cells)
    return Figure(title, svg, [(item.name, item.style) for item in series], data)


def _passkey_figure(name: str, grid: Mapping[int, Mapping[int, float]]) -> Figure:
    depths = sorted({depth for cells in grid.values() for depth in cells})
    cells = [[f"{d}%", *(f"{grid[n][d]:.0%}" if d in grid[n] else MISSING for n in sorted(grid))] for d in depths]
    title = f"Pass key found, {name}, by depth"
    data = Table(title, ["depth", *(tokens(n) for n in sorted(grid))], cells)
    return Figure(title, heat_map(grid, x_label="tokens", y_label="depth of the key"), (), data)


def _far_figures(facts: RunFacts) -> Iterator[Figure]:
    """The gain by position at the end of the longest texts that any model was measured on."""
    measured = {name: suite.gain_by_position for name in facts.models if (suite := facts.row(name).suites.get(FAR))}
    longest = max((n for lengths in measured.values() for n in lengths), default=0)
    rows = {name: lengths[longest] for name, lengths in measured.items() if longest in lengths}
    if rows:
        yield _far_figure(longest, rows)


def _far_figure(length: int, rows: Mapping[str, Sequence[Gain]]) -> Figure:
    series = [
        Series(
            name,
            style_of(name),
            [(gain.middle, gain.gain) for gain in gains],
            [(gain.middle, gain.gain - (gain.stderr or 0), gain.gain + (gain.stderr or 0)) for gain in gains],
        )
        for name, gains in rows.items()
    ]
    heights = [height for item in series for _, low, high in item.band for height in (low, high)]
    places = [at for item in series for at, _ in item.points]
    ticks = linear_axis(places, count=4).ticks
    x = Axis(min(places), max(places), tuple(t for t in ticks if min(places) <= t <= max(places)))
    svg = line_chart(series, x, linear_axis(heights, zero=True), x_label="position in the text", y_label=FAR_TITLE)
    ends = sorted({gain.end for gains in rows.values() for gain in gains})
    cells = [
        [name, *(found.get(end, MISSING) for end in ends)]
        for name, gains in rows.items()
        for found in [{gain.end: _gain(gain) for gain in gains}]
    ]
    title = f"{FAR_TITLE}, in texts of {length} tokens"
    data = Table(title, ["position up to", *map(str, ends)], cells)
    return Figure(f"{title}; band: one standard error", svg, [(item.name, item.style) for item in series], data)


def _gain(gain: Gain) -> str:
    return f"{gain.gain:.3f}" + ("" if gain.stderr is None else f" ± {gain.stderr:.2g}")
