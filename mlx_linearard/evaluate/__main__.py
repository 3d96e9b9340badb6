"""Command: measure models on text and tasks, side by side. `python -m mlx_linearard.evaluate --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cli import LARGEST, Parser, add_old_name, integer, run_command
from ..config import DTYPES
from ..errors import UserError
from ..files import RunDir
from ..progress import Progress
from ..report.card import update_card
from ..report.load import read_run
from ..report.render import write_report
from ..results.kept import Kept
from ..results.rows import COMPARISONS
from ..results.statistics import NOISE
from ..results.verdict import headline
from . import api
from .model import CHUNK, CUDA_CHUNK, GPU_CHUNK, Directory, Subject, open_directory
from .runner import Evaluation, evaluate
from .suites.far import LAST
from .suites.items import name_of
from .suites.passkey import DEPTHS
from .suites.ruler import QA_TASKS, SEED, TASKS
from .suites.suite import Suite

EPILOG = """\
suites:
  ppl       perplexity by length and position                    needs text
  fidelity  KL to a reference, top-1 and top-5 agreement         needs text and --reference or --against
  choice    multiple choice, acc and acc_norm                    needs JSONL: query, choices, gold
  lambada   last-word accuracy and perplexity                    needs JSONL: text
  passkey   a number hidden in a long text, by depth and length  needs text
  ruler     13 tasks of RULER (arXiv 2404.06654)                 needs text; qa_1 and qa_2 need their own data
  far       gain of the last tokens from text far back, in nats  needs long text

data:
  Text is a .txt, .md, .jsonl, .json or .parquet (.gz and .xz too), a folder of .txt and .md, a folder with test.jsonl
  or valid.jsonl, or hf:NAME[:CONFIG][@SPLIT]. Rows have `text`, `messages`, or `prompt` and `completion`; the model's
  chat template makes tokens of conversations.
  --data FILE is for every suite without data of its own; --data choice=FILE.jsonl is for one suite. Both may be
  given several times. choice and lambada also take named sets, such as hf:hellaswag (extra `datasets`).
  If a model's tokenizer puts a first token (<s>, <bos>) before a text, each window and prompt begins with it.
  --data qa_1=QUESTIONS.jsonl,DOCUMENTS.jsonl: questions {query, outputs, doc or docs}, documents {doc, text}.

examples:
  mlx_linearard.evaluate --run RUN --suite ppl,fidelity --data book.txt
  mlx_linearard.evaluate --model RUN/model --against native=NATIVE --suite choice --data choice=piqa.jsonl

samples:
  With 32, an average of five tasks of ruler has a standard error of at most 4.0 points, with 3 of at most 12.9: what
  a GPU measures by default decides more than what a CPU does. --samples 32 gives the same on a CPU, in more time.

