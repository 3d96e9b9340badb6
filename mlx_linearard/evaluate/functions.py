"""Every suite as a function of a model and data; each returns what results.json keeps of it.

`model` is a directory, a hub repository, or a `Subject` that is loaded already. Text is in any form that
`--data` takes (one source or several), items are dicts or a source of them. All raise UserError for what a user
can get wrong: missing data, an item without gold, a length that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .choice import Choice, LastWord, check_choice, check_passage
from .options import Options, items_of, make_suites
from .passkey import DEPTHS
from .ruler import QA_TASKS, SEED
from .session import Progress, run_suite
from .subject import Directory, Subject, load_subject, open_directory
from .suite import Suite

Model = str | Path | Directory | Subject
Sources = str | Path | Sequence[str | Path]
Items = str | Path | Iterable[Mapping[str, Any]]


def perplexity(
    model: Model, data: Sources, *, lengths: Sequence[int] = (), tokens: int = 32768, stride: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Suite `ppl`: perplexity by length, in `by_length`, and by position, in `by_position`."""
    options = Options(("ppl",), _named(data), tuple(lengths), tokens=tokens, stride=stride)
    return _run(model, options, progress)


def fidelity_to(
    reference: Model, model: Model, data: Sources, *, lengths: Sequence[int] = (), tokens: int = 32768,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Suite `fidelity`: KL to `reference` in nats a token, top-1 and top-5 agreement."""
    options = Options(("fidelity",), _named(data), tuple(lengths), tokens=tokens)
    return _run(model, options, progress, _loaded(reference))


def multiple_choice(
    model: Model, items: Items, *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Suite `choice`: acc and acc_norm of items {query, choices, gold}, or of a named set as hf:hellaswag."""
    return _measured(model, Choice(items_of(items, limit, check_choice)), progress)


def last_word(
    model: Model, passages: Items, *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Suite `lambada`: accuracy and perplexity of the last word of passages {text}."""
    return _measured(model, LastWord(items_of(passages, limit, check_passage)), progress)


def passkeys(
    model: Model, data: Sources, *, lengths: Sequence[int] = (), depths: Sequence[int] = DEPTHS, samples: int = 3,
    seed: int = SEED, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Suite `passkey`: accuracy over depth and length, in `grid`."""
    options = Options(
        ("passkey",), _named(data), tuple(lengths), depths=tuple(depths), samples=samples, seed=seed
    )  # fmt: skip
    return _run(model, options, progress)


def ruler_tasks(
    model: Model, data: Sources, *, lengths: Sequence[int] = (), tasks: Sequence[str] = (), samples: int = 3,
    seed: int = SEED, progress: Progress | None = None, **qa: tuple[str | Path, str | Path],
) -> dict[str, Any]:  # fmt: skip
    """Suite `ruler`; `qa_1` and `qa_2` are each (questions, documents). Scores in per cent."""
    if wrong := [name for name in qa if name not in QA_TASKS]:
        raise TypeError(f"ruler_tasks() got an unexpected keyword argument {wrong[0]!r}")
    own = tuple((name, f"{questions},{documents}") for name, (questions, documents) in qa.items())
    options = Options(
        ("ruler",), (*_named(data), *own), tuple(lengths), tasks=tuple(tasks), samples=samples, seed=seed
    )  # fmt: skip
    return _run(model, options, progress)


# ---------------------------------------------------------------------------------------------------


def _named(data: Sources) -> tuple[tuple[str, str], ...]:
    sources = [data] if isinstance(data, str | Path) else data
    return tuple(("", str(source)) for source in sources)


def _loaded(model: Model) -> Subject:
    if isinstance(model, Subject):
        return model
    return load_subject(model if isinstance(model, Directory) else open_directory(model))


def _run(model: Model, options: Options, progress: Progress | None, reference: Subject | None = None) -> dict[str, Any]:
    subject = _loaded(model)
    (suite,) = make_suites(options, subject.directory, reference)
    return _measured(subject, suite, progress)


def _measured(model: Model, suite: Suite, progress: Progress | None) -> dict[str, Any]:
    return run_suite(_loaded(model), suite, progress=progress)[0]
