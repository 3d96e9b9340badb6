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
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run directory (the --output of a distillation)")
    parser.add_argument("--run", dest="named", metavar="RUN", help="the same, as other commands take it")
    given = parser.parse_args(arguments)
    if (given.run is None) == (given.named is None):
        parser.error("give one run: RUN or --run RUN")
    path = write_report(given.run or given.named)
    print(f"Written to {path} and {path.with_suffix('.md')}")
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.report`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