A stopped evaluation resumes when run again with the same options. Further lengths, depths, samples and tasks add to
the earlier ones. Models that are measured one at a time, on the same text and into the same results file, are
compared too. Items of a model that another results file in the same folder already has are not measured again, if
text, options and dtype are the same. What was measured with the same versions on this machine is also found in
~/.cache/mlx_linearard (MLX_LINEARARD_CACHE names another folder, --no-cache turns it off).
lm-evaluation-harness runs on any of these directories as well:
mlx_lm.evaluate --model DIR --tasks hellaswag piqa
"""


COMMON = (  # the options that --help explains
    "model", "against", "run", "suite", "data", "output", "lengths", "tokens", "samples", "tasks", "limit", "dtype",
)  # fmt: skip


def parser() -> Parser:
    """The command line."""
    command = Parser(
        "mlx_linearard.evaluate",
        "Measure models on text and tasks, side by side.",
        common=[f"--{name}" for name in COMMON],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", metavar="[NAME=]DIR", help="the model to measure: a directory or a hub repository")
    add(
        "--against",
        metavar="[NAME=]DIR",
        nargs="+",
        action="extend",
        default=[],
        help="models to compare it with; all models are compared with those named native and scaled",
    )
    add(
        "--run",
        metavar="RUN",
        help="a finished run or comparison: measures its native, scaled and restored models into its results.json",
    )
    add("--reference", metavar="DIR", help="the reference of fidelity (native, else the first of --against)")
    add("--suite", metavar="A,B", required=True, help=f"the suites to run: {', '.join(SUITES)}")
    add("--data", metavar="[SUITE=]SOURCE", action="append", default=[], help="text or items; see below")
    add("--output", metavar="FILE", help="the results file to merge into (results.json, or that of --run)")
    add_old_name(command, "--out", "--output")
    add("--lengths", metavar="T,T", help="in tokens (2048, for passkey and ruler 4096, at most the window)")
    tokens = f"tokens of text per length, for ppl and fidelity ({api.TOKENS})"
    add("--tokens", metavar="N", type=integer(1), default=api.TOKENS, help=tokens)
    add("--stride", metavar="N", type=integer(0), default=0, help="ppl: slide the window by N tokens (0: side by side)")
    add("--depths", metavar="P,P", help=f"passkey: per cent of the text before the key ({','.join(map(str, DEPTHS))})")
    samples = f"prompts per task, length and depth, texts of far ({api.SAMPLES}; on a GPU {api.GPU_SAMPLES})"
    add("--samples", metavar="N", type=integer(1, 100_000), help=samples)
    add("--near", metavar="N", type=integer(2), help="far: tokens that are not far (the smallest window of the models)")
    last = f"far: tokens at the end of a text that are scored ({LAST}, at most a quarter of --near)"
    add("--last", metavar="N", type=integer(1), help=last)
    add("--tasks", metavar="A,B", help="of ruler: niah_single_1, vt, ... (all that have data)")
    add("--limit", metavar="N", type=integer(1), help="only the first N items of choice and lambada")
    add("--seed", metavar="N", type=integer(0), default=SEED, help=f"of generated prompts ({SEED})")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: float32 on a CPU, else the file's")
    chunk = f"tokens per forward pass ({CHUNK}; on an Apple GPU {GPU_CHUNK}, with CUDA {CUDA_CHUNK})"
    add("--chunk", metavar="N", type=integer(1), help=chunk)
    add(
        "--batch-size",
        metavar="N",
        type=_batch_size,
        help="sequences of choice, lambada, passkey and ruler that are measured together (auto: sized to memory)",
    )
    add("--no-cache", action="store_true", help="measure again what earlier evaluations in other folders measured")
    return command


# ---------------------------------------------------------------------------------------------------
# From options to an evaluation


@dataclass(frozen=True)
class Request:
    """The suites that the command line asks for, with checked options."""

    suites: tuple[str, ...]
    data: tuple[tuple[str, str], ...]  # (suite or task, source); suite "" is every suite without data of its own
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    tasks: tuple[str, ...]
    given: argparse.Namespace
    near: int | None = None  # tokens that are not far

    @classmethod
    def of(cls, given: argparse.Namespace) -> Request:
        """UserError for names or numbers that are not valid."""
        return cls(
            suites=_names("--suite", given.suite, tuple(SUITES)),
            data=tuple(map(_parse_data, given.data)),
            lengths=_numbers("--lengths", given.lengths, 2) if given.lengths else (),
            depths=_numbers("--depths", given.depths, 0, 100) if given.depths else DEPTHS,
            tasks=_names("--tasks", given.tasks, tuple(TASKS)) if given.tasks else (),
            given=given,
            near=given.near,
        )

    def sources(self, suite: str, need: str) -> list[str]:
        """The data of a suite; UserError, with what it needs, if there are none."""
        sources = [s for name, s in self.data if name == suite] or [s for name, s in self.data if not name]
        if not sources:
            raise UserError(f"suite {suite} needs {need}")
        return sources

    def text(self, suite: str) -> list[str]:
        return self.sources(suite, f"text: give --data FILE, or --data {suite}=FILE")

    def questions(self) -> dict[str, api.Questions]:
        """The question sets of ruler by task."""
        sets: dict[str, api.Questions] = {}
        for task, source in self.data:
            if task in QA_TASKS:
                questions, comma, documents = source.partition(",")
                if not comma:
                    raise UserError(
                        f"--data {task}={source}: give both files, as in {task}=QUESTIONS.jsonl,DOCUMENTS.jsonl"
                    )
                sets[task] = (questions, documents)
        return sets

    def make(self, directory: Directory, reference: Subject | None) -> list[Suite]:
        """The suites with their data; `directory` is the first model."""
        suites = [suite for name in self.suites for suite in SUITES[name](self, directory, reference)]
        names = [suite.name for suite in suites]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two sets of data are called {twice[0]}: rename one of the files")
        return suites


def _ppl(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    given = request.given
    return [
        api.perplexity_suite(
            directory, request.text("ppl"), lengths=request.lengths, tokens=given.tokens, stride=given.stride
        )
    ]


def _fidelity(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    if reference is None:
        raise UserError("suite fidelity needs a reference: give --reference DIR or --against DIR")
    text = request.text("fidelity")
    return [api.fidelity_suite(reference, directory, text, lengths=request.lengths, tokens=request.given.tokens)]


def _choice(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    sources = request.sources("choice", "items: give --data choice=FILE.jsonl or --data choice=hf:NAME")
    limit = request.given.limit
    return [api.choice_suite(source, limit=limit, name=f"choice/{name_of(source)}") for source in sources]


def _lambada(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    sources = request.sources("lambada", "passages: give --data lambada=FILE.jsonl or --data lambada=hf:lambada")
    return [api.last_word_suite(sources, limit=request.given.limit)]


def _passkey(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    given = request.given
    return [
        api.passkey_suite(
            directory,
            request.text("passkey"),
            lengths=request.lengths,
            depths=request.depths,
            samples=given.samples,
            seed=given.seed,
        )
    ]


def _ruler(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    given = request.given
    return [
        api.ruler_suite(
            directory,
            request.text("ruler"),
            lengths=request.lengths,
            tasks=request.tasks,
            samples=given.samples,
            seed=given.seed,
            qa=request.questions(),
        )
    ]


def _far(request: Request, directory: Directory, reference: Subject | None) -> list[Suite]:
    given = request.given
    return [
        api.far_suite(
            directory,
            request.text("far"),
            lengths=request.lengths,
            near=request.near,
            last=given.last,
            samples=given.samples,
        )
    ]


SUITES: dict[str, Callable[[Request, Directory, Subject | None], list[Suite]]] = {
    "ppl": _ppl,
    "fidelity": _fidelity,
    "choice": _choice,
    "lambada": _lambada,
    "passkey": _passkey,
    "ruler": _ruler,
    "far": _far,
}


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else integer(1)(text)


def _names(option: str, text: str, choices: Sequence[str]) -> tuple[str, ...]:
    """The names of `a,b,c`, each once; UserError for one that is not in `choices`."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    kind = option.removeprefix("--").removesuffix("s")
    for name in names:
        if name not in choices:
            raise UserError(f"{option} {name}: there is no such {kind}; choose from {', '.join(choices)}")
    if not names:
        raise UserError(f"{option} is empty: choose from {', '.join(choices)}")
    return names


