"""Command: prints what this machine is, how fast it is, and whether the loss is exact on it; or runs a benchmark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli import Parser, add_old_name, run_command
from ..convert.default_model import default_model
from ..errors import UserError
from ..machine import measure_machine
from . import benchmark
from .checks import examine


def _lines(report: dict[str, Any]) -> list[str]:
    test = report["self_test"]
    lines = [
        f"{name:<16} {value if value is not None else 'not installed'}" for name, value in report["versions"].items()
    ]
    lines += [
        f"system           {report['system']}",
        f"device           {report['device']}, {report['memory_gb']} GB",
        f"speed            {report['matmul_gflops']} GFLOP/s in matrix products, {report['exp_ns']} ns per exponential",
        f"model cache      {report['model_cache']}",
        *(f"{name:<16} {value}" for name, value in report["settings"].items()),
        f"self-test        loss off by {test['loss_error']:.1e}, gradient by {test['gradient_error']:.1e} of float64 "
        f"(allowed {test['allowed']:.0e}): {'passed' if test['passed'] else 'FAILED'}",
    ]
    lines += [f"attention        {case}: {choice}" for case, choice in report["attention"].items()]
    return [*lines, f"hint             {report['hint']}"] if report["hint"] else lines


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body; status 1 if the self-test fails."""
    parser = Parser(
        "mlx_linearard.doctor", "Print what this machine is, how fast it is, and whether the loss is exact on it."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="measure the loss and training steps, in about five minutes; print a Markdown table, write a JSON file",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default=argparse.SUPPRESS,
        help="folder of the benchmark's JSON file (default: the current folder)",
    )
    add_old_name(parser, "--out", "--output")
    options = parser.parse_args(arguments)
    if "output" in options and not options.benchmark:
        raise UserError("--output is the folder of a benchmark's file: give --benchmark as well")
    machine = measure_machine()
    if options.benchmark:
        file = benchmark.file_of(machine, Path(getattr(options, "output", ".")))
        say = _silent if options.json else _print_now
        model = default_model(progress=say)
    report = examine(machine)
    if options.benchmark:
        report = benchmark.benchmark(machine, report, model, say=say)
        benchmark.write(report, file)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_benchmark_lines(report, file) if options.benchmark else _lines(report)))
    return 0 if report["self_test"]["passed"] else 1


def _benchmark_lines(report: dict[str, Any], file: Path) -> list[str]:
    lines = ["", *benchmark.table(report), "", *benchmark.notes(report)]
    return [*lines, f"{report['seconds']:.0f} s in all; written to {file}; docs/measured.md says where to add the row"]


def _print_now(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


def main() -> None:
    """Entry point of `mlx_linearard.doctor`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
