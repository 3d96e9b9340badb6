"""The command line of `export`: `python -m mlx_linearard.export --help`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..cli import Parser, add_old_name, integer, path_word, run_command, runnable, shell_command
from ..config import DTYPES
from ..files import RunDir, read_config
from .formats import FORMATS, export

NEXT: dict[str, Callable[[Path], str]] = {
    "mlx": lambda out: _runs("mlx_lm.generate", "--model", path_word(out), "--prompt", "Hello"),
    "hf": lambda out: f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})",
    "peft": lambda out: (
        f"peft.PeftModel.from_pretrained(model, {str(out)!r}), on the base that adapter_config.json names"
    ),
    "gguf": lambda out: shell_command(
        "llama-server", "-m", path_word(next(iter(sorted(out.glob("*.gguf"))), out)), "-c", 0
    ),
    "adapters": lambda out: _runs(
        "mlx_lm.server", "--model", path_word(out / "base"), "--adapter-path", path_word(out / "adapters")
    ),
}


def _runs(*words: str) -> str:
    """A command line that runs with what is installed."""
    return shell_command(*runnable(words))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = Parser("mlx_linearard.export", "Write a finished run in the format that another tool reads.")
    parser.add_argument("--run", required=True, metavar="RUN", help="the --output of a finished distillation")
    parser.add_argument("--output", metavar="DIR", required=True, help="the directory to write")
    add_old_name(parser, "--to", "--output")
    parser.add_argument(
        "--format",
        default="mlx",
        choices=FORMATS,
        help="mlx, hf and gguf: the fused model; peft and adapters: the adapters",
    )
    parser.add_argument(
        "--dtype",
        choices=[d for d in DTYPES if d != "auto"],
        help="of the fused weights; without it they keep their dtype",
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the fused model (mlx, gguf)")
    parser.add_argument(
        "--q-bits", type=integer(1, 32), help="bits per weight (default: 4, or those of a quantized base; 8 for gguf)"
    )
    parser.add_argument("--q-group-size", type=integer(1), help="weights per scale (mlx; default: 64)")
    parser.add_argument(
        "--learn",
        type=integer(0),
        default=0,
        metavar="N",
        help="train the scales of a quantized model on N texts of the run's data (mlx); 160 halved the loss measured",
    )
    parser.add_argument(
        "--no-measure",
        dest="measure",
        action="store_false",
        help="do not measure what quantizing cost, beside the native model quantized alike (mlx)",
    )
    parser.add_argument(
        "--upload-repo",
        metavar="OWNER/NAME",
        help="upload the export to this repository of the hub, which is made private; the same command continues",
    )
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument("--overwrite", action="store_true", help="replace the content of --output")
    given = vars(parser.parse_args(arguments))
    run_dir = Path(given.pop("run"))
    out = export(run_dir, Path(given.pop("output")), progress=print, **given)
    print(f"Written to {out}; next: {_base_first(run_dir, given['format'])}{NEXT[given['format']](out)}")
    return 0


def _base_first(run_dir: Path, format: str) -> str:
    """The steps before PEFT adapters can be loaded, if mlx quantized their base: transformers cannot load that."""
    base = RunDir(run_dir).base
    if format != "peft" or "quantization" not in read_config(base):
        return ""
    copied = _runs("mlx_linearard.convert", "to-hf", path_word(base), "BASE")
    return f"{copied} (transformers cannot load weights that mlx quantized) and load the model from BASE, then "


def main() -> None:
    """Entry point of `mlx_linearard.export`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