def _parse_data(text: str) -> tuple[str, str]:
    """(suite or task, source) of `NAME=SOURCE`, or ("", SOURCE)."""
    name, equals, source = text.partition("=")
    return (name, source) if equals and name in (*SUITES, *QA_TASKS) else ("", text)


def _numbers(option: str, text: str, least: int, most: int = LARGEST) -> tuple[int, ...]:
    """The whole numbers of `1,2,3`, each once, ascending."""
    parse = integer(least, most)
    try:
        return tuple(sorted({parse(part.strip()) for part in text.split(",")}))
    except argparse.ArgumentTypeError:
        raise UserError(
            f"{option} {text[:80]}: must be whole numbers from {least} to {most}, such as {least},{least + 50}"
        ) from None


def named_directory(text: str) -> Directory:
    """The directory of `DIR` or `NAME=DIR`."""
    name, equals, place = text.partition("=")
    if equals and name and "/" not in name and not os.path.exists(text):  # noqa: PTH110 - a name may be too long for Path
        if not place:
            raise UserError(f"{text} names no directory: give NAME=DIR")
        return open_directory(place, name)
    return open_directory(text)


def evaluation_of(given: argparse.Namespace) -> Evaluation:
    """The evaluation that the options ask for; no weights are loaded yet."""
    request = Request.of(given)
    if (given.model is None) == (given.run is None):
        raise UserError("give one of --model DIR and --run RUN; see mlx_linearard.evaluate --help")
    directories = api.run_directories(given.run) if given.run else [named_directory(given.model)]
    directories += [named_directory(text) for text in given.against]
    if given.output == "":
        raise UserError("--output is empty: give the name of a file")
    out = Path(given.output) if given.output else RunDir(given.run).results if given.run else Path("results.json")
    reference = _reference(given, directories) if "fidelity" in request.suites else None
    if "far" in request.suites and request.near is None:
        request = replace(request, near=min(directory.unscaled_window for directory in directories))

    kept = None if given.no_cache else Kept.of_user()

    def suites(loaded: Subject | None) -> list[Suite]:
        return request.make(directories[0], loaded)

    return Evaluation(directories, suites, out, reference, given.dtype, given.chunk, given.batch_size, kept)


