"""The meaning of a run's numbers, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .info import RunInfo
from .long_window import LongWindow, long_window
from .moods import BAD, GOOD, PARTLY, UNKNOWN, both
from .objectives import NOT_NEEDED, ObjectiveVerdict, listed
from .records import Pieces
from .rows import NATIVE, RESTORED, SCALED, Compared, Results, Row
from .statistics import HELD_OUT_METRICS, KL, NOISE, compare
from .suites import (
    COPYING,
    KEPT,
    Note,
    Shortfall,
    no_better_than_scaled,
    shortfalls,
    worst_of_each,
)

HELPED = 0.25  # fraction of the KL lost by scaling; below it training helped little
PREDICTING = " in predicting the next token"  # the only thing that KL and perplexity measure
UNFINISHED = "The run is not finished, so there is no verdict yet."
ORDER = (NATIVE, SCALED, RESTORED)

ByLength = Mapping[int, float]


@dataclass(frozen=True)
class Measured:
    """The numbers of a run, or of a comparison of `objectives`; any of them may be missing.

    pieces: the held-out numbers of each model, piece by piece.
    """

    results: Results = field(default_factory=Results)
    objectives: Sequence[str] = ()
    pieces: Mapping[str, Pieces] = field(default_factory=dict)

    @property
    def rows(self) -> Mapping[str, Row]:
        return self.results.rows

    @property
    def models(self) -> list[str]:
        """The labels of the rows in order. In a comparison `restored` repeats its first objective: left out."""
        order = (NATIVE, SCALED, *self.objectives) if self.objectives else ORDER
        first = [name for name in order if name in self.rows]
        return first + [name for name in self.rows if name not in order and name not in ORDER]

    @property
    def in_question(self) -> str:
        """The label of the model that the report is about."""
        return self.objectives[0] if self.objectives else RESTORED

    @property
    def contest(self) -> ObjectiveVerdict:
        """The comparison of the objectives."""
        return ObjectiveVerdict(self.objectives, self.results)

    @property
    def window(self) -> int | None:
        """The native window in tokens, if the run states it."""
        return (self.results.run or RunInfo()).native_window

    @cached_property
    def kl_tests(self) -> Mapping[str, Compared]:
        """KL by model over the pieces of held-out text, with paired tests; empty without pieces."""
        return compare({name: own[KL] for name, own in self.pieces.items() if KL in own}, HELD_OUT_METRICS[KL])

    def row(self, model: str) -> Row:
        """A model's row; empty if there is none."""
        return self.rows.get(model, Row())

    def suite_perplexity(self, model: str) -> ByLength:
        """Perplexity by length of the suite `ppl`, whose text may be another than the run's."""
        suite = self.row(model).suites.get("ppl")
        return suite.by_length if suite else {}


def verdict(measured: Measured) -> list[str]:
    """All sentences: whether short text is restored, and whether the long window is used; or, of a comparison, which
    objective won back most and whether that is more than chance, and whether its model uses the long window."""
    if measured.objectives:
        return [*measured.contest.sentences(), *_not_restored(measured), *_long_of_best(measured)]
    if _unfinished(measured):
        return [UNFINISHED]
    return [_short(measured)[1], long_of(measured).sentence]


def headline(measured: Measured) -> list[str]:
    """The two sentences of the verdict; of a comparison, the others are notes."""
    if measured.objectives:
        return [*measured.contest.headline(), *_not_restored(measured), *_long_of_best(measured)]
    return verdict(measured)


def mood(measured: Measured) -> str:
    """How good the verdict is, one of `moods`; of a comparison, that of its best objective."""
    export = measured.results.export
    if export and export.failed:
        return BAD
    if _unfinished(measured):
        return UNKNOWN
    return both(_short(measured)[0], long_of(measured).mood)


def long_of(measured: Measured) -> LongWindow:
    """Whether the model in question, in a comparison the best, uses the long window."""
    return long_window(measured.results, _best(measured), measured.window)


def _unfinished(measured: Measured) -> bool:
    if measured.objectives:
        return not measured.contest.finished
    return measured.row(SCALED).kl is None or measured.row(RESTORED).kl is None


def _best(measured: Measured) -> str:
    return measured.contest.best(KL) if measured.objectives else RESTORED


