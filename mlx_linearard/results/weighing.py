"""Objectives weighed against each other: paired tests on held-out text, and what they say in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..progress import duration
from .statistics import ALPHA, KL, NOISE, TOO_FEW, p_in_words

NOT_NEEDED = 0.01  # nats a token: a scaling that costs less than this costs nothing one would notice


@dataclass(frozen=True)
class Weighed:
    """A comparison of `objectives` as results.json keeps it; `rows` are the models' own."""

    objectives: Sequence[str]
    rows: Mapping[str, Mapping[str, Any]]
    comparison: Mapping[str, Any]

    @property
    def done(self) -> list[str]:
        """The objectives that have been trained to their end."""
        return [name for name in self.objectives if name in self._table(KL)]

    def _table(self, metric: str) -> Mapping[str, Any]:
        return self.comparison.get("metrics", {}).get(metric, {})

    def value(self, metric: str, name: str) -> float:
        return float(self._table(metric)[name]["value"])

    def best(self, metric: str) -> str:
        return str(self.comparison["best"][metric])

    def against_best(self, metric: str, name: str) -> Mapping[str, Any]:
        """The paired test of an objective against the best one; {} for the best itself."""
        best = self.best(metric)
        return next((test for test in self._table(metric)[name].get("tests", ()) if test["b"] == best), {})

    def won_back(self, name: str) -> float:
        """The share of the KL that scaling cost and this objective took back."""
        return 1 - self.value(KL, name) / self.value(KL, "scaled")

    def sentences(self) -> Iterator[str]:
        """The verdict: what recovered most and how sure that is, whether it was worth it, perplexity, cost."""
        if not self.done:
            yield "No objective has been trained to its end, so there is no verdict yet."
            return
        if self.value(KL, "scaled") < NOT_NEEDED:
            yield (
                "The simple scaled model is already as good as the native one "
                f"({self.value(KL, 'scaled'):.2g} nats a token), so no training was needed."
            )
        else:
            yield from self._most()
            yield from self._worth()
        for metric in self.comparison["metrics"]:
            if metric.startswith("perplexity@"):
                yield self._perplexity(metric)
        yield from self._cost()
        if missing := [name for name in self.objectives if name not in self.done]:
            yield f"Still to come: {listed(missing)}."

    def headline(self) -> list[str]:
        """The first of the sentences, and the one that says whether matching relations was worth it."""
        first, *others = self.sentences()
        return [first, *(sentence for sentence in (self._worth() if self.done else ()) if sentence in others)]

    def _most(self) -> Iterator[str]:
        best, scaled = self.best(KL), self.value(KL, "scaled")
        if self.won_back(best) <= 0:
            yield (
                f"None of {listed(self.done)} helped: the simple scaled model is at least as close to the native one "
                f"(KL {scaled:.3g} nats a token)."
            )
            return
        yield (
            f"The objective {best} won back most of what scaling cost, {self.won_back(best):.0%} (KL to the native "
            f"model: {scaled:.3g} nats a token scaled, {self.value(KL, best):.3g} with {best})."
        )
        behind: list[str] = []
        level: list[str] = []
        for name in (name for name in self.done if name != best):
            test = self.against_best(KL, name)
            won = self.won_back(name)
            text = f"{name}, {won:.0%}" if won > 0 else f"{name}, no closer to the native model than the scaled one"
            (behind if _sure(test) else level).append(f"{text} ({_how_sure(test)})")
        if behind:
            yield f"Behind it: {'; '.join(behind)}."
        if level:
            yield f"Not to be told apart from it: {'; '.join(level)}."

    def _worth(self) -> Iterator[str]:
        """Whether matching relations paid; the best of all is the best of those with or of those without them."""
        groups = [[n for n in self.done if ("relation" in n) == related] for related in (True, False)]
        if not all(groups):
            return
        related, plain = (min(group, key=lambda n: self.value(KL, n)) for group in groups)
        best = self.best(KL)
        if not _sure(self.against_best(KL, plain if best == related else related)):
            yield (
                "Whether attention relations are matched made no difference that can be told from chance: "
                f"{related} against {plain}."
            )
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
        best, length = self.best(metric), int(metric.partition("@")[2])
        table = self._table(metric)
        text = f"Perplexity at {length} tokens is lowest with {best}: {_short(self.value(metric, best))}"
        others = [f"{_short(self.value(metric, name))} {name}" for name in ("native", "scaled") if name in table]
        level = [name for name in self.done if self.against_best(metric, name).get("outcome") == NOISE]
        few = [name for name in self.done if self.against_best(metric, name).get("outcome") == TOO_FEW]
        text += f" ({', '.join(others)})" + (f", and {listed(level)} inside the noise of it" if level else "")
        text += f", on too few pieces of text to tell it from {listed(few)}" if few else ""
        learnt = "native" in table and self.value(metric, best) < self.value(metric, "native")
        return text + ("; below native, it has learnt the kind of text as well." if learnt else ".")

    def _cost(self) -> Iterator[str]:
        costs = [(name, training(self.rows, name)) for name in self.done]
        told = [f"{name} {duration(c['seconds'])} and {c['peak_memory_gb']:.2f} GB" for name, c in costs if c]
        if told:
            yield f"Training took: {'; '.join(told)}."


def training(rows: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """What an objective's training took: tokens, seconds, tokens_per_second, peak_memory_gb; {} where unknown."""
    found = rows.get(name, {}).get("training", {})
    needed = ("tokens", "seconds", "tokens_per_second", "peak_memory_gb")
    return found if isinstance(found, Mapping) and all(isinstance(found.get(k), int | float) for k in needed) else {}


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _sure(test: Mapping[str, Any]) -> bool:
    p = test.get("p")
    return isinstance(p, int | float) and p < ALPHA


def _how_sure(test: Mapping[str, Any]) -> str:
    p = test.get("p")
    if not isinstance(p, int | float):
        return str(test.get("outcome", "not tested"))
    return p_in_words(p) if p < ALPHA else f"{NOISE}, {p_in_words(p)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"
