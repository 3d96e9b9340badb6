"""The schema of results.json as types: the entries of a run and its evaluations about each model.

Every type writes itself (`as_json`) and reads itself (`from_json`), so the file has one definition. Reading checks
every value and raises a one-line UserError that names the file and the field. Keys that this version does not know
are kept in `other` and written back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .fields import Field, Json, optional, other_entries, present
from .info import ExportInfo, RunInfo
from .positions import Bucket, Gain, gains_of
from .sample import Sample

NATIVE, SCALED, RESTORED = "native", "scaled", "restored"  # the rows of every run
COMPARISONS, EXPORT, RUN = "comparisons", "export", "run"
HELD_OUT = "held-out"  # the comparison of objectives on held-out text, among the comparisons
OUTCOMES = ("better", "worse", "equal", "inside the noise", "too few samples")  # outcomes of a paired test
NOT_MODELS = (COMPARISONS, EXPORT, RUN)  # the keys of results.json that are not the row of a model

# ---------------------------------------------------------------------------------------------------
# Numbers


@dataclass(frozen=True)
class Value:
    """A metric's value over `n` samples with its standard error; None if one sample cannot give one."""

    value: float
    stderr: float | None = None
    n: int | None = None

    def as_json(self) -> Json:
        return {"value": self.value, "stderr": self.stderr, **present(n=self.n)}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Value:
        entries = at.mapping(value)
        return cls(
            at.number(entries.get("value")),
            optional((at / "stderr").number, entries.get("stderr")),
            optional((at / "n").count, entries.get("n")),
        )


@dataclass(frozen=True)
class PairedTest:
    """Model `a` against model `b` over the `n` items that both were measured on.

    difference: mean of a - b of the samples, for a perplexity in nats; low and high are its 95% interval (None for
    decisions and for too few samples); p is two-sided (None for too few samples).
    outcome: one of OUTCOMES.
    """

    a: str
    b: str
    n: int | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    test: str
    outcome: str
    words: str = ""  # the outcome as a clause

    def as_json(self) -> Json:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> PairedTest:
        if not isinstance(value, dict) or not {"b", "outcome"} <= value.keys():
            at.fail("must be a list of paired tests")
        return cls(
            (at / "a").text(value.get("a", "")),
            (at / "b").text(value["b"]),
            optional((at / "n").count, value.get("n")),
            optional((at / "difference").number, value.get("difference")),
            optional((at / "low").number, value.get("low")),
            optional((at / "high").number, value.get("high")),
            optional((at / "p").fraction, value.get("p")),
            (at / "test").text(value.get("test", "")),
            (at / "outcome").one_of(value["outcome"], OUTCOMES),
            (at / "words").text(value.get("words", "")),
        )


@dataclass(frozen=True)
class Compared:
    """One model's value of one metric beside the others'.

    percent_of_native: 100 is as good as native. recovered: per cent of the loss by scaling that training won back.
    Both are None if they have no meaning. tests: against native, the scaled model, and perhaps the best one.
    """

    value: Value
    percent_of_native: float | None = None
    recovered: float | None = None
    tests: tuple[PairedTest, ...] = ()

    def test_against(self, other: str) -> PairedTest | None:
        """The paired test against the model `other`."""
        return next((test for test in self.tests if test.b == other), None)

    def as_json(self) -> Json:
        return {
            **self.value.as_json(),
            **present(percent_of_native=self.percent_of_native, recovered=self.recovered),
            **({"tests": [test.as_json() for test in self.tests]} if self.tests else {}),
        }

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Compared:
        entries = at.mapping(value)
        place = at / "tests"
        tests = tuple(PairedTest.from_json(test, place) for test in place.items(entries.get("tests", [])))
        return cls(
            Value.from_json(value, at),
            optional((at / "percent_of_native").number, entries.get("percent_of_native")),
            optional((at / "recovered").number, entries.get("recovered")),
            tests,
        )


