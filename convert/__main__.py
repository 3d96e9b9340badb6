"""The command `python -m mlx_linearard.convert VERB SOURCE TARGET`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import Parser, integer, run_command
from ..errors import UserError
from ..files import refuse_existing
from ..models.dtypes import FLOATS
from ..rope import METHODS

DESCRIPTION = "Convert models and adapters between Hugging Face, PEFT, GGUF and mlx-lm, and compare them."


def parser() -> argparse.ArgumentParser:
    """The parser of every verb and flag."""
    root = Parser("mlx_linearard.convert", DESCRIPTION, formatter_class=argparse.HelpFormatter)
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, source: str, target: str = "a directory that does not exist yet") -> Parser:
        description = f"{text[0].upper()}{text[1:]}."
        made: Parser = verbs.add_parser(
            name, help=text, description=description, formatter_class=argparse.HelpFormatter
        )
        made.add_argument("source", metavar="SOURCE", help=source)
        made.add_argument("target", metavar="TARGET", help=target)
        return made

    def common(made: argparse.ArgumentParser, dtype: bool = True) -> None:
        if dtype:
            made.add_argument("--dtype", choices=list(FLOATS), help="type of the weights (default: as stored)")
        made.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")

    made = verb("from-hf", "Hugging Face model to mlx-lm directory", "a directory or a hub repository")
    common(made)
    made.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    made.add_argument("--q-bits", type=integer(1, 32), default=4, help="bits a weight (default: 4)")
    made.add_argument("--q-group-size", type=integer(1), default=64, help="weights that share a scale (default: 64)")
    common(verb("to-hf", "mlx-lm directory to one that transformers loads", "an mlx-lm directory"))
    common(verb("from-gguf", "llama GGUF file, with its tokenizer, to mlx-lm directory", "a .gguf file"))
    made = verb("to-peft", "mlx-lm adapter to PEFT adapter", "an mlx-lm adapter directory")
    common(made, dtype=False)
    made.add_argument("--base-model", help="the model that PEFT records: a directory or repository")
    common(verb("from-peft", "PEFT adapter to mlx-lm adapter", "a PEFT adapter directory"), dtype=False)
    made = verb("scale", "scaled copy of a model: a new config, the same weights", "a model directory")
    common(made, dtype=False)
    made.add_argument("--method", choices=METHODS, default="linear", help="how to scale (default: linear)")
    made.add_argument("--factor", type=float, required=True, help="how many times as long the window becomes")
    made = verb(
        "verify",
        "compare two models on the same tokens",
        "a model directory or .gguf file",
        "another one",
    )
    made.add_argument("--tokens", type=integer(1), default=256, help="how many tokens to compare on (default: 256)")
    made.add_argument("--reference", action="store_true", help="run the second in transformers on torch")
    return root


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse, convert, say what was done; UserError for a user's mistake."""
    options = parser().parse_args(arguments)
    source, target = options.source, Path(options.target)
    if options.verb == "verify":
        from .verify import verify

        print(
            "\n".join(verify(source, target, tokens=options.tokens, reference=options.reference).lines()),
        )
        return 0
    if not options.overwrite:
        refuse_existing(target)
    if target.resolve() == Path(source).resolve():
        raise UserError(f"{target} is the source itself: name another target")
    if options.verb == "from-hf":
        from .hf import from_hf

        from_hf(
            source,
            target,
            dtype=options.dtype,
            quantize=options.quantize,
            q_bits=options.q_bits,
            q_group_size=options.q_group_size,
            overwrite=options.overwrite,
            progress=print,
        )
    elif options.verb == "to-hf":
        from .hf import to_hf

        to_hf(source, target, dtype=options.dtype, overwrite=options.overwrite, progress=print)
    elif options.verb == "from-gguf":
        from .gguf import from_gguf

        from_gguf(source, target, dtype=options.dtype, overwrite=options.overwrite, progress=print)
    elif options.verb == "to-peft":
        from .peft import to_peft

        to_peft(source, target, base_model=options.base_model, overwrite=options.overwrite, progress=print)
    elif options.verb == "from-peft":
        from .peft import from_peft

        from_peft(source, target, overwrite=options.overwrite, progress=print)
    else:
        from .hf import scale

        scale(source, target, method=options.method, factor=options.factor, overwrite=options.overwrite)
    print(f"{target} is ready")
    return 0


def main() -> None:
    """The console script: exit with the status of the command."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
