"""Command: measure models on text and tasks, side by side. `python -m mlx_linearard.evaluate --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cli import Parser, run_command
from ..config import DTYPES
from ..errors import UserError
from ..files import RunDir
from ..progress import Progress
from ..report.content import headline, read_run, write_report
from ..results.statistics import NOISE
from ..results.store import COMPARISONS
from .options import (
    SUITES,
    Options,
    make_suites,
    named_directory,
    parse_data,
    parse_numbers,
    parse_suites,
    run_directories,
)
from .passkey import DEPTHS
from .ruler import SEED, TASKS
from .session import Evaluation, evaluate
from .subject import CHUNK, Directory

EPILOG = """\
suites:
  ppl       perplexity by length and position                   needs text
  fidelity  KL to a reference, top-1 and top-5 agreement         needs text and --reference or --against
  choice    multiple choice, acc and acc_norm                   needs JSONL: query, choices, gold
  lambada   last-word accuracy and perplexity                   needs JSONL: text
  passkey   a number hidden in a long text, depth x length      needs text
  ruler     13 tasks of RULER (arXiv 2404.06654)                needs text; qa_1 and qa_2 need their own data

data:
  text is a .txt, a folder of .txt, a .jsonl with `text` (each optionally .gz or .xz), or hf:NAME.
  --data FILE serves every suite that has none of its own; --data choice=FILE.jsonl serves one suite and may be
  given several times. choice and lambada also take named sets, as hf:hellaswag (extra `datasets`).
  --data qa_1=QUESTIONS.jsonl,DOCUMENTS.jsonl: questions {query, outputs, doc or docs}, documents {doc, text}.

examples:
  mlx_linearard.evaluate --run RUN --suite ppl,fidelity --data book.txt
  mlx_linearard.evaluate --model RUN/model --against native=NATIVE --suite choice --data choice=piqa.jsonl