@dataclass(frozen=True)
class Comparison:
    """Models on the same items: metric -> label -> numbers. `against` is the model that the others are compared with.

    best: of a comparison of objectives, metric -> the best objective.
    """

    against: str = NATIVE
    metrics: Mapping[str, Mapping[str, Compared]] = field(default_factory=dict)
    best: Mapping[str, str] = field(default_factory=dict)

    def check_objectives(self, at: Field) -> None:
        """Raise UserError if this comparison of objectives has a metric without scaled or the best objective."""
        for metric, rows in self.metrics.items():
            if not {SCALED, self.best.get(metric)} <= rows.keys():
                (at / metric).fail("must have the rows of scaled and of the best objective")

    def as_json(self) -> Json:
        metrics = {
            metric: {label: entry.as_json() for label, entry in rows.items()} for metric, rows in self.metrics.items()
        }
        return {"against": self.against, **({"best": dict(self.best)} if self.best else {}), "metrics": metrics}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Comparison:
        entries = at.mapping(value)
        metrics = {
            metric: {
                label: Compared.from_json(entry, at / metric / label)
                for label, entry in (at / metric).mapping(rows).items()
            }
            for metric, rows in at.mapping(entries.get("metrics", {})).items()
        }
        best = (at / "best").mapping(entries.get("best", {}))
        return cls(
            (at / "against").text(entries.get("against", NATIVE)),
            metrics,
            {metric: (at / "best" / metric).text(name) for metric, name in best.items()},
        )


# ---------------------------------------------------------------------------------------------------
# One model's row


@dataclass(frozen=True)
class SuiteResult:
    """The results of one suite for one model.

    by_length: perplexity by length. by_position: perplexity by position in the longest windows.
    gain_by_position: by length, the gain from far context at the end of a text.
    grid: length -> depth in per cent -> fraction of the keys that were found.
    options: everything, except the model, on which the numbers depend; items: the file name of the item log.
    """

    metrics: Mapping[str, Value]
    by_length: Mapping[int, float] = field(default_factory=dict)
    by_position: Sequence[Bucket] = ()
    gain_by_position: Mapping[int, Sequence[Gain]] = field(default_factory=dict)
    grid: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None
    items: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> Json:
        grid = {str(n): {str(depth): v for depth, v in cells.items()} for n, cells in self.grid.items()}
        gains = {str(n): [gain.as_json() for gain in own] for n, own in self.gain_by_position.items()}
        return {
            "metrics": {name: value.as_json() for name, value in self.metrics.items()},
            **({"by_length": _with_string_keys(self.by_length)} if self.by_length else {}),
            **({"by_position": [bucket.as_json() for bucket in self.by_position]} if self.by_position else {}),
            **({"gain_by_position": gains} if gains else {}),
            **({"grid": grid} if grid else {}),
            **self.other,
            **present(options=self.options, items=self.items),
        }

    @classmethod
    def from_json(cls, value: Any, at: Field) -> SuiteResult:
        entries = at.mapping(value)
        lengths = (at / "by_length").by_length(entries.get("by_length", {}))
        buckets = (at / "by_position").items(entries.get("by_position", []))
        grid = (at / "grid").by_length(entries.get("grid", {}))
        metrics = (at / "metrics").mapping(entries.get("metrics"))
        return cls(
            {name: Value.from_json(entry, at / name) for name, entry in metrics.items()},
            {n: (at / "by_length" / n).positive(v) for n, v in lengths.items()},
            tuple(Bucket.from_json(bucket, at / "by_position") for bucket in buckets),
            gains_of(entries.get("gain_by_position", {}), at / "gain_by_position"),
            {
                n: {
                    d: (at / "grid" / n / d).fraction(v)
                    for d, v in (at / "grid" / n).by_number(cells, "a depth in per cent", 0).items()
                }
                for n, cells in grid.items()
            },
            optional((at / "options").mapping, entries.get("options")),
            optional((at / "items").text, entries.get("items")),
            other_entries(entries, [item.name for item in fields(cls)]),
        )


@dataclass(frozen=True)
class Training:
    """The cost of training a model."""

    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_gb: float

    def as_json(self) -> Json:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Training:
        entries = at.mapping(value)
        return cls(
            (at / "tokens").count(entries.get("tokens")),
            *((at / name).number(entries.get(name)) for name in ("seconds", "tokens_per_second", "peak_memory_gb")),
        )


