"""What the report says: the verdict's notes, the next steps, tables, and the settings of the run."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..cli import path_word, runnable, shell_command
from ..config import OBJECTIVES, DistillConfig
from ..files import RunDir
from ..progress import duration
from ..results.info import ExportInfo, RunInfo
from ..results.next_steps import DISTILL, next_steps
from ..results.objectives import perplexity_text
from ..results.records import Step
from ..results.rows import NATIVE, SCALED, PairedTest, Training, Value
from ..results.statistics import BETTER, KL, NOISE, WORSE, p_in_words
from ..results.suites import Note, unmeasured
from ..results.verdict import finished, headline, notes_on_suites, verdict
from .charts import tokens
from .load import RunFacts
from .parts import MISSING, Table

SUITE_TITLES = {
    "ppl": "Perplexity on the evaluation text",
    "fidelity": "Fidelity to the native model",
    "lambada": "Last word (LAMBADA)",
    "passkey": "Pass key",
    "ruler": "RULER, per cent",
    "far": "Gain from text beyond the native window, nats per token",
}
TESTS = (
    "± is one standard error; “of native” and “won back” are of {of}. Tests are paired by item: "
    "McNemar's exact test of decisions, a bootstrap of means; “inside the noise” is p of 0.05 or more."
)
MAX_FACTOR = 1e6  # the largest factor of a window that the heading shows


# ---------------------------------------------------------------------------------------------------
# Text


def heading(facts: RunFacts) -> tuple[str, str]:
    """(title, subtitle): the model's name, and what was done to its window."""
    run = facts.results.run or RunInfo()
    name = Path(str(facts.config.get("model") or facts.root.absolute().name)).name
    parts = []
    factor = run.factor or facts.config.get("factor")
    scale = factor if isinstance(factor, int | float) and 0 < factor < MAX_FACTOR else None
    if run.native_window and scale:
        parts.append(f"{run.native_window} → {int(run.native_window * scale)} tokens")
    method, objective = facts.config.get("method"), facts.config.get("objective")
    if method and scale:
        parts.append(f"{plain(method)} scaling × {scale:g}")
    if facts.objectives:
        parts.append(f"objectives: {', '.join(facts.objectives)}")
    elif objective:
        parts.append(f"objective: {plain(objective)}")
    weight, length = facts.config.get("long_weight"), facts.config.get("long_seq_len")
    if weight and length:
        term = facts.config.get("long_objective", "ce")
        parts.append(f"long text: {plain(weight)} × {plain(term)} on blocks of {plain(length)} tokens")
    return name, " · ".join(parts)


def notes(facts: RunFacts) -> list[Note]:
    """The notes below the verdict: a failed export, results that may be chance or come from scaling alone, gaps."""
    result = []
    if (export := facts.results.export) and export.failed:
        result.append(Note(_failed(export)))
    if not (names := finished(facts)):
        return result
    if facts.objectives:
        first = headline(facts)
        result += [Note(sentence) for sentence in verdict(facts) if sentence not in first]
    result += [*notes_on_suites(facts), *unmeasured(facts.rows, names, facts.window, facts.root)]
    if (text := (facts.results.run or RunInfo()).text) and text.warning:
        result.append(Note(text.warning))
    if not facts.objectives:
        result.append(Note("Whether a simpler objective does as well was not measured.", _compare_command(facts)))
    return result


def _failed(export: ExportInfo) -> str:
    kl = "not a finite number" if export.kl is None else f"{export.kl:.2g} nats per token"
    unstable = f"; {' and '.join(export.unstable)} gave different logits when computed again" if export.unstable else ""
    return (
        f"The exported model does not compute what was trained: its KL to the trained model is {kl}, at most "
        f"{export.tolerance:.2g} is allowed{unstable}. Export again with the same command and --resume."
    )


def _compare_command(facts: RunFacts) -> str:
    objective = facts.config.get("objective")
    own = objective if objective in OBJECTIVES else DistillConfig.objective
    default = DistillConfig.objective
    others = [name for name in ("relation", "logits") if name != own]
    freed = () if own == default else ("--objective", default)  # --compare is refused beside another objective
    compare = ("--compare", ",".join([own, *others]), "--output", "DIR")
    config = path_word(RunDir(facts.root).config)
    return shell_command(*runnable((DISTILL, "--config", config, *freed, *compare)))


