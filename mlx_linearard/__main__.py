"""All commands behind one name: `mlx_linearard COMMAND ...`, or `python -m mlx_linearard COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from . import __version__
from .cli import run_command
from .config import shortened
from .errors import UserError

PACKAGE = "mlx_linearard"
COMMANDS = {
    "distill": "extend a model's window and restore what that costs",
    "evaluate": "measure models on text and tasks, side by side",
    "export": "write a finished run in the format that another tool reads",
    "report": "write a run's report again",
    "convert": "convert models and adapters between formats",
    "doctor": "check this machine: is the loss exact on it, how fast is it",
}


def overview() -> str:
    """What `mlx_linearard --help` prints."""
    lines = "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
    return (
        f"usage: {PACKAGE} COMMAND ...\n\ncommands:\n{lines}\n\n`{PACKAGE} COMMAND --help` explains a command; "
        f"{PACKAGE}.COMMAND is the same as {PACKAGE} COMMAND.\n`{PACKAGE} --version` prints the version."
    )


def _without_command(words: list[str]) -> int:
    """Print the version or the overview; UserError for anything else."""
    if words[:1] == ["--version"]:
        print(f"{PACKAGE} {__version__}")
    elif not words or words[0] in ("-h", "--help"):
        print(overview())
    else:
        raise UserError(f"there is no command {shortened(words[0])}: choose from {', '.join(COMMANDS)}")
    return 0


def main() -> None:
    """Entry point of `mlx_linearard`."""
    words = sys.argv[1:]
    name = words[0].removeprefix(f"{PACKAGE}.") if words else ""
    if name not in COMMANDS:
        sys.exit(run_command(lambda: _without_command(words)))
    sys.argv[:2] = [f"{PACKAGE}.{name}"]
    importlib.import_module(f"{PACKAGE}.{name}.__main__").main()


if __name__ == "__main__":
    main()
