"""Whether a model uses the text beyond its native window: what each measurement says, and what follows from all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .fields import is_whole
from .moods import BAD, GOOD, PARTLY, UNKNOWN
from .objectives import listed, perplexity_text
from .rows import NATIVE, Results, Row, Value
from .statistics import margin
from .suites import COPYING, Shortfall, inside, key_metrics, shortfalls, value_of

FAR = "far"
TOLERATED = 1.1  # perplexity at a long length, as a multiple of native's inside its window
SMALL_GAIN = 0.01  # nats per token: if a gain is less than this for sure, far text is not used
NOT_MEASURED = "Whether the long window is used was not measured"


@dataclass(frozen=True)
class Finding:
    """What one measurement says. good: None if it may be chance. text: a clause.

    decisive: whether a good result shows that far text is used; a low perplexity alone does not.
    """

    good: bool | None
    text: str
    decisive: bool = True


@dataclass(frozen=True)
class LongWindow:
    """The conclusion, one of `moods`, and its sentence."""

    mood: str
    sentence: str
    measured: bool = True


def long_window(results: Results, name: str, window: int | None) -> LongWindow:
    """Whether the model `name` uses text beyond the native `window` of some tokens."""
    found = list(_findings(results, name, window)) if window else []
    if not found:
        return LongWindow(UNKNOWN, f"{NOT_MEASURED}.", measured=False)
    good, bad, open_ = ([one for one in found if one.good is state] for state in (True, False, None))
    decisive = [one for one in good if one.decisive]
    if decisive and bad:
        return LongWindow(PARTLY, f"The long window is used in part: {_all(decisive)}; but {_all(bad)}.")
    if decisive:
        return LongWindow(GOOD, f"The long window is used: {_all([*good, *open_])}.")
    if bad:
        return LongWindow(BAD, f"The long window is not used: {_all(bad)}.")
    if open_:
        return LongWindow(UNKNOWN, f"Whether the long window is used is not certain: {_all([*open_, *good])}.")
    text = f"{NOT_MEASURED}; long text does not break the model: {_all(good)}."
    return LongWindow(UNKNOWN, text, measured=False)


def _all(findings: Sequence[Finding]) -> str:
    return listed([one.text for one in findings])


def _findings(results: Results, name: str, window: int) -> Iterator[Finding]:
    row, native = results.rows.get(name, Row()), results.rows.get(NATIVE, Row())
    yield from _far(row, window)
    yield from _copying(results, row, name, window)
    yield from _perplexity(row, native, window)


def _far(row: Row, window: int) -> Iterator[Finding]:
    """The gain from far text at each long length, beyond its error or not."""
    metrics = row.suites[FAR].metrics if FAR in row.suites else {}
    lengths = {int(n): m for m in metrics if (n := m.removeprefix("gain@")) != m and is_whole(n)}
    for length, metric in sorted(lengths.items()):
        if length > window:
            yield _gain(metrics[metric], length)


def _gain(gain: Value, length: int) -> Finding:
    error = margin(gain)
    spread = "" if gain.stderr is None else f" ± {gain.stderr:.2g}"
    text = f"{gain.value:.2g}{spread} nats per token at {length} tokens"
    if error is None:
        return Finding(None, f"text beyond the old window changes predictions by {text}, on too few texts to be sure")
    if gain.value > error:
        return Finding(True, f"text beyond the old window helps to predict, by {text}")
    if gain.value < -error:
        return Finding(False, f"text beyond the old window makes predictions worse, by {text}")
    if error <= SMALL_GAIN:
        return Finding(False, f"text beyond the old window does not help to predict ({text})")
    return Finding(None, f"the gain from text beyond the old window, {text}, is within its error")


def _copying(results: Results, row: Row, name: str, window: int) -> Iterator[Finding]:
    """Finding details in a text longer than the native window, against native inside its window."""
    short = {one.metric.metric: one for one in shortfalls(results, name, window) if one.beyond}
    for metric in key_metrics(row):
        if metric.suite not in COPYING or (metric.length or 0) <= window:
            continue
        own = value_of(results.rows, name, metric.suite, metric.metric)
        reference = inside(results.rows, metric, window)
        native = value_of(results.rows, NATIVE, metric.suite, reference) if reference else None
        if own is None or reference is None or not native or not native.value:
            continue  # there is nothing to compare it with
        at = reference.partition("@")[2]
        text = f"{metric.title}: {metric.show(own.value)} against {metric.show(native.value)} native at {at}"
        yield Finding(_is_kept(short.get(metric.metric)), text)


def _is_kept(short: Shortfall | None) -> bool | None:
    if short is None:
        return True
    return False if short.certain else None


def _perplexity(row: Row, native: Row, window: int) -> Iterator[Finding]:
    """Perplexity at the longest length against native's at the longest length inside its window."""
    for own, other in ((row.perplexity, native.perplexity), (_by_length(row), _by_length(native))):
        beyond, within = [n for n in own if n > window], [n for n in other if n <= window]
        if beyond and within:
            length, short = max(beyond), max(within)
            text = (
                f"perplexity is {perplexity_text(own[length])} at {length} tokens, against "
                f"{perplexity_text(other[short])} native at {short}"
            )
            yield Finding(own[length] <= TOLERATED * other[short], text, decisive=False)
            return


def _by_length(row: Row) -> Mapping[int, float]:
    return row.suites["ppl"].by_length if "ppl" in row.suites else {}
