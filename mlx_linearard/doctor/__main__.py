"""Command: prints what this machine is, how fast it is, and whether the loss is exact on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from ..cli import Parser, run_command
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
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 0 if report["self_test"]["passed"] else 1


def main() -> None:
    """Entry point of `mlx_linearard.doctor`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
