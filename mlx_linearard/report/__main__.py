"""The command line of `report`: `python -m mlx_linearard.report --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..cli import Parser, run_command
from .render import write_report

__all__ = ["main", "run", "write_report"]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser(
        "mlx_linearard.report",
        "Write report.html and report.md of a run, finished or under way: what the run cost, what it won back, and "
        "how certain that is. The HTML file needs no other file and no network.",
    )
    parser.add_argument("run", metavar="RUN", help="the run directory (the --output of a distillation)")
    path = write_report(parser.parse_args(arguments).run)
    print(f"Written to {path} and {path.with_suffix('.md')}")
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.report`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
