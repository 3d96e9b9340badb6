"""The report of a run: what a run directory holds, as a verdict, tables and figures, in HTML and in Markdown.

Everything comes from results.json, metrics.jsonl and config.yaml. What is missing is left out; what is
broken is a UserError. The HTML file is whole in itself: it asks for nothing from anywhere.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..config import objectives_of
from ..errors import UserError, one_line
from ..files import RunDir, new_file, read_json
from ..progress import duration
from ..results.findings import COPYING, KEPT, Finding, Note, headlines, lost, no_better, unmeasured, worst
from ..results.rows import HELD_OUT, NOT_MODELS
from ..results.statistics import HELD_OUT_METRICS, KL, NOISE, compare, p_in_words
from ..results.weighing import NOT_NEEDED, Weighed, listed, training
from .charts import Axis, Series, doubling_axis, heat_map, line_chart, linear_axis, log_axis, tokens

MODELS = ("native", "scaled", "restored")  # the order of rows and lines; other models follow
SUITE_TITLES = {
    "ppl": "Perplexity on the evaluation text", "fidelity": "Fidelity to the native model",
    "lambada": "Last word (LAMBADA)", "passkey": "Pass key", "ruler": "RULER, per cent",
}  # fmt: skip
TESTS = (
    "± is one standard error; “of native” and “won back” are of {of}. Tests are paired by item: "
    "McNemar's exact test of decisions, a bootstrap of means; “inside the noise” is p of 0.05 or more."
)
HELPED, RESTORED = 0.25, KEPT  # shares of the KL
PREDICTING = " in predicting the next token"  # all that KL and perplexity see
STYLES = {"relation": "one", "logits": "two", "relation+logits": "three", "ce": "four"}  # classes of the objectives
WIDE = 8.0  # largest over smallest value above which an axis is logarithmic


# ---------------------------------------------------------------------------------------------------
# What a run directory holds


Pieces = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunFacts:
    """A run directory's numbers, checked. Rows are by model; each may lack anything.

    objectives: of a comparison, whose runs' steps are in `curves`, by objective; `restored` is then the first's.
    pieces: by model, what held_out.json has: metric -> LENGTH/WINDOW/PIECE -> number.
    """

    root: Path
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    comparisons: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, float]] = ()
    objectives: Sequence[str] = ()
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The rows in order; the second name that a comparison's first objective has is left out."""
        order = ("native", "scaled", *self.objectives) if self.objectives else MODELS
        first = [name for name in order if name in self.rows]
        return first + [name for name in self.rows if name not in order and name not in MODELS]

    @property
    def restored(self) -> str:
        """The row of the model in question."""
        return self.objectives[0] if self.objectives else "restored"

    @property
    def weighed(self) -> Weighed:
        return Weighed(self.objectives, self.rows, self.comparisons.get(HELD_OUT, {}))

    def perplexity(self, model: str) -> dict[int, float]:
        """Perplexity by length on the run's own held-out text."""
        return _by_length(self.rows.get(model, {}).get("perplexity", {}))

    def suite_perplexity(self, model: str) -> dict[int, float]:
        """Perplexity by length of the suite `ppl`, whose text may be another."""
        return _by_length(self.rows.get(model, {}).get("ppl", {}).get("by_length", {}))

    @property
    def window(self) -> int | None:
        """The native window, where the run says it."""
        found = self.run.get("native_window")
        return found if isinstance(found, int) else None

    @property
    def kl(self) -> Mapping[str, Any]:
        """KL by model over pieces of held-out text, with its paired tests; {} where there are none."""
        samples = {name: found[KL] for name, found in self.pieces.items() if KL in found}
        return {name: row.as_json() for name, row in compare(samples, HELD_OUT_METRICS[KL]).items()}

    def number(self, model: str, key: str) -> float | None:
        value = self.rows.get(model, {}).get(key)
        return None if value is None else float(value)


def _by_length(found: Mapping[str, float]) -> dict[int, float]:
    return {int(length): value for length, value in sorted(found.items(), key=lambda item: int(item[0]))}


def read_run(root: str | Path) -> RunFacts:
    """The facts of a run directory, finished or under way.

    Raises UserError where it is none, or where one of its files is broken.
    """
    run = RunDir(root)
    if not run.root.is_dir():
        raise UserError(f"{root} is not a directory: give the --output of a distillation")
    if not any(path.exists() for path in (run.config, run.metrics, run.results)):
        raise UserError(f"{root} holds no run: neither {run.config.name}, {run.metrics.name} nor {run.results.name}")
    config = _yaml(run.config)
    objectives = objectives_of(config.get("compare"))
    runs = {name: RunDir(run.root / name) for name in objectives}
    results = next(filter(None, (_object(path) for path in (run.results, run.before, *_befores(runs)))), {})
    rows = {
        name: _row(run.results, name, value)
        for name, value in results.items()
        if name not in (*NOT_MODELS, "measured_on")
    }
    parts = {name: _mapping(run.results, name, results.get(name, {})) for name in NOT_MODELS}
    _check_comparisons(run.results, parts["comparisons"])
    curves = {name: _steps(own.metrics) for name, own in runs.items()}
    return RunFacts(
        run.root, rows, config=config, steps=_steps(run.metrics), objectives=objectives, curves=curves,
        pieces=_pieces(run, runs), **parts,
    )  # fmt: skip


