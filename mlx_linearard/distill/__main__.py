"""Command: extend a model's window and restore what that costs. `python -m mlx_linearard.distill --help`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..cli import Parser, integer, path_word, run_command, shell_command
from ..config import LARGEST_COUNT, DistillConfig, flag, read_yaml, shortened, type_of
from ..distributed.ranks import Ranks, joined
from ..errors import UserError
from ..progress import Progress, duration
from ..report.load import read_run
from ..results.verdict import verdict
from .compare import compare_objectives
from .listener import Listener
from .run import Result, distill
from .step import StepRecord

DESCRIPTION = (
    "Extend a model's context window and restore what that costs, by distilling the frozen native model. "
    "Without any option it runs a real demonstration sized to this machine. Several processes share a run that "
    "mlx.launch starts: `mlx.launch -n 2 -- python -m mlx_linearard.distill ...` on one machine, or "
    "`mlx.launch --hostfile hosts.json -- ...` on several. Each process makes its part of every step's --grad-accum "
    "times --batch-size blocks, the result is the same as with one process, and only the first process writes files."
)

# ---------------------------------------------------------------------------------------------------
# Options


def parser() -> argparse.ArgumentParser:
    """The command line, made from DistillConfig. A flag that is not given is absent from the namespace."""
    command = Parser("mlx_linearard.distill", DESCRIPTION, argument_default=argparse.SUPPRESS)
    command.add_argument("-c", "--config", metavar="FILE.yaml", help="options from a file; flags win over it")
    options = dataclasses.fields(DistillConfig)
    for name in dict.fromkeys(item.metadata["group"] for item in options):
        group = command.add_argument_group(name)
        for item in options:
            if item.metadata["group"] == name:
                _add_flag(group, item)
    return command


def _add_flag(group: Any, item: dataclasses.Field[Any]) -> None:
    kind, text = type_of(item), item.metadata["help"].replace("%", "%%")
    if kind is bool:
        group.add_argument(f"--{flag(item.name)}", action="store_true", help=text, default=argparse.SUPPRESS)
        return
    if item.default is not None:
        text = f"{text} (default: {item.default})"
    types = {int: integer(-LARGEST_COUNT, LARGEST_COUNT), float: _number, str: str}
    group.add_argument(
        f"--{flag(item.name)}",
        type=types[kind],
        help=text,
        metavar=item.metadata["metavar"],
        default=argparse.SUPPRESS,
    )


def _number(text: str) -> float:
    """An argparse type: a number in ASCII characters."""
    try:
        return float(text if text.isascii() else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {shortened(text)}") from None


def parse(arguments: Sequence[str] | None = None) -> DistillConfig:
    """The options of a command line: a flag wins over --config's file, which wins over the default."""
    given = vars(parser().parse_args(arguments))
    path = given.pop("config", None)
    return DistillConfig(**{**(read_yaml(path) if path else {}), **given})


def _parse_for_all(arguments: Sequence[str] | None, ranks: Ranks) -> DistillConfig:
    """The options of the first rank's command line, for all ranks."""
    with ranks.meeting():
        options: dict[str, Any] = {}
        if ranks.leads:
            config = parse(arguments)
            if config.compare and ranks.size > 1:
                raise UserError("--compare makes one run after another in one process: leave mlx.launch out")
            options = dataclasses.asdict(config)
        options = ranks.from_first(options)
    return DistillConfig(**options)


# ---------------------------------------------------------------------------------------------------
# Output


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
    """The rows of a results.json, by model, as a table of text, like the one in the README."""
    lengths = list(rows["scaled"]["perplexity"])
    heads = ["", *(f"perplexity @{n}" for n in lengths), "KL to native", "top-1 agreement"]
    cells = [heads]
    for name, row in rows.items():
        kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.1%}"
        cells.append([name, *(f"{row['perplexity'][n]:.2f}" for n in lengths), kl, agreement])
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body: parse, distil, print the table."""
    with joined() as ranks:
        config = _parse_for_all(arguments, ranks)
        if config.compare:
            return _compare(config)
        result = distill(config, Printer(), ranks)
    if result is not None:
        _print_result(result)
    return 0


def _print_result(result: Result) -> None:
    print(f"\n{table({name: getattr(result, name).as_json() for name in ('native', 'scaled', 'restored')})}\n")
    print("\n".join(verdict(read_run(result.run.root))))
    skipped = f"; the guard skipped {result.skipped} of them" if result.skipped else ""
    print(
        f"Exported is the state after step {result.exported_step} of {result.steps}{skipped}; "
        f"{duration(result.seconds)} in all; the report is {result.run.report}."
    )
    model = result.run.model
    command = shell_command("mlx_lm.generate", "--model", path_word(model), "--prompt", "Hello")
    print(f"The restored model is in {model}; try: {command}")


def _compare(config: DistillConfig) -> int:
    """--compare: print all rows, the verdict, and the paths."""
    comparison = compare_objectives(config, Printer())
    if comparison is None:
        return 0
    rows = ("native", "scaled", *comparison.objectives)
    print(f"\n{table({name: comparison.results[name] for name in rows})}\n")
    print("\n".join(verdict(read_run(comparison.run.root))))
    print(
        f"{duration(comparison.seconds)} in all; the report is {comparison.run.report}, the models are in "
        f"{comparison.run.root}/{{{','.join(comparison.objectives)}}}/model."
    )
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.distill`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
