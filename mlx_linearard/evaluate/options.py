"""From the options of a command line to directories and suites; every complaint is about an option."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import objectives_of
from ..data import HUB_PREFIX, read_documents, tokenize
from ..errors import UserError, one_line
from ..files import RunDir
from . import hub
from .choice import Choice, LastWord, check_choice, check_passage, read_items
from .fidelity import FidelityToReference
from .haystack import Prose, prose
from .passkey import DEPTHS, Passkey
from .ppl import Perplexity
from .ruler import QA_TASKS, TASKS, QuestionSet, Ruler
from .subject import Directory, Subject, open_directory
from .suite import Suite

SUITES = ("ppl", "fidelity", "choice", "lambada", "passkey", "ruler")
DATA_NAMES = (*SUITES, *QA_TASKS)
SHORT, LONG = 2048, 4096  # default lengths of text suites, and of those that hide something in it


@dataclass(frozen=True)
class Options:
    """What the suites are made of. `data` is (suite or task, or "" for all that have none of their own; source)."""

    suites: tuple[str, ...]
    data: tuple[tuple[str, str], ...] = ()
    lengths: tuple[int, ...] = ()
    tokens: int = 32768
    stride: int = 0
    depths: tuple[int, ...] = DEPTHS
    samples: int = 3
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 42

    def sources(self, name: str) -> list[str]:
        """The data of a suite; those given without a name where it has none of its own."""
        own = [source for key, source in self.data if key == name]
        return own or [source for key, source in self.data if not key]


def parse_suites(text: str) -> tuple[str, ...]:
    """The suites of `a,b,c`, each once; UserError for one that does not exist."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in SUITES:
            raise UserError(f"--suite {name}: there is no such suite; choose from {', '.join(SUITES)}")
    if not names:
        raise UserError(f"--suite is empty: choose from {', '.join(SUITES)}")
    return names


def parse_data(text: str) -> tuple[str, str]:
    """(suite or task, source) of `NAME=SOURCE`, or ("", SOURCE)."""
    name, equals, source = text.partition("=")
    return (name, source) if equals and name in DATA_NAMES else ("", text)


def parse_numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """The whole numbers of `1,2,3`, each once, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option} {text}: must be whole numbers of at least {least}, such as {least},{least + 2048}")
    return tuple(sorted({int(part) for part in parts}))


def named_directory(text: str, label: str | None = None) -> Directory:
    """The directory of `DIR` or `NAME=DIR`."""
    name, equals, place = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        if not place:
            raise UserError(f"{text} names no directory: give NAME=DIR")
        return open_directory(place, name)
    return open_directory(text, label)


def run_directories(root: str) -> list[Directory]:
    """native, scaled and restored of a finished run, restored first; of a comparison, each objective's model."""
    run = RunDir(root)
    native, objectives = _origin(run.config) if run.config.exists() else ("", ())
    runs = {name: RunDir(run.root / name) for name in objectives} or {"restored": run}
    for own in runs.values():
        if not own.model.is_dir() or not own.base.is_dir():
            raise UserError(
                f"--run {own.root} holds no finished run: give the --output of a distillation that has ended"
            )
    if not native:
        raise UserError(f"{run.config} does not name the model it started from: give directories with --model")
    places: list[tuple[str, Any]] = [(label, own.model) for label, own in runs.items()]
    places += [("scaled", next(iter(runs.values())).base), ("native", native)]
    return [open_directory(place, label) for label, place in places]


def _origin(path: Path) -> tuple[Any, tuple[str, ...]]:
    """(the model a run started from, the objectives of a comparison) from its config.yaml."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(config, dict):
        return "", ()
    return config.get("model"), objectives_of(config.get("compare"))


# ---------------------------------------------------------------------------------------------------
# Suites


def make_suites(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    """The suites that were asked for, with their data read; `directory` is the model in question."""
    made: list[Suite] = []
    for name in options.suites:
        made += _MAKERS[name](options, directory, reference)
    names = [suite.name for suite in made]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two sets of data are called {twice[0]}: rename one of the files")
    return made


def _text(options: Options, suite: str) -> Iterable[str]:
    sources = options.sources(suite)
    if not sources:
        raise UserError(f"suite {suite} needs text: give --data FILE, or --data {suite}=FILE")
    return itertools.chain.from_iterable(map(read_documents, sources))


def _stream(options: Options, suite: str, directory: Directory, most: int) -> np.ndarray:
    """The tokens of a suite's text, no more than it can use."""
    return tokenize(_text(options, suite), directory.tokenizer, limit=most)


