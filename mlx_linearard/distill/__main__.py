"""Command: extend a model's window and restore what that costs. `python -m mlx_linearard.distill --help`."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ..cli import Elsewhere, Parser, integer, run_command
from ..config import (
    ALSO,
    LARGEST_COUNT,
    OTHER,
    SAME,
    DistillConfig,
    flag,
    read_yaml_and_notes,
    shortened,
    translated,
    type_of,
)
from ..distributed.ranks import Ranks, joined
from ..errors import UserError
from ..files import RunDir
from .compare import compare_objectives
from .interrupt import answered
from .run import distill
from .terminal import Printer, print_comparison, print_result

DESCRIPTION = (
    "Extend a model's context window and restore what that costs, by distilling the frozen native model. "
    "Without any option it runs a real demonstration sized to this machine. Several processes share a run that "
    "mlx.launch starts: `mlx.launch -n 2 -- python -m mlx_linearard.distill ...` on one machine, or "
    "`mlx.launch --hostfile hosts.json -- ...` on several. Each process makes its part of every step's --grad-accum "
    "times --batch-size blocks, the result is the same as with one process, and only the first process writes files."
)

COMMON = (  # the options that --help explains
    "model", "data", "output", "config", "method", "factor", "objective", "long_weight", "steps", "tokens", "seq_len",
    "learning_rate", "lengths", "resume", "dry_run",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------
# Options


def parser() -> argparse.ArgumentParser:
    """The command line, made from DistillConfig. A flag that is not given is absent from the namespace."""
    common = [f"--{flag(name)}" for name in COMMON]
    command = Parser("mlx_linearard.distill", DESCRIPTION, argument_default=argparse.SUPPRESS, common=common)
    command.add_argument("-c", "--config", metavar="FILE.yaml", help="options from a file; flags win over it")
    options = dataclasses.fields(DistillConfig)
    for name in dict.fromkeys(item.metadata["group"] for item in options):
        group = command.add_argument_group(name)
        for item in options:
            if item.metadata["group"] == name:
                _add_flag(group, item)
                for theirs in (name for name, ours in SAME.items() if ours == item.name):
                    _add_flag(group, item, theirs)
    for theirs, instead in OTHER.items():
        command.add_argument(f"--{flag(theirs)}", action=Elsewhere, instead=instead)
    return command


def _add_flag(group: Any, item: dataclasses.Field[Any], hidden: str | None = None) -> None:
    """Add the flag of an option, or one under another tool's name that --help does not show."""
    kind, text = type_of(item), item.metadata["help"].replace("%", "%%")
    if kind is bool:
        group.add_argument(f"--{flag(item.name)}", action="store_true", help=text, default=argparse.SUPPRESS)
        return
    if item.default is not None:
        text = f"{text} (default: {item.default})"
    types = {int: integer(-LARGEST_COUNT, LARGEST_COUNT), float: _number, str: str}
    names = [hidden] if hidden else [*(also for also, name in ALSO.items() if name == item.name), item.name]
    group.add_argument(
        *(f"--{flag(name)}" for name in names),
        type=types[kind],
        dest=names[-1],
        help=argparse.SUPPRESS if hidden else text,
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
    return parse_with_notes(arguments)[0]


def parse_with_notes(arguments: Sequence[str] | None = None) -> tuple[DistillConfig, list[str]]:
    """The options of a command line, and a note for each option in a file of mlx_lm.lora that has no equal here."""
    given = vars(parser().parse_args(arguments))
    path = given.pop("config", None)
    options, notes = read_yaml_and_notes(path) if path else ({}, [])
    return DistillConfig(**{**options, **translated(given, "")}), notes


def _parse_for_all(arguments: Sequence[str] | None, ranks: Ranks, printer: Printer) -> DistillConfig:
    """The options of the first rank's command line, for all ranks."""
    with ranks.meeting():
        options: dict[str, Any] = {}
        if ranks.leads:
            config, notes = parse_with_notes(arguments)
            for note in notes:
                printer.say(note)
            if config.compare and ranks.size > 1:
                raise UserError("--compare makes one run after another in one process: leave mlx.launch out")
            options = dataclasses.asdict(config)
        options = ranks.from_first(options)
    return DistillConfig(**options)


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body: parse, distil, print the table and what to do next."""
    with Printer() as printer, answered([signal.SIGINT], printer.interrupted), joined() as ranks:
        config = _parse_for_all(arguments, ranks, printer)
        try:
            if config.compare:
                if (comparison := compare_objectives(config, printer)) is not None:
                    print_comparison(comparison, printer)
            elif (result := distill(config, printer, ranks)) is not None:
                print_result(result, printer)
        except KeyboardInterrupt:
            if ranks.size == 1:
                printer.how_to_resume(RunDir(config.output))
            raise
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.distill`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
