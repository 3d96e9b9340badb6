"""Several objectives: one results.json from their runs, and their comparison in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import UserError
from ..files import RunDir
from ..progress import duration
from .info import RunInfo
from .records import read_pieces, read_steps, training_of
from .rows import HELD_OUT, NATIVE, RESTORED, SCALED, Compared, PairedTest, Results, Row
from .statistics import ALPHA, KL, NOISE, TOO_FEW, compare_objectives, p_in_words
from .store import read_results

NOT_NEEDED = 0.01  # nats per token: a lower KL of the scaled model is not worth any training


def combine_runs(runs: Mapping[str, RunDir], first: str) -> Results:
    """The results of the finished runs in `runs`, by objective; empty if there is none.

    The rows are native, scaled (both from the first run in `runs`), one for each objective, and `restored`, which
    repeats the row of the objective `first` if that is finished. Raises UserError if a run is not complete.
    """
    if not runs:
        return Results()
    results = {name: read_results(run.results) for name, run in runs.items()}
    pieces = {name: read_pieces(run.held_out) for name, run in runs.items()}
    for name, run in runs.items():
        if not {NATIVE, SCALED, RESTORED} <= results[name].rows.keys() & pieces[name].keys():
            raise UserError(f"{run.root} is not a finished run: remove it, and train {name} again with --resume")
    whole, measured = next(iter(results.values())), next(iter(pieces.values()))
    rows = {
        name: replace(results[name].rows[RESTORED], training=training_of(read_steps(run.metrics)))
        for name, run in runs.items()
    }
    models = {NATIVE: measured[NATIVE], SCALED: measured[SCALED], **{name: pieces[name][RESTORED] for name in runs}}
    return Results(
        {
            **{name: whole.rows[name] for name in (NATIVE, SCALED)},
            **({RESTORED: rows[first]} if first in rows else {}),
            **rows,
        },
        {HELD_OUT: compare_objectives(models, list(runs))},
        run=_shared_info(whole.run or RunInfo(), rows),
    )


def _shared_info(own: RunInfo, rows: Mapping[str, Row]) -> RunInfo:
    """What is true of all runs, with the tokens of the longest and the time of all."""
    trained = [row.training for row in rows.values() if row.training]
    return RunInfo(
        method=own.method,
        factor=own.factor,
        long_weight=own.long_weight,
        valid_data=own.valid_data,
        native_window=own.native_window,
        training_tokens=max(training.tokens for training in trained),
        seconds=round(sum(training.seconds for training in trained), 1),
        machine=own.machine,
        versions=own.versions,
        text=own.text,
    )


# ---------------------------------------------------------------------------------------------------
# What the comparison says


@dataclass(frozen=True)
class ObjectiveVerdict:
    """The comparison of `objectives`, in the order of the command line, and its sentences."""

    objectives: Sequence[str]
    results: Results

    @property
    def finished(self) -> list[str]:
        """The objectives whose runs are finished."""
        return [name for name in self.objectives if name in self.table(KL)]

    def table(self, metric: str) -> Mapping[str, Compared]:
        """One metric of all models."""
        return self.results.compared(HELD_OUT, metric)

    def value(self, metric: str, name: str) -> float:
        return self.table(metric)[name].value.value

    def best(self, metric: str) -> str:
        """The best objective in a metric."""
        return self.results.comparisons[HELD_OUT].best[metric]

    def against_best(self, metric: str, name: str) -> PairedTest | None:
        """The paired test of an objective against the best one; None for the best itself."""
        return self.table(metric)[name].test_against(self.best(metric))

    def won_back(self, name: str) -> float:
        """The fraction of the KL lost by scaling that this objective won back."""
        return 1 - self.value(KL, name) / self.value(KL, SCALED)

    def sentences(self) -> Iterator[str]:
        """The verdict: what won back most and how certain that is, whether relations paid, perplexity, cost."""
        if not self.finished:
            yield "No objective is finished, so there is no verdict yet."
            return
        if self.value(KL, SCALED) < NOT_NEEDED:
            yield (
                "The simple scaled model is already as good as the native one "
                f"({self.value(KL, SCALED):.2g} nats per token), so no training was needed."
            )
        else:
            yield from self._most()
            yield from self._relations()
        for metric in self.results.comparisons[HELD_OUT].metrics:
            if metric.startswith("perplexity@"):
                yield self._perplexity(metric)
        yield from self._cost()
        if missing := [name for name in self.objectives if name not in self.finished]:
            yield f"Still to come: {listed(missing)}."

    def headline(self) -> list[str]:
        """The first of the sentences, and the one that says whether matching relations paid."""
        first, *others = self.sentences()
        return [first, *(sentence for sentence in (self._relations() if self.finished else ()) if sentence in others)]

    def _most(self) -> Iterator[str]:
        best, scaled = self.best(KL), self.value(KL, SCALED)
        if self.won_back(best) <= 0:
            yield (
                f"None of {listed(self.finished)} helped: the simple scaled model is at least as close to the native "
                f"one (KL {scaled:.3g} nats per token)."
            )
            return
        yield (
            f"The objective {best} won back most of what scaling cost, {self.won_back(best):.0%} (KL to the native "
            f"model: {scaled:.3g} nats per token scaled, {self.value(KL, best):.3g} with {best})."
        )
        behind: list[str] = []
        level: list[str] = []
        for name in (name for name in self.finished if name != best):
            test = self.against_best(KL, name)
            won = self.won_back(name)
            text = f"{name}, {won:.0%}" if won > 0 else f"{name}, no closer to the native model than the scaled one"
            (behind if _certain(test) else level).append(f"{text} ({_certainty(test)})")
        if behind:
            yield f"Behind it: {'; '.join(behind)}."
        if level:
            yield f"No different from it beyond chance: {'; '.join(level)}."

    def _relations(self) -> Iterator[str]:
        """Whether matching relations paid: the best objective with them against the best without them."""
        groups = [[n for n in self.finished if ("relation" in n) == related] for related in (True, False)]
        if not all(groups):
            return
        related, plain = (min(group, key=lambda n: self.value(KL, n)) for group in groups)
        best = self.best(KL)
        if not _certain(self.against_best(KL, plain if best == related else related)):
            yield f"Matching attention relations made no difference beyond chance: {related} against {plain}."
        elif best == related:
            yield (
                f"Matching attention relations was worth it here: {related} is closer to the native model than "
                f"{plain}, the best without them."
            )
        else:
            yield (
                f"Matching attention relations was not worth it here: {plain} is closer to the native model than "
                f"{related}."
            )

    def _perplexity(self, metric: str) -> str:
        best, length = self.best(metric), metric.partition("@")[2]
        table = self.table(metric)
        text = f"Perplexity at {length} tokens is lowest with {best}: {perplexity_text(self.value(metric, best))}"
        others = [f"{perplexity_text(table[name].value.value)} {name}" for name in (NATIVE, SCALED) if name in table]
        tests = {name: self.against_best(metric, name) for name in self.finished if name in table}
        level = [name for name, test in tests.items() if test and test.outcome == NOISE]
        few = [name for name, test in tests.items() if test and test.outcome == TOO_FEW]
        text += f" ({', '.join(others)})" if others else ""
        text += f"; {listed(level)} {'is' if len(level) == 1 else 'are'} inside the noise of it" if level else ""
        text += f"; too few pieces of text to compare it with {listed(few)}" if few else ""
        learnt = NATIVE in table and self.value(metric, best) < self.value(metric, NATIVE)
        return text + ("; below native: the model has also learnt this kind of text." if learnt else ".")

    def _cost(self) -> Iterator[str]:
        trained = [(name, self.results.rows.get(name, Row()).training) for name in self.finished]
        costs = [f"{name} {duration(t.seconds)} and {t.peak_memory_gb:.2f} GB" for name, t in trained if t]
        if costs:
            yield f"Training took: {'; '.join(costs)}."


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _certain(test: PairedTest | None) -> bool:
    return test is not None and test.p is not None and test.p < ALPHA


def _certainty(test: PairedTest | None) -> str:
    if test is None or test.p is None:
        return test.outcome if test else "not tested"
    return p_in_words(test.p) if test.p < ALPHA else f"{NOISE}, {p_in_words(test.p)}"


def perplexity_text(value: float) -> str:
    """Two decimals; three digits from 1000 on."""
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