def _pieces(run: RunDir, runs: Mapping[str, RunDir]) -> dict[str, Pieces]:
    """held_out.json; of a comparison native and scaled of its first run that has them, and each objective's model."""
    found = dict(_held_out(run.held_out))
    for name, own in runs.items():
        rows = _held_out(own.held_out)
        found = {**rows, **found}
        if "restored" in rows:
            found[name] = rows["restored"]
    if runs:
        found.pop("restored", None)
    return found


def _held_out(path: Path) -> Mapping[str, Pieces]:
    found = _object(path)
    for name, metrics in found.items():
        for metric, pieces in _mapping(path, name, metrics).items():
            for piece, value in _mapping(path, f"{name}.{metric}", pieces).items():
                if len(piece.split("/")) != 3 or not all(part.isdecimal() for part in piece.split("/")):
                    raise UserError(f"{path}: {name}.{metric} has {piece!r} where LENGTH/WINDOW/PIECE belongs")
                _finite(path, f"{name}.{metric}.{piece}", value)
    return found


def _befores(runs: Mapping[str, RunDir]) -> list[Path]:
    return [run.before for run in runs.values()]


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    return dict(_mapping(path, "", value))


def _mapping(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        where = f"{path}: {name}" if name else str(path)
        raise UserError(f"{where} must be a JSON object, not a {type(value).__name__}")
    return value


def _row(path: Path, name: str, value: Any) -> Mapping[str, Any]:
    row = _mapping(path, name, value)
    for key in ("kl", "agreement"):
        if row.get(key) is not None:
            _finite(path, f"{name}.{key}", row[key])
    for length, perplexity in _mapping(path, f"{name}.perplexity", row.get("perplexity", {})).items():
        if not length.isdecimal():
            raise UserError(f"{path}: {name}.perplexity has {length!r} where a length belongs")
        _finite(path, f"{name}.perplexity.{length}", perplexity)
    for suite, entry in row.items():
        if isinstance(entry, dict) and "metrics" in entry:
            _suite(path, f"{name}.{suite}", entry)
    return row


def _suite(path: Path, where: str, entry: Mapping[str, Any]) -> None:
    for metric, value in _mapping(path, f"{where}.metrics", entry["metrics"]).items():
        _finite(path, f"{where}.{metric}", _mapping(path, f"{where}.{metric}", value).get("value"))
    for length, value in _mapping(path, f"{where}.by_length", entry.get("by_length", {})).items():
        _finite(path, f"{where}.by_length.{length}", value)
    for bucket in entry.get("by_position", ()):
        for key in ("start", "end", "perplexity"):
            _finite(path, f"{where}.by_position.{key}", _mapping(path, f"{where}.by_position", bucket).get(key))
    for length, cells in _mapping(path, f"{where}.grid", entry.get("grid", {})).items():
        for depth, share in _mapping(path, f"{where}.grid.{length}", cells).items():
            _finite(path, f"{where}.grid.{length}.{depth}", share)


def _check_comparisons(path: Path, comparisons: Mapping[str, Any]) -> None:
    for suite, entry in comparisons.items():
        where = f"comparisons.{suite}"
        for metric, rows in _mapping(path, where, _mapping(path, where, entry).get("metrics", {})).items():
            for label, row in _mapping(path, f"{where}.{metric}", rows).items():
                tests = _mapping(path, f"{where}.{metric}.{label}", row).get("tests", [])
                if not isinstance(tests, list) or not all(
                    isinstance(t, dict) and {"b", "outcome"} <= t.keys() for t in tests
                ):
                    raise UserError(f"{path}: {where}.{metric}.{label}.tests is not a list of paired tests")


def _finite(path: Path, where: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {where} must be a finite number, not {value!r}")


def _yaml(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return _mapping(path, "", value)


def _steps(path: Path) -> list[Mapping[str, float]]:
    """metrics.jsonl; a last line that is still being written is left out, and so are steps without a finite loss."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    steps = [_step(path, i, line) for i, line in enumerate(lines, 1) if line.strip() and line.endswith("\n")]
    return [step for step in steps if step is not None]


def _step(path: Path, number: int, line: str) -> Mapping[str, float] | None:
    try:
        record = json.loads(line)
        if record["loss"] is None and record["skipped"]:
            return None
        return {"step": int(record["step"]), "loss": float(record["loss"]), "memory": float(record["peak_memory_gb"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} line {number} is not a step's record: mend or remove it") from None


# ---------------------------------------------------------------------------------------------------
# The verdict


def verdict(facts: RunFacts) -> list[str]:
    """Plain sentences from the numbers: what training won back, and perplexity short and long; or which objective
    did most of it, and whether that can be told from chance."""
    if facts.objectives:
        return [*facts.weighed.sentences(), *_not_restored(facts)]
    scaled, restored = facts.number("scaled", "kl"), facts.number("restored", "kl")
    if scaled is None or restored is None:
        return ["The run has not been measured to its end, so there is no verdict yet."]
    return [_outcome(facts, scaled, restored), *_perplexities(facts)]


def _outcome(facts: RunFacts, scaled: float, restored: float) -> str:
    """What the KL says, and what the suites say against it."""
    change = f"KL to the native model: {scaled:.3g} nats a token scaled, {restored:.3g} restored"
    share = 1 - restored / scaled if scaled else 0.0
    gone = [found.words for found in worst(_lost(facts, "restored", sure=True))]
    text = _predictions(facts, scaled, share, bool(gone))
    besides = f"; not restored: {'; '.join(gone)}" if gone else ""
    return f"{text} ({change}){besides}."


def _predictions(facts: RunFacts, scaled: float, share: float, gone: bool) -> str:
    if scaled < NOT_NEEDED:
        where = PREDICTING if gone else ""
        return f"The simple scaled model is already as good as the native one{where}, so training was not needed"
    if share <= 0:
        return "Training did not help: the simple scaled model is at least as good"
    if any(t["b"] == "scaled" and t["outcome"] == NOISE for t in facts.kl.get("restored", {}).get("tests", ())):
        return "Training made no difference to the simple scaled model that can be told from chance"
    won = f"{_percent(share)} of what scaling cost"
    if share < HELPED:
        return f"Training helped little: it won back {won}"
    if share < RESTORED:
        return f"Training helped, but did not restore the model: it won back {won}"
    if gone:
        return f"Training won back {won}{PREDICTING}, but did not restore the model"
    return f"Training restored the model: it won back {won}" + ("" if _copying(facts) else PREDICTING)


def _copying(facts: RunFacts) -> bool:
    """Whether it was measured what the models find in a long text."""
    return all(any(suite in facts.rows.get(name, {}) for suite in COPYING) for name in ("native", "restored"))


def _lost(facts: RunFacts, name: str, *, sure: bool) -> list[Finding]:
    return [found for found in lost(facts.rows, facts.comparisons, name, facts.window) if found.sure == sure]


def _not_restored(facts: RunFacts) -> Iterator[str]:
    """Of a comparison: what the suites say that an objective did not restore."""
    gone = {name: [one.words for one in worst(_lost(facts, name, sure=True))] for name in facts.weighed.done}
    if told := [f"with {name}, {'; '.join(words)}" for name, words in gone.items() if words]:
        yield f"Not restored: {'. '.join(told)}."


def notes(facts: RunFacts) -> list[Note]:
    """What stands below the verdict: what may be chance, what scaling alone does as well, what was not measured."""
    names = facts.weighed.done if facts.objectives else ["restored"]
    if not all(name in facts.rows for name in ("native", *names)) or not names:
        return []
    found = [Note(sentence) for sentence in verdict(facts) if facts.objectives and sentence not in headline(facts)]
    for name in names:
        if unsure := [one.words for one in worst(_lost(facts, name, sure=False))]:
            found.append(Note(f"Lower in {name}, on too few samples to tell it from chance: {'; '.join(unsure)}."))
        if same := no_better(facts.rows, facts.comparisons, name):
            titles = listed([one.title for one in same])
            found.append(Note(f"{name.capitalize()} is no better than the simple scaled model in {titles}."))
    found += unmeasured(facts.rows, names, facts.window, facts.root)
    if not facts.objectives:
        found.append(Note("Whether a simpler objective does as well was not measured.", _compare_command(facts)))
    return found


def _compare_command(facts: RunFacts) -> str:
    config = shlex.quote(str(RunDir(facts.root).config))
    own = str(facts.config.get("objective") or "relation")
    others = [name for name in ("relation", "logits") if name != own]
    freed = "" if own == "relation" else " --objective relation"  # the file's objective would be one beside --compare
    return f"mlx_linearard.distill --config {config}{freed} --compare {','.join([own, *others])} --output DIR"


def headline(facts: RunFacts) -> list[str]:
    """The two sentences of the verdict; all others of a comparison are `notes`."""
    return [*facts.weighed.headline(), *_not_restored(facts)] if facts.objectives else verdict(facts)


def _perplexities(facts: RunFacts) -> Iterator[str]:
    own = {name: facts.perplexity(name) for name in MODELS}
    if not (shared := _shared(own)):
        return
    window = facts.window
    text = f"Perplexity at {shared[0]} tokens is {_three(own, shared[0])}{_caveat(own, shared[0])}"
    if window:
        long = next(((found, n[-1]) for found in (own, _suite_rows(facts)) if (n := _shared(found, window))), None)
        if long is None:
            beyond = any((found.length or 0) > window for found in headlines(facts.rows.get("restored", {})))
            text += f"; {'it' if beyond else 'nothing'} was {'not ' if beyond else ''}measured beyond the native window"
            text += f" of {window} tokens"
        else:
            text += f"; at {long[1]}, beyond the native window of {window}, it is {_three(*long)}{_caveat(*long)}"
    yield text + "."


def _suite_rows(facts: RunFacts) -> dict[str, dict[int, float]]:
    return {name: facts.suite_perplexity(name) for name in MODELS}


def _shared(found: Mapping[str, Mapping[int, float]], above: int = 0) -> list[int]:
    """The lengths at which all three models were measured, ascending."""
    return sorted(n for n in set.intersection(*(set(found[name]) for name in MODELS)) if n > above)


def _three(found: Mapping[str, Mapping[int, float]], length: int) -> str:
    native, scaled, restored = (_perplexity(found[name][length]) for name in MODELS)
    return f"{native} native, {scaled} scaled and {restored} restored"


def _caveat(found: Mapping[str, Mapping[int, float]], length: int) -> str:
    """What a reader must not overlook: the untrained model doing as well."""
    better = found["scaled"][length] <= found["restored"][length]
    return ", so that the simple scaled model is at least as good there" if better else ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share < 0.995 else f"{100 * share:.1f}%"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------
# Tables and figures


@dataclass(frozen=True)
class Table:
    """A titled table; the first column is text, all others are numbers; `notes` stand below it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """A titled chart with its legend (name, style) and the numbers it shows, for those who cannot see it."""

    title: str
    svg: str
    legend: Sequence[tuple[str, str]] = ()
    data: Table | None = None


def tables(facts: RunFacts) -> Iterator[Table]:
    """The comparison of the run itself, then one table a suite."""
    if any(facts.perplexity(name) or facts.number(name, "kl") is not None for name in facts.models):
        yield _main_table(facts)
    if facts.weighed.done:
        yield _objectives_table(facts)
    named = ((key, value) for row in facts.rows.values() for key, value in row.items())
    suites = list(dict.fromkeys(key for key, value in named if isinstance(value, dict) and "metrics" in value))
    for suite in suites:
        yield _suite_table(facts, suite, noted=suite == suites[-1])


def _main_table(facts: RunFacts) -> Table:
    lengths = sorted({n for name in facts.models for n in facts.perplexity(name)})
    pieces = facts.kl
    heads = ["", *(f"Perplexity at {tokens(n)}" for n in lengths), "KL to native", "Same first token", "KL won back"]
    rows = []
    for name in facts.models:
        values, kl, same = facts.perplexity(name), facts.number(name, "kl"), facts.number(name, "agreement")
        rows.append([
            name,
            *(_perplexity(values[n]) if n in values else "–" for n in lengths),
            "–" if kl is None else f"{kl:.4f}{_spread(pieces.get(name, {}).get('stderr'))}",
            "–" if same is None else f"{same:.1%}",
            _won_back(facts, name),
        ])  # fmt: skip
    return Table("Comparison", heads, rows, _kl_notes(facts))


def _kl_notes(facts: RunFacts) -> list[str]:
    """How sure the run's own KL is: paired tests over pieces of held-out text."""
    row = facts.kl.get(facts.restored, {})
    told = [_against(test) for test in row.get("tests", ()) if test["b"] != "native"]
    if not told or facts.objectives:
        return []
    return [
        f"± is one standard error over {row['n']} pieces of held-out text. KL of restored: {'; '.join(told)} (a "
        "bootstrap over the same pieces)."
    ]


def _against(test: Mapping[str, Any]) -> str:
    """'better than scaled, p < 0.001', 'against scaled inside the noise'."""
    if test["outcome"] in ("better", "worse"):
        return f"{test['outcome']} than {test['b']}, {p_in_words(test['p'])}"
    return f"against {test['b']} {_tested(test)}"


def _spread(stderr: Any) -> str:
    return f" ± {stderr:.2g}" if isinstance(stderr, int | float) and stderr else ""


def _objectives_table(facts: RunFacts) -> Table:
    """What each objective won back, how it stands to the best, and what it cost."""
    weighed = facts.weighed
    best = weighed.best(KL)
    heads = ["", "KL to native", f"Against {best}", "Training", "Tokens/s", "Peak memory"]
    rows = []
    for name in weighed.done:
        cost, test = training(facts.rows, name), weighed.against_best(KL, name)
        rows.append([
            name,
            _value(facts.comparisons[HELD_OUT]["metrics"][KL][name]),
            "the best" if name == best else _tested(test) if test else "–",
            *((duration(cost["seconds"]), f"{cost['tokens_per_second']:.0f}", f"{cost['peak_memory_gb']:.2f} GB")
              if cost else ("–", "–", "–")),
        ])  # fmt: skip
    pieces = facts.comparisons[HELD_OUT]["metrics"][KL][best]["n"]
    note = (
        f"All were trained on the same tokens from the same start. ± is one standard error over {pieces} pieces of "
        "held-out text; each by itself is compared with the best on the same pieces, by a bootstrap of the mean "
        "difference."
    )
    return Table("Objectives", heads, rows, [note])


def _tested(test: Mapping[str, Any]) -> str:
    """The outcome of a paired test, with its p where it says something."""
    p = test.get("p")
    if isinstance(p, int | float) and test["outcome"] in ("better", "worse"):
        return f"{test['outcome']}, {p_in_words(p)}"
    return str(test["outcome"])


def _won_back(facts: RunFacts, name: str) -> str:
    scaled, own = facts.number("scaled", "kl"), facts.number(name, "kl")
    if name in ("native", "scaled") or not scaled or own is None:
        return "–"
    return f"{100 * (1 - own / scaled):.0f}%"


def _suite_table(facts: RunFacts, suite: str, *, noted: bool) -> Table:
    """Values with standard errors; of the restored model also what is kept, what is won back, and the tests."""
    entries = {name: facts.rows[name][suite]["metrics"] for name in facts.models if suite in facts.rows[name]}
    metrics = list(dict.fromkeys(metric for found in entries.values() for metric in found))
    metrics = [metric for metric in metrics if not _twice(metric, metrics)]
    compared = {metric: _compared(facts, suite, metric) for metric in metrics}
    extra = list(dict.fromkeys(head for found in compared.values() for head in found))
    rows = [
        [
            metric,
            *(_value(found.get(metric)) for found in entries.values()),
            *(compared[metric].get(head, "–") for head in extra),
        ]
        for metric in metrics
    ]
    title = SUITE_TITLES.get(suite) or f"Multiple choice: {suite.partition('/')[2] or suite}"
    of = facts.restored if facts.objectives else "the restored model"
    return Table(title, ["", *entries, *extra], rows, [TESTS.format(of=of)] if noted else [])


def _twice(metric: str, metrics: Sequence[str]) -> bool:
    """Whether a metric over all lengths is that of the only length there is."""
    return sum(other.startswith(f"{metric}@") for other in metrics) == 1


def _value(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    spread = entry.get("stderr")
    value = entry["value"]
    shown = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
    return f"{shown} ± {spread:.2g}" if isinstance(spread, int | float) else shown


def _compared(facts: RunFacts, suite: str, metric: str) -> dict[str, str]:
    """What the comparison says of the restored model, or of each objective's, by the column it stands in."""
    rows = facts.comparisons.get(suite, {}).get("metrics", {}).get(metric, {})
    row, lost = rows.get(facts.restored, {}), rows.get("scaled", {}).get("tests", ())
    columns = [("of native", "percent_of_native")]
    if not any(test["outcome"] == NOISE for test in lost):  # else there is nothing to win back
        columns.append(("won back", "recovered"))
    found = {head: f"{row[key]:.0f}%" for head, key in columns if isinstance(row.get(key), int | float)}
    for label in facts.objectives or (facts.restored,):
        for test in rows.get(label, {}).get("tests", ()):
            if not facts.objectives or test["b"] == "native":
                found[f"{label} vs {test['b']}"] = _tested(test)
    return found


def figures(facts: RunFacts) -> Iterator[Figure]:
    """Loss, perplexity by length and by position, pass key, memory: those there are numbers for."""
    curves = facts.curves or {facts.restored: facts.steps}
    curves = {name: steps for name, steps in curves.items() if len(steps) > 1}
    for name, steps in curves.items():
        title = f"Training loss, {name}" if facts.objectives else "Training loss"
        yield _over_steps({name: steps}, "loss", title, "nats")
    for measured in (facts.perplexity, facts.suite_perplexity):
        by_length = {name: found for name in facts.models if len(found := measured(name)) > 1}
        if by_length:
            yield _perplexity_figure("Perplexity by length", "tokens", by_length)
            break
    by_position = max((_by_position(facts, of) for of in (_suite_positions, _held_out_positions)), key=len)
    if by_position:
        yield _perplexity_figure("Perplexity by position", "position in the text, up to", by_position)
    if curves:
        yield _over_steps(curves, "memory", "Peak memory", "GB", zero=True)
    for name in facts.models:
        if grid := facts.rows[name].get("passkey", {}).get("grid"):
            yield _passkey_figure(name, {int(n): {int(d): s for d, s in cells.items()} for n, cells in grid.items()})


def _by_position(facts: RunFacts, of: Callable[[RunFacts, str], dict[int, float]]) -> dict[str, dict[int, float]]:
    return {name: found for name in facts.models if (found := of(facts, name))}


def _suite_positions(facts: RunFacts, name: str) -> dict[int, float]:
    found = facts.rows[name].get("ppl", {}).get("by_position", ())
    return {int(bucket["end"]): float(bucket["perplexity"]) for bucket in found}


def _held_out_positions(facts: RunFacts, name: str) -> dict[int, float]:
    """By the end of each bucket of positions, the first a piece long, each further one as long as all before it."""
    lengths = [int(key.partition("@")[2]) for key in facts.pieces.get(name, {}) if key.startswith("perplexity@")]
    if not lengths:
        return {}
    length, values = max(lengths), facts.pieces[name][f"perplexity@{max(lengths)}"]
    numbered = [(int(piece.split("/")[2]), value) for piece, value in values.items()]
    count = 1 + max(number for number, _ in numbered)
    if count == 1:  # one point is no curve
        return {}
    buckets: dict[int, list[float]] = {}
    for number, value in numbered:
        buckets.setdefault(min(1 << number.bit_length(), count), []).append(value)
    return {
        round(end * length / count): math.exp(min(sum(found) / len(found), 700.0))
        for end, found in sorted(buckets.items())
    }


def _over_steps(
    curves: Mapping[str, Sequence[Mapping[str, float]]], key: str, title: str, unit: str, *, zero: bool = False
) -> Figure:
    series = [
        Series(name, _style(name), [(s["step"], s[key]) for s in steps if math.isfinite(s[key])])
        for name, steps in curves.items()
    ]
    points = [point for item in series for point in item.points] or [(0.0, 0.0), (1.0, 0.0)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    x = Axis(first, last, tuple(t for t in linear_axis([first, last]).ticks if first <= t <= last))
    svg = line_chart(
        series, x, linear_axis([y for _, y in points], zero=zero), x_label="step", y_label=f"{title}, {unit}"
    )
    return Figure(f"{title}, {unit}", svg, [(item.name, item.style) for item in series] if len(series) > 1 else ())


def _perplexity_figure(title: str, x_label: str, rows: Mapping[str, Mapping[int, float]]) -> Figure:
    series = [Series(name, _style(name), sorted(found.items())) for name, found in rows.items() if found]
    values = [v for found in rows.values() for v in found.values()]
    lengths = sorted({n for found in rows.values() for n in found})
    y = log_axis(values) if max(values) > WIDE * min(values) else linear_axis(values, zero=True)
    svg = line_chart(series, doubling_axis(lengths), y, x_label=x_label, y_label=title, x_format=tokens)
    cells = [[name, *(_perplexity(found[n]) if n in found else "–" for n in lengths)] for name, found in rows.items()]
    data = Table(title, ["", *(tokens(n) for n in lengths)], cells)
    return Figure(title, svg, [(item.name, item.style) for item in series], data)


def _passkey_figure(name: str, grid: Mapping[int, Mapping[int, float]]) -> Figure:
    depths = sorted({depth for cells in grid.values() for depth in cells})
    cells = [[f"{d}%", *(f"{grid[n][d]:.0%}" if d in grid[n] else "–" for n in sorted(grid))] for d in depths]
    title = f"Pass key found, {name}, by depth"
    data = Table(title, ["depth", *(tokens(n) for n in sorted(grid))], cells)
    return Figure(title, heat_map(grid, x_label="tokens", y_label="depth of the key"), (), data)


def _style(name: str) -> str:
    return name if name in MODELS else STYLES.get(name, "other")


def settings(facts: RunFacts) -> list[tuple[str, str]]:
    """The configuration as (option, value), without what was left open."""
    idle = "objective" if facts.objectives else "compare"
    return [(str(key), _plain(value)) for key, value in facts.config.items() if value is not None and key != idle]


def provenance(facts: RunFacts) -> list[tuple[str, str]]:
    """Machine, time, training tokens, export check and versions."""
    run, found = facts.run, list[tuple[str, str]]()
    for key, title in (("machine", "Machine"), ("training_tokens", "Training tokens")):
        if key in run:
            found.append((title, f"{run[key]:,}".replace(",", " ") if isinstance(run[key], int) else _plain(run[key])))
    if isinstance(run.get("seconds"), int | float):
        found.append(("Time", duration(run["seconds"])))
    if isinstance(facts.export.get("kl"), int | float):
        found.append(("KL of the export to the trained model", f"{facts.export['kl']:.1g} nats a token"))
    versions = run.get("versions")
    if isinstance(versions, dict):
        found.append(("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------
# Writing it


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report.md into a run directory, finished or under way; returns the HTML file.

    Raises UserError where the directory holds no run or a file of it is broken; nothing is written then.
    """
    facts = read_run(run_dir)
    page, twin = to_html(facts), to_markdown(facts)
    target = RunDir(run_dir).report
    for path, text in ((target, page), (target.with_suffix(".md"), twin)):
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return target


def heading(facts: RunFacts) -> tuple[str, str]:
    """(title, subtitle): the model's name, and what was done to its window."""
    name = Path(str(facts.config.get("model", facts.root.name))).name
    parts = []
    window, factor = facts.run.get("native_window"), facts.run.get("factor", facts.config.get("factor"))
    if isinstance(window, int) and isinstance(factor, int | float):
        parts.append(f"{window} → {int(window * factor)} tokens")
    method, objective = facts.config.get("method"), facts.config.get("objective")
    if method and isinstance(factor, int | float):
        parts.append(f"{method} scaling × {factor:g}")
    if facts.objectives:
        parts.append(f"objectives: {', '.join(facts.objectives)}")
    else:
        parts += [f"objective: {objective}"] if objective else []
    return name, " · ".join(parts)


def to_markdown(facts: RunFacts) -> str:
    """The report as Markdown, for a model card."""
    title, subtitle = heading(facts)
    lines = [f"# {_md(title)}", "", *([_md(subtitle), ""] if subtitle else []), _md(" ".join(headline(facts))), ""]
    if told := notes(facts):
        commands = [f" `{note.command}`" if note.command else "" for note in told]
        lines += [*(f"- {_md(n.text)}{c}" for n, c in zip(told, commands, strict=True)), ""]
    shown = [*tables(facts), *(figure.data for figure in figures(facts) if figure.data)]
    for table in shown:
        lines += [f"## {_md(table.title)}", "", *_md_table(table), ""]
        lines += [f"- {_md(note)}" for note in table.notes] + ([""] if table.notes else [])
    for name, steps in facts.curves.items():
        lines += [f"## Training, {_md(name)}", "", _md(_course(steps)), ""] if steps else []
    if facts.steps:
        lines += ["## Training", "", _md(_course(facts.steps)), ""]
    for name, pairs in (("Run", provenance(facts)), ("Configuration", settings(facts))):
        if pairs:
            lines += [f"## {name}", "", *_md_table(Table(name, ["", "value"], pairs), left=True), ""]
    return "\n".join(lines)


def _course(steps: Sequence[Mapping[str, float]]) -> str:
    first, last, peak = steps[0], steps[-1], max(s["memory"] for s in steps)
    return (
        f"Loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}; "
        f"at most {peak:.2f} GB."
    )


def _md_table(table: Table, *, left: bool = False) -> Iterator[str]:
    yield "| " + " | ".join(map(_md, table.heads)) + " |"
    yield "|" + "|".join(["---", *(["---" if left else "--:"] * (len(table.heads) - 1))]) + "|"
    for row in table.rows:
        yield "| " + " | ".join(map(_md, row)) + " |"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = escape(one_line(text), quote=False)
    for sign in "\\`*_[]|#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped


def to_html(facts: RunFacts) -> str:
    """The report as one HTML page."""
    title, subtitle = heading(facts)
    first, *others = headline(facts)
    body = [
        f"<header><p class=kicker>LinearARD report</p><h1>{escape(title)}</h1>"
        f"<p class=sub>{escape(subtitle)}</p></header>",
        f"<section class=verdict><p><strong>{escape(first)}</strong> {escape(' '.join(others))}</p></section>",
        _html_notes(notes(facts)),
        *map(_html_table, tables(facts)),
    ]
    charts = [_html_figure(figure) for figure in figures(facts)]
    if charts:
        body.append(f'<section><h2>Figures</h2><div class="figures">{"".join(charts)}</div></section>')
    for name, pairs in (("Run", provenance(facts)), ("Configuration", settings(facts))):
        if pairs:
            entries = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
            body.append(f'<section><h2>{name}</h2><dl class="{name.lower()}">{entries}</dl></section>')
    return _PAGE.format(title=escape(f"{title}: LinearARD report"), style=_STYLE, body="\n".join(body))


def _html_notes(told: Sequence[Note]) -> str:
    if not told:
        return ""
    lines = (
        f"<li>{escape(note.text)}{f'<pre tabindex=0>{escape(note.command)}</pre>' if note.command else ''}</li>"
        for note in told
    )  # fmt: skip
    return f"<ul class=care>{''.join(lines)}</ul>"


def _html_table(table: Table) -> str:
    heads = "".join(f"<th scope=col>{escape(head)}</th>" for head in table.heads)
    rows = "".join(
        f'<tr class="{_style(row[0])}"><th scope=row>{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )  # fmt: skip
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f"<section><h2>{escape(table.title)}</h2><div class=scroll tabindex=0><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{f'<ul class=notes>{notes}</ul>' if notes else ''}</section>"
    )


def _html_figure(figure: Figure) -> str:
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for name, style in figure.legend)
    return (
        f"<figure><figcaption>{escape(figure.title)}{f'<span class=legend>{legend}</span>' if legend else ''}"
        f"</figcaption>{figure.svg}</figure>"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
.native{--line:var(--native)}.scaled{--line:var(--scaled)}.restored{--line:var(--restored)}.other{--line:var(--other)}
.one{--line:var(--one)}.two{--line:var(--two)}.three{--line:var(--three)}.four{--line:var(--four)}
:root{--page:#fcfcfb;--card:#fff;--ink:#1c1d21;--soft:#62656e;--rule:#e3e4e8;--tint:#f3f5f9;
--native:#6b7280;--scaled:#d1690e;--restored:#1f5fd0;--other:#7a3fb0;--heat:#1f5fd0;
--one:#1f5fd0;--two:#7a3fb0;--three:#0b7d6f;--four:#b8256f}
@media (prefers-color-scheme:dark){:root{--page:#141518;--card:#1b1d21;--ink:#e8e9ec;--soft:#9a9ea8;--rule:#30333a;
--tint:#1f232b;--native:#a0a6b2;--scaled:#f0964a;--restored:#74a7ff;--other:#c094f0;--heat:#4c86ee;
--one:#74a7ff;--two:#c094f0;--three:#4cc4b0;--four:#f27cb0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:3rem 1.25rem 4rem}
.kicker{margin:0;color:var(--soft);font-size:.8rem;letter-spacing:.07em;text-transform:uppercase}
h1{margin:.15rem 0 .2rem;font-size:2rem;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
.sub{margin:0;color:var(--soft)}
h2{margin:0 0 .75rem;font-size:1.05rem;letter-spacing:-.005em}
section{margin-top:2.5rem}
.verdict{margin-top:1.75rem;padding:1.1rem 1.3rem;border-left:4px solid var(--restored);border-radius:0 8px 8px 0;
background:var(--tint);font-size:1.08rem}
.verdict p{margin:0;max-width:46rem}
.care{margin:1rem 0 0;padding:0 0 0 1.1rem;font-size:.95rem;color:var(--soft);max-width:60rem}
.care li{margin:.4rem 0}
pre{margin:.3rem 0 .5rem;padding:.4rem .6rem;border-radius:6px;background:var(--tint);color:var(--ink);overflow-x:auto;
font:.8rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.94rem}
th,td{padding:.5rem .9rem;text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.85rem;border-bottom:1px solid var(--rule)}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
tbody th{font-weight:500}
tbody tr+tr>*{border-top:1px solid var(--rule)}
tbody tr:not(.other) th{border-left:3px solid currentColor;color:var(--line)}
tr.restored td,tr.restored th{font-weight:650}
.notes{margin:.7rem 0 0;padding:0;list-style:none;color:var(--soft);font-size:.87rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0;padding:.9rem .9rem .6rem;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:.1rem 1rem;margin-bottom:.5rem;
font-size:.92rem;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .8rem;font-weight:400;font-size:.85rem;color:var(--soft)}
.key::before{content:"";display:inline-block;width:.85rem;height:3px;margin-right:.35rem;vertical-align:middle;
border-radius:2px;background:currentColor}
.key::before{color:var(--line)}
svg{display:block;width:100%;height:auto;font-size:12px;font-variant-numeric:tabular-nums}
svg text{fill:var(--soft)}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft);stroke-opacity:.6}
.middle{text-anchor:middle}.end{text-anchor:end}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line{stroke:var(--line)}.line.three{stroke-dasharray:7 4}.line.four{stroke-dasharray:2 4}
.dot{stroke:var(--card);stroke-width:1}
.dot{fill:var(--line)}
.cell{fill:var(--heat)}.cell-back{fill:var(--tint)}svg text.cell-text{fill:var(--ink)}svg text.on-dark{fill:#fff}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:0 2rem;margin:0;font-size:.9rem}
dl.run{grid-template-columns:1fr}
dl div{display:flex;justify-content:space-between;gap:1rem;padding:.3rem 0;border-bottom:1px solid var(--rule)}
dt{color:var(--soft)}dd{margin:0;text-align:right;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
@media (max-width:30rem){main{padding:1.75rem 1rem 3rem}h1{font-size:1.6rem}.verdict{font-size:1rem;padding:.9rem 1rem}
th,td{padding:.45rem .65rem}svg{font-size:15px}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--tint:#f4f4f4;--native:#6b7280;
--scaled:#d1690e;--restored:#1f5fd0;--other:#7a3fb0;--heat:#1f5fd0;--one:#1f5fd0;--two:#7a3fb0;--three:#0b7d6f;
--four:#b8256f}
body{font-size:10.5pt}main{max-width:none;padding:0}section{margin-top:1.4rem}.scroll{overflow:visible}pre{white-space:pre-wrap}
figure,tr,dl div{break-inside:avoid}h2{break-after:avoid}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
