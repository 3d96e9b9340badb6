"""Command: extend a model's window and restore what that costs. `python -m mlx_linearard.distill --help`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..cli import run_command
from ..config import DistillConfig, parse
from ..distributed.ranks import Ranks, joined
from ..errors import UserError
from ..progress import Progress, duration
from ..report.content import read_run, verdict
from .compare import compare_objectives
from .run import Listener, Result, distill
from .step import StepRecord


class Printer(Listener):
    """Prints a run's progress on standard output."""

    def __init__(self) -> None:
        self._progress = Progress(sys.stdout)

    def say(self, text: str) -> None:
        self._progress.say(text)

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        self._progress.tokens(label, done, total)

    def step(self, record: StepRecord, total: int) -> None:
        self._progress.update(
            "training",
            f"step {record.step}/{total}: loss {record.loss:.4f}, gradient {record.grad_norm:.3f}, "
            f"{record.tokens / record.seconds:.0f} tokens/s, peak {record.peak_memory / 1e9:.2f} GB",
            record.step,
            total,
            before=record.step - 1,
        )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of a results.json, by model, as the table that the README shows."""
    lengths = list(rows["scaled"]["perplexity"])
    heads = ["", *(f"perplexity @{n}" for n in lengths), "KL to native", "top-1 agreement"]
    cells = [heads]
    for name, row in rows.items():
        kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        cells.append([name, *(f"{row['perplexity'][n]:.2f}" for n in lengths), kl, agreement])
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _guarded(result: Result) -> str:
    return f"; the guard skipped {result.skipped} of them" if result.skipped else ""


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body: parse, distil, tell."""
    with joined() as ranks:
        config = DistillConfig(**ranks.from_first(lambda: dataclasses.asdict(_parsed(arguments, ranks))))
        if config.compare:
            return _compare(config)
        result = distill(config, Printer(), ranks)
    if result is None:
        return 0
    print(f"\n{table({name: getattr(result, name).as_json() for name in ('native', 'scaled', 'restored')})}\n")
    print("\n".join(verdict(read_run(result.run.root))))
    print(
        f"Exported is the state after step {result.exported_step} of {result.steps}{_guarded(result)}; "
        f"{duration(result.seconds)} in all; the report is {result.run.report}."
    )
    model = result.run.model
    print(f'The restored model is in {model}; try: mlx_lm.generate --model {model} --prompt "Hello"')
    return 0


def _parsed(arguments: Sequence[str] | None, ranks: Ranks) -> DistillConfig:
    """The options of the command line, which those of the first rank are for all."""
    config = parse(arguments)
    if config.compare and ranks.size > 1:
        raise UserError("--compare makes one run after another, which processes do not share: leave mlx.launch out")
    return config


def _compare(config: DistillConfig) -> int:
    """--compare: all rows, what they say, and where everything is."""
    made = compare_objectives(config, Printer())
    if made is None:
        return 0
    print(f"\n{table({name: made.results[name] for name in ('native', 'scaled', *made.objectives)})}\n")
    print("\n".join(verdict(read_run(made.run.root))))
    print(
        f"{duration(made.seconds)} in all; the report is {made.run.report}, the models are in "
        f"{made.run.root}/{{{','.join(made.objectives)}}}/model."
    )
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.distill`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
