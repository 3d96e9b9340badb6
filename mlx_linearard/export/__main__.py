"""Command: a finished run for other tools. `python -m mlx_linearard.export --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser, integer, run_command
from ..config import DTYPES
from .formats import FORMATS, export

NEXT = {
    "mlx": 'mlx_lm.generate --model {} --prompt "Hello"',
    "hf": "transformers.AutoModelForCausalLM.from_pretrained({!r})",
    "peft": "peft.PeftModel.from_pretrained(model, {!r}), on the scaled base that adapter_config.json names",
    "adapters": "mlx_lm.server --model {0}/base --adapter-path {0}/adapters",
}


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body."""
    parser = Parser("mlx_linearard.export", "Carry a finished run on to the format that another tool wants.")
    parser.add_argument("--run", required=True, metavar="RUN", help="the run directory of a distillation")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory to write")
    parser.add_argument(
        "--format",
        default="mlx",
        choices=FORMATS,
        help="mlx and hf are fused models; peft and adapters are not",
    )
    parser.add_argument(
        "--dtype",
        choices=[d for d in DTYPES if d != "auto"],
        help="of the fused weights; their own without it",
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the fused model (mlx)")
    parser.add_argument("--q-bits", type=integer(1, 32), default=4, help="bits a weight")
    parser.add_argument("--q-group-size", type=integer(1), default=64, help="weights that share a scale")
    parser.add_argument("--overwrite", action="store_true", help="replace what --to holds")
    given = vars(parser.parse_args(arguments))
    out = export(Path(given.pop("run")), Path(given.pop("to")), progress=print, **given)
    print(f"Written to {out}; next: {NEXT[given['format']].format(str(out))}")
    return 0


def main() -> None:
    """Entry point of `mlx_linearard.export`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
