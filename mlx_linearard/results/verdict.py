"""The meaning of a run's numbers, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .info import RunInfo
from .objectives import NOT_NEEDED, ObjectiveVerdict, listed, perplexity_text
from .records import Pieces
from .rows import NATIVE, RESTORED, SCALED, Compared, Results, Row
from .statistics import HELD_OUT_METRICS, KL, NOISE, compare
from .suites import (
    COPYING,
    KEPT,
    Note,
    Shortfall,
    key_metrics,
    no_better_than_scaled,
    shortfalls,
    worst_of_each,
)

HELPED = 0.25  # fraction of the KL lost by scaling; below it training helped little
PREDICTING = " in predicting the next token"  # the only thing that KL and perplexity measure
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
    """All sentences: what training won back, and perplexity at short and long lengths; or, of a comparison, which
    objective won back most and whether that is more than chance."""
    if measured.objectives:
        return [*measured.contest.sentences(), *_not_restored(measured)]
    scaled, restored = measured.row(SCALED).kl, measured.row(RESTORED).kl
    if scaled is None or restored is None:
        return ["The run is not finished, so there is no verdict yet."]
    return [_outcome(measured, scaled, restored), *_perplexities(measured)]


def headline(measured: Measured) -> list[str]:
    """The two sentences of the verdict; of a comparison, the others are notes."""
    if measured.objectives:
        return [*measured.contest.headline(), *_not_restored(measured)]
    return verdict(measured)


def notes_on_suites(measured: Measured) -> Iterator[Note]:
    """For each finished model: results that may be chance, and results that scaling alone reaches as well."""
    for name in finished(measured):
        if uncertain := [one.text for one in worst_of_each(_shortfalls(measured, name, certain=False))]:
            yield Note(f"Lower in {name}, on too few samples to rule out chance: {'; '.join(uncertain)}.")
        if same := no_better_than_scaled(measured.results, name):
            titles = listed([metric.title for metric in same])
            yield Note(f"{name.capitalize()} is no better than the simple scaled model in {titles}.")


def finished(measured: Measured) -> list[str]:
    """The labels of the finished models in question; [] if one of them or native has no row."""
    names = measured.contest.finished if measured.objectives else [RESTORED]
    return names if all(name in measured.rows for name in (NATIVE, *names)) else []


# ---------------------------------------------------------------------------------------------------
# One run


def _outcome(measured: Measured, scaled: float, restored: float) -> str:
    """The conclusion from the KL, and the suites that contradict it."""
    change = f"KL to the native model: {scaled:.3g} nats per token scaled, {restored:.3g} restored"
    won = 1 - restored / scaled if scaled else 0.0
    lost = [one.text for one in worst_of_each(_shortfalls(measured, RESTORED, certain=True))]
    text = _predictions(measured, scaled, won, bool(lost))
    besides = f"; not restored: {'; '.join(lost)}" if lost else ""
    return f"{text} ({change}){besides}."


def _predictions(measured: Measured, scaled: float, won: float, lost: bool) -> str:
    """`won`: the fraction of the KL that training won back; `lost`: whether a suite is certainly below native."""
    if scaled < NOT_NEEDED:
        where = PREDICTING if lost else ""
        return f"The simple scaled model is already as good as the native one{where}, so training was not needed"
    if won <= 0:
        return "Training did not help: the simple scaled model is at least as good"
    own = measured.kl_tests.get(RESTORED)
    test = own.test_against(SCALED) if own else None
    if test and test.outcome == NOISE:
        return "Training made no difference to the simple scaled model beyond chance"
    part = f"{_percent(won)} of what scaling cost"
    if won < HELPED:
        return f"Training helped little: it won back {part}"
    if won < KEPT:
        return f"Training helped, but did not restore the model: it won back {part}"
    if lost:
        return f"Training won back {part}{PREDICTING}, but did not restore the model"
    return f"Training restored the model: it won back {part}" + ("" if _measured_copying(measured) else PREDICTING)


def _measured_copying(measured: Measured) -> bool:
    """Whether finding and copying details of a long text was measured."""
    return all(any(suite in measured.row(name).suites for suite in COPYING) for name in (NATIVE, RESTORED))


def _shortfalls(measured: Measured, name: str, *, certain: bool) -> list[Shortfall]:
    return [one for one in shortfalls(measured.results, name, measured.window) if one.certain == certain]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}%" if fraction < 0.995 else f"{100 * fraction:.1f}%"


def _perplexities(measured: Measured) -> Iterator[str]:
    own = {name: measured.row(name).perplexity for name in ORDER}
    if not (lengths := _common_lengths(own)):
        return
    window = measured.window
    text = f"Perplexity at {lengths[0]} tokens is {_of_all(own, lengths[0])}"
    if window:
        suite = {name: measured.suite_perplexity(name) for name in ORDER}
        long = next(((by_name, n[-1]) for by_name in (own, suite) if (n := _common_lengths(by_name, window))), None)
        if long is not None:
            text += f"; at {long[1]}, beyond the native window of {window}, it is {_of_all(*long)}"
        elif any((metric.length or 0) > window for metric in key_metrics(measured.row(RESTORED))):
            text += f"; it was not measured beyond the native window of {window} tokens"
        else:
            text += f"; nothing was measured beyond the native window of {window} tokens"
    yield text + "."


def _common_lengths(by_name: Mapping[str, ByLength], above: int = 0) -> list[int]:
    """The lengths at which all models were measured, ascending."""
    return sorted(n for n in set.intersection(*(set(values) for values in by_name.values())) if n > above)


def _of_all(by_name: Mapping[str, ByLength], length: int) -> str:
    """The three values, and a warning if the untrained model does as well."""
    native, scaled, restored = (perplexity_text(by_name[name][length]) for name in ORDER)
    better = by_name[SCALED][length] <= by_name[RESTORED][length]
    warning = ", so that the simple scaled model is at least as good there" if better else ""
    return f"{native} native, {scaled} scaled and {restored} restored{warning}"


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
