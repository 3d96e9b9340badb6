"""The suites as functions of a model and data, and the functions that make a suite from data.

Each function returns the suite's entry of results.json. `model` is a directory, a hub repository, or a loaded
`Subject`. `data` is text in any form that `--data` takes, one source or several; items are objects or a source of
objects. All functions raise UserError for a user's mistake: missing data, an item without `gold`, a length that does
not fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import objectives_of
from ..data import EVALUATED, Document, read_pieces
from ..errors import UserError
from ..files import RunDir, read_yaml
from ..machine import on_gpu
from .model import Directory, Subject, load_subject, open_directory
from .runner import Progress, run_suite
from .suites.choice import Choice, check_choice
from .suites.far import LAST, FarContext
from .suites.fidelity import FidelityToReference
from .suites.haystack import Prose, prose
from .suites.items import Items, checked_items
from .suites.lambada import LastWord, check_passage
from .suites.passkey import DEPTHS, Passkey
from .suites.ppl import Perplexity
from .suites.ruler import QA_TASKS, SEED, TASKS, QuestionSet, Ruler
from .suites.suite import Suite

SHORT, LONG = 2048, 4096  # default lengths of ppl and fidelity, and of passkey and ruler
TOKENS = 32768  # default tokens of text per length
FAR_TEXTS = 32  # texts of the window's length: how much text the suite far reads
# Prompts per task, length and depth. With 32, an average of five tasks has a standard error below 4 points, because
# 50 / sqrt(5 * 32) = 3.95. On a CPU that would take hours.
SAMPLES, GPU_SAMPLES = 3, 32

Model = str | Path | Directory | Subject
Sources = str | Path | Sequence[str | Path]
Questions = tuple[str | Path, str | Path]  # files of questions and of documents


# ---------------------------------------------------------------------------------------------------
# Measurements


def perplexity(
    model: Model,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    tokens: int = TOKENS,
    stride: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Suite `ppl`: perplexity by length, in `by_length`, and by position, in `by_position`."""
    subject = _loaded(model)
    suite = perplexity_suite(subject.directory, data, lengths=lengths, tokens=tokens, stride=stride)
    return _entry(subject, suite, progress)