def next_commands(facts: RunFacts) -> list[tuple[str, list[str]]]:
    """The steps that the end of a run names: the text and the command lines of each."""
    steps = next_steps(facts, facts.root)
    return [(step.text, [shell_command(*runnable(words)) for words in step.commands]) for step in steps]


def samples(facts: RunFacts) -> tuple[str, list[tuple[str, str]]]:
    """(prompt, what each model writes after it); without a prompt if no model wrote anything."""
    found = {name: sample for name in facts.models if (sample := facts.row(name).sample)}
    prompt = next((sample.prompt for sample in found.values()), "")
    return prompt, [(name, sample.text) for name, sample in found.items() if sample.prompt == prompt]


def settings(facts: RunFacts) -> list[tuple[str, str]]:
    """The configuration as (option, value), without the options that are not set."""
    idle = "objective" if facts.objectives else "compare"
    return [(key, plain(value)) for key, value in facts.config.items() if value is not None and key != idle]


def provenance(facts: RunFacts) -> list[tuple[str, str]]:
    """Machine, time, training tokens, verification of the export, and versions."""
    run, export = facts.results.run or RunInfo(), facts.results.export
    entries = []
    if run.machine is not None:
        entries.append(("Machine", run.machine))
    if run.training_tokens is not None:
        entries.append(("Training tokens", f"{run.training_tokens:,}".replace(",", " ")))
    if run.text:
        entries.append(("Text", run.text.words))
    if run.seconds is not None:
        entries.append(("Time", duration(run.seconds)))
    if export and export.kl is not None:
        entries.append(("KL of the export to the trained model", f"{export.kl:.1g} nats per token"))
    if run.versions:
        entries.append(("Versions", ", ".join(f"{name} {plain(value)}" for name, value in run.versions.items())))
    return entries


def plain(value: Any) -> str:
    """A value of config.yaml as text of bounded length."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return reprlib.repr(value) if isinstance(value, list | dict) else str(value)


def training_summary(steps: Sequence[Step]) -> str:
    """The course of the loss in a sentence; '' if no step has a finite loss."""
    known = [(step.step, step.loss) for step in steps if step.loss is not None]
    if not known:
        return ""
    (first, before), (last, after) = known[0], known[-1]
    peak = max(step.memory for step in steps)
    return f"Loss {before:.4f} at step {first}, {after:.4f} at step {last}; at most {peak:.2f} GB."


# ---------------------------------------------------------------------------------------------------
# Tables


def tables(facts: RunFacts) -> Iterator[Table]:
    """The table of the run itself, that of its objectives, then one table per suite."""
    if any(facts.row(name).perplexity or facts.row(name).kl is not None for name in facts.models):
        yield _main_table(facts)
    if facts.contest.finished:
        yield _objectives_table(facts)
    suites = list(dict.fromkeys(suite for row in facts.rows.values() for suite in row.suites))
    for suite in suites:
        yield _suite_table(facts, suite, explained=suite == suites[-1])


def _main_table(facts: RunFacts) -> Table:
    lengths = sorted({n for name in facts.models for n in facts.row(name).perplexity})
    heads = ["", *(f"Perplexity at {tokens(n)}" for n in lengths), "KL to native", "Top-1 agreement", "KL won back"]
    rows = [_main_row(facts, name, lengths) for name in facts.models]
    return Table("Comparison", heads, rows, _kl_notes(facts))


def _main_row(facts: RunFacts, name: str, lengths: Sequence[int]) -> list[str]:
    row, test = facts.row(name), facts.kl_tests.get(name)
    stderr = f" ± {test.value.stderr:.2g}" if test and test.value.stderr else ""
    return [
        name,
        *(perplexity_text(row.perplexity[n]) if n in row.perplexity else MISSING for n in lengths),
        MISSING if row.kl is None else f"{row.kl:.4f}{stderr}",
        MISSING if row.agreement is None else f"{row.agreement:.1%}",
        _won_back(facts, name),
    ]


def _won_back(facts: RunFacts, name: str) -> str:
    scaled, own = facts.row(SCALED).kl, facts.row(name).kl
    if name in (NATIVE, SCALED) or not scaled or own is None:
        return MISSING
    return f"{100 * (1 - own / scaled):.0f}%"


def _kl_notes(facts: RunFacts) -> list[str]:
    """How certain the run's own KL is: paired tests over pieces of held-out text."""
    own = facts.kl_tests.get(facts.in_question)
    texts = [_against(test) for test in own.tests if test.b != NATIVE] if own else []
    if not own or not texts or facts.objectives:
        return []
    return [
        f"± is one standard error over {own.value.n} pieces of held-out text. KL of restored: {'; '.join(texts)} (a "
        "bootstrap over the same pieces)."
    ]