def notes_on_suites(measured: Measured) -> Iterator[Note]:
    """For each finished model: results that may be chance, and results that scaling alone reaches as well."""
    for name in finished(measured):
        if uncertain := [one.text for one in worst_of_each(_shortfalls(measured, name, certain=False))]:
            yield Note(f"Lower in {name}, on too few samples to rule out chance: {'; '.join(uncertain)}.")
        if same := no_better_than_scaled(measured.results, name):
            titles = listed([metric.title for metric in same])
            yield Note(f"{name.capitalize()} is no better than the simple scaled model in {titles}.")
        if lengths := _no_better_perplexity(measured, name):
            at = listed([str(length) for length in lengths])
            yield Note(f"The simple scaled model has at least as low a perplexity as {name} at {at} tokens.")


def finished(measured: Measured) -> list[str]:
    """The labels of the finished models in question; [] if one of them or native has no row."""
    names = measured.contest.finished if measured.objectives else [RESTORED]
    return names if all(name in measured.rows for name in (NATIVE, *names)) else []


# ---------------------------------------------------------------------------------------------------
# One run


def _short(measured: Measured) -> tuple[str, str]:
    """(mood, sentence) about short text: the conclusion from the KL, and the suites that contradict it."""
    name = _best(measured)
    scaled, restored = measured.row(SCALED).kl or 0.0, measured.row(name).kl or 0.0
    lost = [one.text for one in worst_of_each(_shortfalls(measured, name, certain=True, beyond=False))]
    state, text = _predictions(measured, scaled, 1 - restored / scaled if scaled else 0.0, bool(lost))
    change = f"KL to the native model: {scaled:.3g} nats per token scaled, {restored:.3g} restored"
    besides = f"; not restored: {'; '.join(lost)}" if lost else ""
    return state, f"{text} ({change}){besides}."


def _predictions(measured: Measured, scaled: float, won: float, lost: bool) -> tuple[str, str]:
    """`won`: the fraction of the KL that training won back; `lost`: whether a suite is certainly below native."""
    if scaled < NOT_NEEDED:
        where = PREDICTING if lost else ""
        text = f"The simple scaled model is already as good as the native one{where}, so training was not needed"
        return PARTLY if lost else GOOD, text
    if won <= 0:
        return BAD, "Training did not help: the simple scaled model is at least as good"
    own = measured.kl_tests.get(_best(measured))
    test = own.test_against(SCALED) if own else None
    if test and test.outcome == NOISE:
        return BAD, "Training made no difference to the simple scaled model beyond chance"
    part = f"{_percent(won)} of what scaling cost"
    if won < HELPED:
        return BAD, f"Training helped little: it won back {part}"
    if won < KEPT:
        return PARTLY, f"Short text is restored in part: training won back {part}"
    if lost:
        return PARTLY, f"Short text is restored in part: training won back {part}{PREDICTING}"
    alone = "" if _measured_copying(measured) else PREDICTING
    return GOOD, f"Short text is restored: training won back {part}{alone}"


def _measured_copying(measured: Measured) -> bool:
    """Whether finding and copying details of a text was measured."""
    names = (NATIVE, _best(measured))
    return all(any(suite in measured.row(name).suites for suite in COPYING) for name in names)


def _shortfalls(measured: Measured, name: str, *, certain: bool, beyond: bool | None = None) -> list[Shortfall]:
    """The shortfalls inside the native window, beyond it, or both."""
    short = shortfalls(measured.results, name, measured.window)
    return [one for one in short if one.certain == certain and beyond in (None, one.beyond)]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%" if fraction < 0.995 else f"{100 * fraction:.1f}%"


def _no_better_perplexity(measured: Measured, name: str) -> list[int]:
    """The lengths at which the simple scaled model has at least as low a perplexity, although scaling cost some."""
    native, scaled, own = (measured.row(row).perplexity for row in (NATIVE, SCALED, name))
    common = sorted(native.keys() & scaled.keys() & own.keys())
    return [n for n in common if scaled[n] <= own[n] and native[n] < own[n]]


# ---------------------------------------------------------------------------------------------------
# A comparison of objectives


def _not_restored(measured: Measured) -> Iterator[str]:
    """What the suites say that an objective did not restore."""
    lost = {
        name: [one.text for one in worst_of_each(_shortfalls(measured, name, certain=True))]
        for name in measured.contest.finished
    }
    if parts := [f"with {name}, {'; '.join(texts)}" for name, texts in lost.items() if texts]:
        yield f"Not restored: {'. '.join(parts)}."


def _long_of_best(measured: Measured) -> Iterator[str]:
    """Whether the model of the best objective uses the long window."""
    if measured.contest.finished:
        sentence = long_of(measured).sentence
        yield f"With {_best(measured)}: {sentence[0].lower()}{sentence[1:]}"