def fidelity_to(
    reference: Model,
    model: Model,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Suite `fidelity`: KL to `reference` in nats per token, top-1 agreement and top-5 agreement."""
    subject = _loaded(model)
    suite = fidelity_suite(_loaded(reference), subject.directory, data, lengths=lengths, tokens=tokens)
    return _entry(subject, suite, progress)


def multiple_choice(
    model: Model, items: Items, *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Suite `choice`: acc and acc_norm of items {query, choices, gold}, or of a named set such as hf:hellaswag."""
    return _entry(_loaded(model), choice_suite(items, limit=limit), progress)


def last_word(
    model: Model, passages: Items, *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Suite `lambada`: accuracy and perplexity of the last word of passages {text}."""
    return _entry(_loaded(model), last_word_suite([passages], limit=limit), progress)


def passkeys(
    model: Model,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    depths: Sequence[int] = DEPTHS,
    samples: int | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Suite `passkey`: accuracy by depth and length, in `grid`."""
    subject = _loaded(model)
    suite = passkey_suite(subject.directory, data, lengths=lengths, depths=depths, samples=samples, seed=seed)
    return _entry(subject, suite, progress)


def ruler_tasks(
    model: Model,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    tasks: Sequence[str] = (),
    samples: int | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
    **qa: Questions,
) -> dict[str, Any]:
    """Suite `ruler`. `qa_1` and `qa_2` are each (questions, documents). Scores are in per cent."""
    if wrong := [name for name in qa if name not in QA_TASKS]:
        raise TypeError(f"ruler_tasks() got an unexpected keyword argument {wrong[0]!r}")
    subject = _loaded(model)
    suite = ruler_suite(subject.directory, data, lengths=lengths, tasks=tasks, samples=samples, seed=seed, qa=qa)
    return _entry(subject, suite, progress)


def far_context(
    model: Model,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    near: int | None = None,
    last: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Suite `far`: the gain, in nats per token, of the last tokens of a text from text farther back than `near`."""
    subject = _loaded(model)
    suite = far_suite(subject.directory, data, lengths=lengths, near=near, last=last, samples=samples)
    return _entry(subject, suite, progress)


def _loaded(model: Model) -> Subject:
    if isinstance(model, Subject):
        return model
    return load_subject(model if isinstance(model, Directory) else open_directory(model))


def _entry(subject: Subject, suite: Suite, progress: Progress | None) -> dict[str, Any]:
    return run_suite(subject, suite, progress=progress)[0]


# ---------------------------------------------------------------------------------------------------
# Suites from data


def perplexity_suite(
    directory: Directory, data: Sources, *, lengths: Sequence[int] = (), tokens: int = TOKENS, stride: int = 0
) -> Perplexity:
    """Suite `ppl` on the tokens of `directory`'s tokenizer."""
    lengths = _lengths(lengths, directory, SHORT)
    return Perplexity(_stream(data, directory, directory.window, lengths, tokens), lengths, tokens, stride)


def fidelity_suite(
    reference: Subject, directory: Directory, data: Sources, *, lengths: Sequence[int] = (), tokens: int = TOKENS
) -> FidelityToReference:
    """Suite `fidelity` at `lengths`, without the lengths that exceed the window of `reference`."""
    window = reference.directory.window
    asked = _lengths(lengths, reference.directory, SHORT)
    fitting = tuple(length for length in asked if length <= window) or asked[:1]
    return FidelityToReference(_stream(data, directory, window, fitting, tokens), fitting, reference, tokens)


def choice_suite(items: Items, *, limit: int | None = None, name: str = "choice") -> Choice:
    """Suite `choice` on one set of items, at most `limit` of them."""
    return Choice(checked_items(items, check_choice, limit), name)


def last_word_suite(sources: Sequence[Items], *, limit: int | None = None) -> LastWord:
    """Suite `lambada` on one or several sets of passages, at most `limit` of each."""
    return LastWord([item for source in sources for item in checked_items(source, check_passage, limit)])


def passkey_suite(
    directory: Directory,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    depths: Sequence[int] = DEPTHS,
    samples: int | None = None,
    seed: int = SEED,
) -> Passkey:
    """Suite `passkey` with keys hidden in the text of `data`."""
    return Passkey(_prose(data), _lengths(lengths, directory, LONG), tuple(depths), samples or default_samples(), seed)


def ruler_suite(
    directory: Directory,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    tasks: Sequence[str] = (),
    samples: int | None = None,
    seed: int = SEED,
    qa: Mapping[str, Questions] | None = None,
) -> Ruler:
    """Suite `ruler`; by default all tasks that have data. `qa`: task -> (questions, documents)."""
    sets = {name: QuestionSet.read(*files) for name, files in (qa or {}).items()}
    chosen = tuple(tasks) or tuple(task for task in TASKS if task not in QA_TASKS or task in sets)
    return Ruler(_prose(data), _lengths(lengths, directory, LONG), chosen, sets, samples or default_samples(), seed)


def far_suite(
    directory: Directory,
    data: Sources,
    *,
    lengths: Sequence[int] = (),
    near: int | None = None,
    last: int | None = None,
    samples: int | None = None,
) -> FarContext:
    """Suite `far` on documents of `data` that are long enough.

    near: by default the window before the directory's own scaling. last: by default 1000, or a quarter of `near` if
    that is less. lengths: by default four times `near`, at most the window.
    """
    near = near or directory.unscaled_window
    last = last or max(1, min(LAST, near // 4))
    lengths = tuple(lengths) or (min(4 * near, directory.window),)
    limit = FAR_TEXTS * max(directory.window, *lengths)
    documents = directory.documents(_documents(data), max(directory.window, *lengths) + 1, limit)
    return FarContext(documents, lengths, near, samples or default_samples(), last)


def default_samples() -> int:
    """The number of prompts per task, length and depth, sized to the machine."""
    return GPU_SAMPLES if on_gpu() else SAMPLES


def _lengths(lengths: Sequence[int], directory: Directory, default: int) -> tuple[int, ...]:
    return tuple(lengths) or (min(default, directory.window),)


def _documents(data: Sources) -> Iterator[Document]:
    sources = [data] if isinstance(data, str | Path) else data
    return itertools.chain.from_iterable(read_pieces(str(source), EVALUATED) for source in sources)


def _stream(data: Sources, directory: Directory, window: int, lengths: Sequence[int], tokens: int) -> np.ndarray:
    """The first tokens of a text: the same for all lengths inside the window, so that evaluations add up."""
    return directory.stream(_documents(data), 4 * max(tokens, window, *lengths) + 1)


def _prose(data: Sources) -> Prose:
    return prose(_documents(data))


# ---------------------------------------------------------------------------------------------------
# Runs


def run_directories(root: str | Path) -> list[Directory]:
    """restored, scaled and native of a finished run; of a comparison, each objective's model instead of restored."""
    run = RunDir(root)
    native, objectives = _origin(run.config) if run.config.exists() else ("", ())
    runs = {name: RunDir(run.root / name) for name in objectives} or {"restored": run}
    for own in runs.values():
        if not own.model.is_dir() or not own.base.is_dir():
            raise UserError(f"--run {own.root} holds no finished run: give the --output of a finished distillation")
    if not isinstance(native, str) or not native:
        raise UserError(f"{run.config} does not name the native model: give directories with --model")
    places: list[tuple[str, str | Path]] = [(label, own.model) for label, own in runs.items()]
    places += [("scaled", next(iter(runs.values())).base), ("native", native)]
    return [open_directory(place, label) for label, place in places]


def _origin(path: Path) -> tuple[Any, tuple[str, ...]]:
    """(the native model, the objectives of a comparison) from a run's config.yaml."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        return "", ()
    return config.get("model"), objectives_of(config.get("compare"))