@dataclass(frozen=True)
class Row:
    """One model.

    perplexity: by length, on the held-out text of the run. kl: to the native teacher, in nats per token.
    agreement: top-1 agreement with the native teacher, a fraction. suites: by name. training: of an objective.
    sample: what the model writes after a prompt of held-out text.
    """

    perplexity: Mapping[int, float] = field(default_factory=dict)
    kl: float | None = None
    agreement: float | None = None
    suites: Mapping[str, SuiteResult] = field(default_factory=dict)
    training: Training | None = None
    sample: Sample | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> Json:
        held_out = {
            "perplexity": _with_string_keys(self.perplexity),
            "kl": self.kl,
            "agreement": self.agreement,
        }
        return {
            **(held_out if self.perplexity else present(kl=self.kl, agreement=self.agreement)),
            **self.other,
            **{name: suite.as_json() for name, suite in self.suites.items()},
            **({"training": self.training.as_json()} if self.training else {}),
            **({"sample": self.sample.as_json()} if self.sample else {}),
        }

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Row:
        entries = at.mapping(value)
        lengths = (at / "perplexity").by_length(entries.get("perplexity", {}))
        suites = {
            name: SuiteResult.from_json(entry, at / name)
            for name, entry in entries.items()
            if isinstance(entry, dict) and "metrics" in entry and name != "sample"
        }
        return cls(
            {n: (at / "perplexity" / n).positive(v) for n, v in lengths.items()},
            optional((at / "kl").number, entries.get("kl")),
            optional((at / "agreement").fraction, entries.get("agreement")),
            suites,
            optional(lambda value: Training.from_json(value, at / "training"), entries.get("training")),
            optional(lambda value: Sample.from_json(value, at / "sample"), entries.get("sample")),
            other_entries(entries, ["perplexity", "kl", "agreement", "training", "sample", *suites]),
        )

    def merged(self, new: Row) -> Row:
        """This row with what `new` has; a suite of `new` replaces the one of its name."""
        return Row(
            {**self.perplexity, **new.perplexity},
            self.kl if new.kl is None else new.kl,
            self.agreement if new.agreement is None else new.agreement,
            {**self.suites, **new.suites},
            new.training or self.training,
            new.sample or self.sample,
            {**self.other, **new.other},
        )


def _with_string_keys(values: Mapping[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in values.items()}


# ---------------------------------------------------------------------------------------------------
# The file


@dataclass(frozen=True)
class Results:
    """All of results.json; before.json has the same form, with rows only. `rows` and `comparisons` are by name."""

    rows: Mapping[str, Row] = field(default_factory=dict)
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    export: ExportInfo | None = None
    run: RunInfo | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> Json:
        return {
            **self.other,
            **{name: row.as_json() for name, row in self.rows.items()},
            **({COMPARISONS: {k: v.as_json() for k, v in self.comparisons.items()}} if self.comparisons else {}),
            **({EXPORT: self.export.as_json()} if self.export else {}),
            **({RUN: self.run.as_json()} if self.run else {}),
        }

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Results:
        """The results in a JSON object. Raises UserError if a value is not valid."""
        entries = at.mapping(value)
        comparisons = (at / COMPARISONS).mapping(entries.get(COMPARISONS, {}))
        rows = {
            name: Row.from_json(row, at / name)
            for name, row in entries.items()
            if name in (NATIVE, SCALED, RESTORED) or (isinstance(row, dict) and name not in NOT_MODELS)
        }
        checked = {name: Comparison.from_json(entry, at / COMPARISONS / name) for name, entry in comparisons.items()}
        if HELD_OUT in checked:
            checked[HELD_OUT].check_objectives(at / COMPARISONS / HELD_OUT)
        return cls(
            rows,
            checked,
            optional(lambda value: ExportInfo.from_json(value, at / EXPORT), entries.get(EXPORT)),
            optional(lambda value: RunInfo.from_json(value, at / RUN), entries.get(RUN)),
            other_entries(entries, [*rows, *NOT_MODELS]),
        )

    def is_foreign(self) -> bool:
        """Whether a JSON object that was read as results holds something, but no measurement: it is another file."""
        measured = any(row != Row(other=row.other) for row in self.rows.values())
        return bool(self.rows or self.other) and not (measured or self.comparisons or self.export or self.run)

    def compared(self, suite: str, metric: str) -> Mapping[str, Compared]:
        """The comparison of all models in one metric, by label; empty if there is none."""
        return self.comparisons.get(suite, Comparison()).metrics.get(metric, {})

    def merged(self, new: Results) -> Results:
        """These results with what `new` has: rows are merged, comparisons of one name are replaced."""
        rows = {**self.rows, **{name: self.rows.get(name, Row()).merged(row) for name, row in new.rows.items()}}
        comparisons = {**self.comparisons, **new.comparisons}
        other = {**self.other, **new.other}
        return Results(rows, comparisons, new.export or self.export, new.run or self.run, other)

    def without(self, names: Collection[str]) -> Results:
        """These results without the rows of that name."""
        return replace(self, rows={name: row for name, row in self.rows.items() if name not in names})