def _reference(given: argparse.Namespace, directories: list[Directory]) -> Directory | None:
    if given.reference:
        return named_directory(given.reference)
    native = next((directory for directory in directories if directory.label == "native"), None)
    return native or (directories[1] if len(directories) > 1 else None)


# ---------------------------------------------------------------------------------------------------
# What the command prints


def table(results: Mapping[str, Any], labels: Sequence[str], suites: Sequence[str]) -> Iterator[str]:
    """The metrics as aligned lines: a row per metric, a column per model."""
    rows = [["", *labels]]
    for suite in suites:
        by_label = {label: results.get(label, {}).get(suite, {}).get("metrics", {}) for label in labels}
        for name in dict.fromkeys(name for metrics in by_label.values() for name in metrics):
            rows.append([f"{suite} {name}", *(_cell(by_label[label].get(name)) for label in labels)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    spread = "" if value["stderr"] is None else f" ± {value['stderr']:.2g}"
    return f"{value['value']:.4g}{spread}"


def tests(results: Mapping[str, Any], suites: Sequence[str]) -> Iterator[str]:
    """The outcome of each paired test, as a sentence."""
    for suite in suites:
        for name, rows in results.get(COMPARISONS, {}).get(suite, {}).get("metrics", {}).items():
            for row in rows.values():
                yield from (f"{suite} {name}: {test['words']}" for test in row.get("tests", ()))


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body."""
    given = parser().parse_args(arguments)
    job = evaluation_of(given)
    again: list[str] = []
    try:
        with Progress(sys.stderr) as progress:
            results = evaluate(job, progress=progress.tokens, say=again.append)
    except KeyboardInterrupt:
        print(f"finished items are kept beside {job.out}; the same command resumes from them", file=sys.stderr)
        raise
    labels = [directory.label for directory in job.directories]
    suites = list(dict.fromkeys(name for label in labels for name, entry in results[label].items() if _measured(entry)))
    print("\n".join(table(results, labels, suites)))
    lines = list(tests(results, suites)) if len(labels) > 1 else []
    if lines:
        print("\n" + "\n".join(lines))
        if any(NOISE in line for line in lines):
            print(f'"{NOISE}": a difference of this size often comes from chance alone (p of 0.05 or more).')
    if again:
        print("\n" + "\n".join(again))
        print("They were not measured again; --no-cache and another --out measure them again.")
    print(f"\nWritten to {job.out}; the peak memory was {mx.get_peak_memory() / 1e9:.2f} GB")
    if given.run and job.out == RunDir(given.run).results:
        report, left = write_report(given.run), update_card(given.run)
        print(f"{' '.join(headline(read_run(given.run)))}\nThe report is {report}")
        if left:
            print(left)
    return 0


def _measured(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "metrics" in entry


def main() -> None:
    """Entry point of `mlx_linearard.evaluate`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