A run that was stopped goes on where it was when it is started again in the same words. Further lengths, depths,
samples and tasks add to what is measured, and models measured one at a time are compared with those that
the same results file has of the same text. lm-evaluation-harness
runs on any of these directories as well: mlx_lm.evaluate --model DIR --tasks hellaswag piqa
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser("mlx_linearard.evaluate", "Measure models on text and tasks, side by side.", epilog=EPILOG)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("--model", metavar="[NAME=]DIR", help="the model in question: a directory or a hub repository")
    add(
        "--against",
        metavar="[NAME=]DIR",
        nargs="+",
        action="extend",
        default=[],
        help="models to compare it with; those named native and scaled are what the others are held against",
    )
    add(
        "--run",
        metavar="RUN",
        help="a finished run, or a comparison: its native, scaled and restored models, into its results.json",
    )
    add("--reference", metavar="DIR", help="what fidelity compares with; else native, or the first of --against")
    add("--suite", metavar="A,B", required=True, help=f"which measurements: {', '.join(SUITES)}")
    add("--data", metavar="[SUITE=]SOURCE", action="append", default=[], help="text or items; see below")
    add("--out", metavar="FILE", help="results, merged into what the file holds (results.json, or that of --run)")
    add("--lengths", metavar="T,T", help="in tokens (2048, for passkey and ruler 4096, at most the window)")
    add("--tokens", metavar="N", type=int, default=32768, help="tokens of text a length, for ppl and fidelity (32768)")
    add("--stride", metavar="N", type=int, default=0, help="ppl with a window that slides by N tokens (0: whole ones)")
    add("--depths", metavar="P,P", help=f"passkey: per cent of the text before the key ({_listed(DEPTHS)})")
    add("--samples", metavar="N", type=int, default=3, help="prompts a task, length and depth (3)")
    add("--tasks", metavar="A,B", help="of ruler: niah_single_1, vt, ... (all that have data)")
    add("--limit", metavar="N", type=int, help="only the first N items of choice and lambada")
    add("--seed", metavar="N", type=int, default=SEED, help=f"of the prompts that are generated ({SEED})")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: float32 on a CPU, else the file's")
    add("--chunk", metavar="N", type=int, default=CHUNK, help=f"tokens a forward pass takes ({CHUNK})")
    return made


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def options_of(given: argparse.Namespace) -> Options:
    """The suites' options; UserError for numbers that make no sense."""
    for name in ("tokens", "samples", "chunk", "limit"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be above 0")
    if given.stride < 0:
        raise UserError(f"--stride {given.stride}: must not be negative")
    tasks = tuple(part.strip() for part in given.tasks.split(",")) if given.tasks else ()
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: there is no such task; choose from {', '.join(TASKS)}")
    return Options(
        suites=parse_suites(given.suite),
        data=tuple(map(parse_data, given.data)),
        lengths=parse_numbers("--lengths", given.lengths, 2) if given.lengths else (),
        tokens=given.tokens,
        stride=given.stride,
        depths=parse_numbers("--depths", given.depths, 0) if given.depths else DEPTHS,
        samples=given.samples,
        tasks=tasks,
        limit=given.limit,
        seed=given.seed,
    )


def evaluation_of(given: argparse.Namespace) -> Evaluation:
    """What is to be run; nothing is loaded yet."""
    options = options_of(given)
    if (given.model is None) == (given.run is None):
        raise UserError("give one of --model DIR and --run RUN; see mlx_linearard.evaluate --help")
    directories = run_directories(given.run) if given.run else [named_directory(given.model)]
    directories += [named_directory(text) for text in given.against]
    out = Path(given.out) if given.out else RunDir(given.run).results if given.run else Path("results.json")
    reference = _reference(given, directories) if "fidelity" in options.suites else None
    return Evaluation(
        directories, partial(make_suites, options, directories[0]), out, reference, given.dtype, given.chunk
    )


def _reference(given: argparse.Namespace, directories: list[Directory]) -> Directory | None:
    if given.reference:
        return named_directory(given.reference)
    native = next((directory for directory in directories if directory.label == "native"), None)
    return native or (directories[1] if len(directories) > 1 else None)


def table(results: Mapping[str, Any], labels: Sequence[str], suites: Sequence[str]) -> Iterator[str]:
    """The measured metrics as aligned lines: a row a metric, a column a model."""
    rows = [["", *labels]]
    for suite in suites:
        found = {label: results.get(label, {}).get(suite, {}).get("metrics", {}) for label in labels}
        for name in dict.fromkeys(name for metrics in found.values() for name in metrics):
            rows.append([f"{suite} {name}", *(_cell(found[label].get(name)) for label in labels)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    spread = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
    return f"{value['value']:.4g}{spread}"


def tests(results: Mapping[str, Any], suites: Sequence[str]) -> Iterator[str]:
    """Each paired test in words; what is inside the noise is said to be."""
    for suite in suites:
        for name, rows in results.get(COMPARISONS, {}).get(suite, {}).get("metrics", {}).items():
            for row in rows.values():
                yield from (f"{suite} {name}: {test['words']}" for test in row.get("tests", ()))


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body."""
    given = parser().parse_args(arguments)
    job = evaluation_of(given)
    try:
        results = evaluate(job, progress=Progress(sys.stderr).tokens)
    except KeyboardInterrupt:
        print(f"what is measured is kept beside {job.out}; the same command goes on from there", file=sys.stderr)
        raise
    labels = [directory.label for directory in job.directories]
    suites = list(dict.fromkeys(name for label in labels for name, entry in results[label].items() if _measured(entry)))
    print("\n".join(table(results, labels, suites)))
    lines = list(tests(results, suites)) if len(labels) > 1 else []
    if lines:
        print("\n" + "\n".join(lines))
        if any(NOISE in line for line in lines):
            print(f'"{NOISE}": a difference this large often comes from chance alone (p of 0.05 or more).')
    print(f"\nWritten to {job.out}; at most {mx.get_peak_memory() / 1e9:.2f} GB were in use")
    if given.run and job.out == RunDir(given.run).results:
        report = write_report(given.run)
        print(f"{' '.join(headline(read_run(given.run)))}\nThe report is {report}")
    return 0


def _measured(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "metrics" in entry


def main() -> None:
    """Entry point of `mlx_linearard.evaluate`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