def _lengths(options: Options, directory: Directory, default: int) -> tuple[int, ...]:
    return options.lengths or (min(default, directory.window),)


def _ppl(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    lengths = _lengths(options, directory, SHORT)
    tokens = _stream(options, "ppl", directory, _most_tokens(options, directory, lengths))
    return [Perplexity(tokens, lengths, options.tokens, options.stride)]


def _fidelity(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    if reference is None:
        raise UserError("suite fidelity needs a reference: give --reference DIR or --against DIR")
    asked = _lengths(options, reference.directory, SHORT)
    lengths = tuple(n for n in asked if n <= reference.directory.window) or asked[:1]
    tokens = _stream(options, "fidelity", directory, _most_tokens(options, reference.directory, lengths))
    return [FidelityToReference(tokens, lengths, reference, options.tokens)]


def _most_tokens(options: Options, directory: Directory, lengths: Sequence[int]) -> int:
    """Tokens of text that are read: the same for any lengths inside the window, so that evaluations add up."""
    return 4 * max(options.tokens, directory.window, *lengths) + 1


def _choice(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    sources = options.sources("choice")
    if not sources:
        raise UserError("suite choice needs items: give --data choice=FILE.jsonl or --data choice=hf:NAME")
    return [Choice(items_of(source, options.limit, check_choice), f"choice/{_stem(source)}") for source in sources]


def _lambada(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    sources = options.sources("lambada")
    if not sources:
        raise UserError("suite lambada needs passages: give --data lambada=FILE.jsonl or --data lambada=hf:lambada")
    return [LastWord([item for source in sources for item in items_of(source, options.limit, check_passage)])]


def items_of(
    source: str | Path | Iterable[Mapping[str, Any]], limit: int | None, check: Callable[[Any, str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """At most `limit` checked items of a JSONL file, of a named set (hf:NAME), or of objects that are there."""
    if not isinstance(source, str | Path):
        found = [(f"item {number}", dict(item)) for number, item in enumerate(source)]
    elif str(source).startswith(HUB_PREFIX):
        rows = hub.load_set(str(source).removeprefix(HUB_PREFIX), limit)
        found = [(f"{source} item {number}", row) for number, row in enumerate(rows)]
    else:
        found = list(read_items(source))
    if not found:
        raise UserError("there are no items: give at least one")
    return [check(item, where) for where, item in found[:limit]]


def _stem(source: str) -> str:
    """The name of a set of items: piqa of hf:piqa, piqa.jsonl and piqa.jsonl.gz."""
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    path = Path(source)
    return Path(path.stem).stem if path.suffix.lower() in (".gz", ".xz") else path.stem


def _prose(options: Options, suite: str) -> Prose:
    return prose(_text(options, suite))


def _passkey(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    lengths = _lengths(options, directory, LONG)
    return [Passkey(_prose(options, "passkey"), lengths, options.depths, options.samples, options.seed)]


def _ruler(options: Options, directory: Directory, reference: Subject | None) -> list[Suite]:
    own = {key: source for key, source in options.data if key in QA_TASKS}
    qa = {name: _questions(name, source) for name, source in own.items()}
    tasks = options.tasks or tuple(task for task in TASKS if task not in QA_TASKS or task in qa)
    lengths = _lengths(options, directory, LONG)
    return [Ruler(_prose(options, "ruler"), lengths, tasks, qa, options.samples, options.seed)]


def _questions(task: str, source: str) -> QuestionSet:
    questions, comma, documents = source.partition(",")
    if not comma:
        raise UserError(f"--data {task}={source}: give both files, as in {task}=QUESTIONS.jsonl,DOCUMENTS.jsonl")
    return QuestionSet.read(questions, documents)


_Maker = Callable[[Options, Directory, Subject | None], Sequence[Suite]]
_MAKERS: dict[str, _Maker] = {
    "ppl": _ppl, "fidelity": _fidelity, "choice": _choice, "lambada": _lambada, "passkey": _passkey, "ruler": _ruler,
}  # fmt: skip