def _against(test: PairedTest) -> str:
    """'better than scaled, p < 0.001', 'against scaled inside the noise'."""
    if test.outcome in (BETTER, WORSE):
        return f"{test.outcome} than {test.b}, {p_in_words(test.p or 0.0)}"
    return f"against {test.b} {_outcome(test)}"


def _outcome(test: PairedTest) -> str:
    """The outcome of a paired test, with p if there is a difference."""
    if test.p is not None and test.outcome in (BETTER, WORSE):
        return f"{test.outcome}, {p_in_words(test.p)}"
    return test.outcome


def _objectives_table(facts: RunFacts) -> Table:
    """What each objective won back, how it compares with the best, and what it cost."""
    contest = facts.contest
    best = contest.best(KL)
    heads = ["", "KL to native", f"Against {best}", "Training", "Tokens/s", "Peak memory"]
    rows = []
    for name in contest.finished:
        cost, test = facts.row(name).training, contest.against_best(KL, name)
        against = "the best" if name == best else _outcome(test) if test else MISSING
        rows.append([name, _value(contest.table(KL)[name].value), against, *_took(cost)])
    note = (
        f"All were trained on the same tokens from the same start. ± is one standard error over "
        f"{contest.table(KL)[best].value.n} pieces of held-out text; each objective is compared with the best on the "
        "same pieces, by a bootstrap of the mean difference."
    )
    return Table("Objectives", heads, rows, [note])


def _took(cost: Training | None) -> list[str]:
    if cost is None:
        return [MISSING] * 3
    return [duration(cost.seconds), f"{cost.tokens_per_second:.0f}", f"{cost.peak_memory_gb:.2f} GB"]


def _suite_table(facts: RunFacts, suite: str, *, explained: bool) -> Table:
    """Values with standard errors; for the restored model also the parts of native and won back, and the tests."""
    entries = {name: facts.row(name).suites[suite].metrics for name in facts.models if suite in facts.row(name).suites}
    metrics = list(dict.fromkeys(metric for values in entries.values() for metric in values))
    metrics = [metric for metric in metrics if not _is_shown_twice(metric, metrics)]
    compared = {metric: _compared(facts, suite, metric) for metric in metrics}
    extra = list(dict.fromkeys(head for columns in compared.values() for head in columns))
    rows = [
        [
            metric,
            *(_value(values.get(metric)) for values in entries.values()),
            *(compared[metric].get(head, MISSING) for head in extra),
        ]
        for metric in metrics
    ]
    title = SUITE_TITLES.get(suite) or f"Multiple choice: {suite.partition('/')[2] or suite}"
    of = facts.in_question if facts.objectives else "the restored model"
    return Table(title, ["", *entries, *extra], rows, [TESTS.format(of=of)] if explained else [])


def _is_shown_twice(metric: str, metrics: Sequence[str]) -> bool:
    """Whether a metric over all lengths repeats the metric of the only length."""
    return sum(other.startswith(f"{metric}@") for other in metrics) == 1


def _value(entry: Value | None) -> str:
    if entry is None:
        return MISSING
    value = entry.value
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"
    return text if entry.stderr is None else f"{text} ± {entry.stderr:.2g}"


def _compared(facts: RunFacts, suite: str, metric: str) -> dict[str, str]:
    """What the comparison says of the restored model, or of each objective's model, by column."""
    table = facts.results.compared(suite, metric)
    own, scaled = table.get(facts.in_question), table.get(SCALED)
    columns: dict[str, str] = {}
    if own and own.percent_of_native is not None:
        columns["of native"] = f"{own.percent_of_native:.0f}%"
    nothing_lost = scaled is not None and any(test.outcome == NOISE for test in scaled.tests)
    if own and own.recovered is not None and not nothing_lost:
        columns["won back"] = f"{own.recovered:.0f}%"
    for label in facts.objectives or (facts.in_question,):
        for test in table[label].tests if label in table else ():
            if not facts.objectives or test.b == NATIVE:
                columns[f"{label} vs {test.b}"] = _outcome(test)
    return columns
