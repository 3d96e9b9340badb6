"""What a run shows on a terminal: its progress, its table, and its last lines. Only the command uses this."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli import path_word, runnable, shell_lines
from ..files import RunDir
from ..progress import Progress, duration
from ..report.load import read_run
from ..results.next_steps import DISTILL, next_steps
from ..results.verdict import verdict
from .compare import ComparedRuns
from .listener import Listener
from .run import Result
from .step import StepRecord

AGAIN = "press Ctrl-C again to stop immediately, without saving"


class Printer(Listener):
    """Shows a run's progress on standard output. As a context manager it leaves no half-written line behind."""

    def __init__(self) -> None:
        self._progress = Progress(sys.stdout)
        self.opened: RunDir | None = None  # what --resume would continue

    def __enter__(self) -> Printer:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.__exit__(*error)

    def started(self, run: RunDir, config: Mapping[str, Any], step: int) -> None:
        self.opened = run

    def say(self, text: str) -> None:
        self._progress.say(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self._progress.tokens(label, done, total)

    def step(self, record: StepRecord, total: int) -> None:
        self._progress.update(
            "training",
            [
                f"step {record.step}/{total}: loss {record.loss:.4f}",
                f"{record.tokens / record.seconds:.0f} tokens/s",
                f"peak {record.peak_memory / 1e9:.2f} GB",
                f"gradient {record.grad_norm:.3f}",
            ],
            record.step,
            total,
            before=record.step - 1,
        )

    def stopping(self, step: int) -> None:
        self._progress.say(f"finishing step {step}, then saving; {AGAIN}")

    def interrupted(self) -> None:
        """Ctrl-C outside of training: nothing needs to be saved."""
        self._progress.say("stopping")

    def how_to_resume(self, run: RunDir) -> None:
        """The command that continues the run or the comparison in `run`, if this process has opened it."""
        if self.opened is not None and run.config.exists():
            self.say("To continue:")
            self.commands([(DISTILL, "--config", path_word(run.config), "--resume")])

    def commands(self, commands: Sequence[Sequence[object]]) -> None:
        """Command lines, indented, each as wide as the terminal at most."""
        for words in commands:
            self._progress.say(shell_lines(runnable(words), self._progress.width, indent="    "), whole=True)

    def table(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """The rows of a results.json, between blank lines."""
        self._progress.say("\n" + table(rows, self._progress.width) + "\n", whole=True)


# ---------------------------------------------------------------------------------------------------
# The table


def table(rows: Mapping[str, Mapping[str, Any]], width: int | None = None) -> str:
    """The rows of a results.json, by model, as a table of text; if that is too wide, with a column for each model."""
    lengths = list(rows["scaled"]["perplexity"])
    cells = [["", *(f"perplexity @{n}" for n in lengths), "KL to native", "top-1 agreement"]]
    for name, row in rows.items():
        kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        cells.append([name, *(f"{row['perplexity'][n]:.2f}" for n in lengths), kl, agreement])
    text = _aligned(cells)
    if width is not None and len(text.split("\n")[0]) > width:
        text = _aligned([list(column) for column in zip(*cells, strict=True)])
    return text


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


# ---------------------------------------------------------------------------------------------------
# The last lines


def print_result(result: Result, printer: Printer) -> None:
    """The table, what happened in plain words, and what to type next."""
    printer.table({name: getattr(result, name).as_json() for name in ("native", "scaled", "restored")})
    skipped = f"; the guard skipped {result.skipped} of the steps" if result.skipped else ""
    _ending(
        result.run.root,
        printer,
        f"The state after step {result.exported_step} of {result.steps} is exported{skipped}; "
        f"{duration(result.seconds)} in all; the report is {result.run.report}.",
    )


def print_comparison(comparison: ComparedRuns, printer: Printer) -> None:
    """--compare: all rows, what happened in plain words, and what to type next."""
    rows = ("native", "scaled", *comparison.objectives)
    printer.table({name: comparison.results[name] for name in rows})
    _ending(
        comparison.run.root,
        printer,
        f"{duration(comparison.seconds)} in all; the report is {comparison.run.report}, the models are in "
        f"{comparison.run.root}/{{{','.join(comparison.objectives)}}}/model.",
    )


def _ending(root: Path, printer: Printer, facts: str) -> None:
    facts_of_run = read_run(root)
    for line in (*verdict(facts_of_run), facts, "", "Next:"):
        printer.say(line)
    for step in next_steps(facts_of_run, root):
        printer.say(f"  {step.text}")
        printer.commands(step.commands)
