"""The command `python -m mlx_linearard.convert VERB SOURCE TARGET`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import Parser, integer, run_command
from ..errors import UserError
from ..files import check_overwrite, refuse_existing
from ..models.dtypes import FLOATS
from ..rope import METHODS, methods_help

NOT_LIVE = 1  # the exit status of `verify --served` if the server does not apply the scaling
DESCRIPTION = "Convert models and adapters between Hugging Face, PEFT, GGUF and mlx-lm, and compare them."


# Each verb's function takes the parsed options. It imports its converter itself, so that --help stays fast.


def _from_hf(options: argparse.Namespace) -> None:
    from .hf import from_hf

    from_hf(
        options.source,
        options.target,
        dtype=options.dtype,
        quantize=options.quantize,
        q_bits=options.q_bits,
        q_group_size=options.q_group_size,
        overwrite=options.overwrite,
        progress=print,
    )


def _to_hf(options: argparse.Namespace) -> None:
    from .hf import to_hf

    to_hf(options.source, options.target, dtype=options.dtype, overwrite=options.overwrite, progress=print)


def _from_gguf(options: argparse.Namespace) -> None:
    from .gguf import from_gguf

    from_gguf(options.source, options.target, dtype=options.dtype, overwrite=options.overwrite, progress=print)


def _to_gguf(options: argparse.Namespace) -> None:
    from .gguf_write import to_gguf

    to_gguf(options.source, options.target, dtype=options.dtype, progress=print)


def _to_peft(options: argparse.Namespace) -> None:
    from .peft import to_peft

    to_peft(options.source, options.target, base_model=options.base_model, overwrite=options.overwrite, progress=print)


def _from_peft(options: argparse.Namespace) -> None:
    from .peft import from_peft

    from_peft(options.source, options.target, overwrite=options.overwrite, progress=print)


def _scale(options: argparse.Namespace) -> None:
    from .hf import scale

    scale(
        options.source,
        options.target,
        method=options.method,
        factor=options.factor,
        beta_fast=options.yarn_beta_fast,
        beta_slow=options.yarn_beta_slow,
        overwrite=options.overwrite,
    )


def _verify(options: argparse.Namespace) -> int:
    if options.served is not None:
        return _verify_served(options)
    from .verify import verify

    if options.target is None:
        raise UserError("verify compares two models: name a second one, or a server with --served URL")
    result = verify(options.source, options.target, tokens=options.tokens or 256, reference=options.reference)
    print("\n".join(result.lines()))
    return 0


def _verify_served(options: argparse.Namespace) -> int:
    from .served import verify_served

    if options.target is not None or options.reference:
        raise UserError("--served URL compares a server with one directory: leave out the second model and --reference")
    result = verify_served(
        options.served,
        options.source,
        tokens=options.tokens,
        native=options.native,
        model=options.served_model,
        timeout=options.timeout,
        progress=print,
    )
    print("\n".join(result.lines()))
    return 0 if result.live else NOT_LIVE


@dataclass(frozen=True)
class Verb:
    """One verb of the command: its function, its help texts, and its flags.

    flags are (names with a space between, keyword arguments of `add_argument`). `writes` is false if the verb does
    not write TARGET, and `replaces` if it never replaces one.
    """

    run: Callable[[argparse.Namespace], int | None]
    help: str
    source: str
    target: str = "a directory that does not exist yet"
    flags: Sequence[tuple[str, dict[str, Any]]] = ()
    writes: bool = True
    replaces: bool = True


_DTYPE = ("--dtype", {"choices": list(FLOATS), "help": "type of the weights (default: as stored)"})
_OVERWRITE = ("--overwrite", {"action": "store_true", "help": "replace TARGET if this tool wrote it"})

VERBS = {
    "from-hf": Verb(
        _from_hf,
        "Hugging Face model to mlx-lm directory",
        "a directory or a hub repository",
        flags=(
            _DTYPE,
            ("-q --quantize", {"action": "store_true", "help": "quantize the weights"}),
            ("--q-bits", {"type": integer(1, 32), "default": 4, "help": "bits per weight (default: 4)"}),
            ("--q-group-size", {"type": integer(1), "default": 64, "help": "weights that share a scale (default: 64)"}),
        ),
    ),
    "to-hf": Verb(_to_hf, "mlx-lm directory to one that transformers loads", "an mlx-lm directory", flags=(_DTYPE,)),
    "from-gguf": Verb(
        _from_gguf, "llama GGUF file, with its tokenizer, to mlx-lm directory", "a .gguf file", flags=(_DTYPE,)
    ),
    "to-gguf": Verb(
        _to_gguf,
        "mlx-lm or Hugging Face directory to GGUF file, with its RoPE scaling",
        "a model directory",
        "a .gguf file that does not exist yet",
        flags=(("--dtype", {"choices": [*FLOATS, "q8_0"], "help": "type of the matrices (default: as stored)"}),),
        replaces=False,
    ),
    "to-peft": Verb(
        _to_peft,
        "mlx-lm adapter to PEFT adapter",
        "an mlx-lm adapter directory",
        flags=(("--base-model", {"help": "the model that PEFT records: a directory or repository"}),),
    ),
    "from-peft": Verb(_from_peft, "PEFT adapter to mlx-lm adapter", "a PEFT adapter directory"),
    "scale": Verb(
        _scale,
        "scaled copy of a model: a new config, the same weights",
        "a model directory",
        flags=(
            (
                "--method",
                {"choices": METHODS, "default": "linear", "help": f"how to scale; {methods_help()}"},
            ),
            ("--factor", {"type": float, "required": True, "help": "how many times longer the window becomes"}),
            ("--yarn-beta-fast", {"type": float, "help": "yarn: the fast end of its ramp (default: 32)"}),
            ("--yarn-beta-slow", {"type": float, "help": "yarn: the slow end of its ramp (default: 1)"}),
        ),
    ),
    "verify": Verb(
        _verify,
        "compare two models on the same tokens; with --served, tell whether a server applies the RoPE scaling",
        "a model directory or .gguf file; with --served the directory of the model that is served, or its run",
        "another one; none with --served",
        flags=(
            (
                "--tokens",
                {
                    "type": integer(1, 1 << 24),
                    "help": "number of tokens to compare on (default: 256; with --served twice the old window)",
                },
            ),
            ("--reference", {"action": "store_true", "help": "run the second in transformers on torch"}),
            (
                "--served",
                {
                    "metavar": "URL",
                    "help": "compare this OpenAI-compatible server with SOURCE beyond the old window; exit status 0: "
                    "the scaling is live, 1: it is not; a key is read from OPENAI_API_KEY",
                },
            ),
            ("--served-model", {"metavar": "NAME", "help": "the model to ask the server for (default: its own)"}),
            ("--native", {"metavar": "DIR", "help": "the base model, if the scaling is in rope_theta (ntk)"}),
            ("--timeout", {"type": float, "default": 600.0, "help": "seconds for an answer (default: 600)"}),
        ),
        writes=False,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of every verb and flag."""
    root = Parser("mlx_linearard.convert", DESCRIPTION, formatter_class=argparse.HelpFormatter)
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        description = f"{verb.help[0].upper()}{verb.help[1:]}."
        one = verbs.add_parser(name, help=verb.help, description=description, formatter_class=argparse.HelpFormatter)
        one.add_argument("source", metavar="SOURCE", help=verb.source)
        one.add_argument("target", metavar="TARGET", help=verb.target, nargs=None if verb.writes else "?")
        for flags, settings in (*verb.flags, *([_OVERWRITE] if verb.writes and verb.replaces else [])):
            one.add_argument(*flags.split(), **settings)
    return root


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the verb; UserError for a user's mistake."""
    options = parser().parse_args(arguments)
    verb = VERBS[options.verb]
    if not verb.writes:
        return verb.run(options) or 0
    target = Path(options.target)
    if verb.replaces and options.overwrite:
        check_overwrite(target, [options.source])
    else:
        refuse_existing(target)
    verb.run(options)
    print(f"{target} is ready")
    return 0


def main() -> None:
    """The console script: exit with the status of the command."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
