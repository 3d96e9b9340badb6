"""Runs suites over directories: each is loaded once, each item is measured once, and finished items are kept."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError, is_out_of_memory, one_line
from ..machine import describe, machine_of_speed
from ..results.fields import Field
from ..results.kept import Kept
from ..results.rows import NOT_MODELS, Comparison, Results, Row, SuiteResult
from ..results.statistics import compare
from ..results.store import ItemLog, Record, read_results, update_results, valid_records
from .model import Directory, Subject, digest, load_subject, same_tokenizer
from .suites.suite import Done, Item, Suite, all_options, identity, left, metric_names, samples, summary

KEPT_SHARE = 1 / 16  # the part of memory that mlx may keep for arrays to come

Progress = Callable[[str, int, int], None]  # (label, tokens done, tokens in all), tokens weighed by their work
Say = Callable[[str], None]


def run_suite(
    subject: Subject,
    suite: Suite,
    *,
    log: ItemLog | None = None,
    progress: Progress | None = None,
    window: int | None = None,
    items: Sequence[Item] | None = None,
) -> tuple[dict[str, Any], list[Record]]:
    """One suite on one loaded model: (its entry in results.json, the records of its items).

    Items in `log` are not measured again. `window` is the longest allowed context, by default the model's own.
    `items`: those of the suite, if they are known already.
    Raises UserError if data or lengths do not fit.
    """
    with _bounded_memory(subject):
        if items is None:
            items = suite.items(subject.directory, window or subject.directory.window)
        return _run_suite(subject, suite, items, log, progress)


@contextlib.contextmanager
def _bounded_memory(subject: Subject) -> Iterator[None]:
    """Keep freed memory from piling up while the block runs; UserError if the device's memory is full."""
    before = mx.set_cache_limit(int(KEPT_SHARE * machine_of_speed(0).usable))
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{subject.directory.path} does not fit the memory of the device with what it reads: close other programs, "
            "or give a smaller --chunk, --batch-size or --lengths"
        ) from None
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()


def _run_suite(
    subject: Subject, suite: Suite, items: Sequence[Item], log: ItemLog | None, progress: Progress | None
) -> tuple[dict[str, Any], list[Record]]:
    done = log.read() if log else {}
    state = _Done(f"{suite.name}, {subject.label}", items, done, progress, subject.directory.balance)
    measured = frozenset(done)
    for item, record in zip(left(items, measured), suite.measure(subject, items, measured, state.tick), strict=True):
        done[item.id] = _checked(record, suite, subject)
        if log:
            log.append(record)
        state.finish(item)
    records = [done[item.id] for item in items]
    return _summary(suite, records, log), records


def _measured_before(items: Sequence[Item], log: ItemLog, kept: Mapping[str, Record]) -> int:
    """Add to a log the records of `items` that other logs of the same key, or `kept`, have; returns how many."""
    found = {**kept, **log.elsewhere()}
    again = [item.id for item in left(items, log.read()) if item.id in found]
    for name in again:
        log.append(found[name])
    return len(again)


def _summary(suite: Suite, records: Sequence[Record], log: ItemLog | None) -> dict[str, Any]:
    """The entry of the suite; UserError if a record of the log is not one of the suite's."""
    try:
        return summary(suite, records)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if log is None:
            raise
        raise UserError(f"{log.path} holds a record that is not valid ({one_line(repr(error))}): delete it") from None


def _checked(record: Record, suite: Suite, subject: Subject) -> Record:
    """`record`, if all its samples are finite numbers; else UserError."""
    for name, value in record["samples"].items():
        if not math.isfinite(value):
            raise UserError(
                f"{subject.directory.path}: {name} of item {record['id']} of suite {suite.name} is {value}: "
                "the model's weights are damaged, or need a wider type, such as --dtype float32"
            )
    return record


class _Done:
    """Reports progress, within items too, of the items that are not measured yet.

    Progress is in tokens, and each counts for its work: more if more tokens of its item are before it.
    """

    def __init__(self, label: str, items: Sequence[Item], done: Done, progress: Progress | None, balance: float):
        self.label, self.progress, self.balance = label, progress, balance
        self.left = [item.cost for item in left(items, done)]
        self.total, self.work = sum(self.left), sum(map(self._work, self.left))
        self.item, self.before = 0, 0.0  # the item that is being read, and the work of those before it
        self.finished, self.within, self.reported = 0, 0, 0

    def tick(self, tokens: int) -> None:
        self.within += tokens
        while self.item < len(self.left) - 1 and self.within >= self.left[self.item]:  # the next item of a batch
            self.within -= self.left[self.item]
            self._next()
        self._report(self.before + self._work(self.within))

    def finish(self, item: Item) -> None:
        self.finished += 1
        while self.item < self.finished:
            self.within = 0
            self._next()
        self._report(self.before)

    def _next(self) -> None:
        self.before += self._work(self.left[self.item])
        self.item += 1

    def _work(self, tokens: int) -> float:
        """The work of an item's first `tokens`, in units of a token without context."""
        return tokens + tokens * tokens / (2 * self.balance)

    def _report(self, work: float) -> None:
        now = min(round(work / self.work * self.total), self.total)
        if self.progress and now > self.reported:
            self.reported = now
            self.progress(self.label, now, self.total)


@dataclass(frozen=True)
class Evaluation:
    """Directories, suites and the results file. The first directory is the model in question.

    suites: makes the suites, given the loaded reference, which only `fidelity` needs.
    """

    directories: Sequence[Directory]
    suites: Callable[[Subject | None], Sequence[Suite]]
    out: Path
    reference: Directory | None = None
    dtype: str = "auto"
    chunk: int | None = None  # tokens per forward pass; None: sized to the machine
    batch_size: int | None = None  # sequences measured together at most; None: sized to the machine
    kept: Kept | None = None  # measurements of earlier evaluations in other folders

    def depends_on(self, directory: Directory, suite: Suite) -> dict[str, Any]:
        """Everything that the records of a suite depend on, to the last digit."""
        return {
            "model": directory.fingerprint(),
            "suite": suite.name,
            "options": identity(suite.options, suite.parts),
            "sizes": [self.dtype, self.chunk, self.batch_size, self.window],
            "machine": [describe(), version("mlx"), os.environ.get("MLX_ENABLE_TF32", "")],
        }

    @property
    def window(self) -> int:
        """The longest window of the directories. Models with a shorter window are measured beyond it on purpose."""
        return max(directory.window for directory in self.directories)


def evaluate(job: Evaluation, *, progress: Progress | None = None, say: Say | None = None) -> dict[str, Any]:
    """Run an evaluation; returns the content of results.json.

    A suite's numbers are merged into `job.out` when the suite ends, and each item is written to a log beside it when
    the item is measured. So a stopped evaluation resumes when run again, and a part measured later (further lengths
    or tasks) adds to the earlier ones. An item that another results file of the folder has, of the same model, text,
    options and dtype, is not measured again, nor one that `job.kept` has; `say` gets a line for each suite of which
    this is so. A model is loaded only if something is left to measure. `comparisons` contains all models that were
    measured on the same items, now or earlier.
    """
    check(job)
    reference = _load(job, job.reference) if job.reference else None
    suites = job.suites(reference)
    for suite in suites:  # errors in data and lengths come before the weights are loaded
        suite.items(job.directories[0], job.window)
    records: dict[str, dict[str, list[Record]]] = {suite.name: {} for suite in suites}
    for directory in job.directories:
        reuse = reference is not None and directory.path == reference.directory.path
        subject = replace(reference, directory=directory) if reuse and reference else None
        for suite in suites:
            key = digest([directory.fingerprint(), suite.name, identity(suite.options, suite.parts), job.dtype])
            log = ItemLog.beside(job.out, directory.label, suite.name, key)
            with log.held():
                items = suite.items(directory, job.window)
                again = _measured_before(items, log, _kept(job, directory, suite))
                if again and say:
                    say(f"{suite.name}, {directory.label}: {again} of {len(items)} items were measured before")
                if left(items, log.read()):
                    subject = subject or _load(job, directory)
                    run_suite(subject, suite, log=log, progress=progress, items=items)
                    if job.kept:
                        job.kept.write(job.depends_on(directory, suite), list(log.read().values()))
                records[suite.name][directory.label] = list(log.read().values())
                _merge(job.out, directory.label, suite, log)
        del subject

    def compared(old: Results) -> Results:
        everything = {suite.name: {**_before(job.out, old, suite), **records[suite.name]} for suite in suites}
        several = [suite for suite in suites if len(everything[suite.name]) > 1]
        return old.merged(Results(comparisons=comparisons(several, everything, _baseline(job))))

    return update_results(job.out, compared).as_json()


def _kept(job: Evaluation, directory: Directory, suite: Suite) -> dict[str, Record]:
    kept = job.kept.read(job.depends_on(directory, suite)) if job.kept else None
    return valid_records(kept) if isinstance(kept, list) else {}


def _merge(out: Path, label: str, suite: Suite, log: ItemLog) -> None:
    """Put the records of a log into results.json, in place of the entry of an earlier part of it."""
    measured = _summary(suite, list(log.read().values()), log)

    def change(old: Results) -> Results:
        before = old.rows.get(label, Row()).suites.get(suite.name)
        options = suite.options
        if before and before.options is not None and before.items == log.path.name:
            options = all_options(suite, before.options)
        entry = {**measured, "options": options, "items": log.path.name}
        result = SuiteResult.from_json(entry, Field(out, f"{label}.{suite.name}"))
        return old.merged(Results({label: Row(suites={suite.name: result})}))

    update_results(out, change)


def _before(out: Path, results: Results, suite: Suite) -> dict[str, list[Record]]:
    """label -> records of the models in `results` that were measured with the same suite, text and seed."""
    before: dict[str, list[Record]] = {}
    for label, row in results.rows.items():
        entry = row.suites.get(suite.name)
        if entry is None or entry.options is None or entry.items is None:
            continue
        if identity(entry.options, suite.parts) == identity(suite.options, suite.parts):
            before[label] = list(ItemLog.named(out, entry.items).read().values())
    return {label: records for label, records in before.items() if records}


def _baseline(job: Evaluation) -> str:
    """The label that others are compared with: native, else the reference, else the first of --against."""
    labels = [directory.label for directory in job.directories]
    if "native" in labels or len(labels) < 2:
        return "native"
    paths = [directory.path for directory in job.directories]
    return labels[paths.index(job.reference.path)] if job.reference and job.reference.path in paths[1:] else labels[1]


def check(job: Evaluation) -> None:
    """UserError if labels are not unique, tokenizers differ, or the results file is not valid."""
    labels = [directory.label for directory in job.directories]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two directories are called {label}: name them, as in --against NAME=DIR")
        if label in NOT_MODELS or not label.isprintable():
            raise UserError(f"a directory cannot be called {label!a}: name it, as in --model NAME=DIR")
    everything = [*job.directories, *([job.reference] if job.reference else [])]
    for directory in everything:
        directory.encode("")  # raises if the tokenizer cannot encode
    same_tokenizer(everything)
    read_results(job.out)


def _load(job: Evaluation, directory: Directory) -> Subject:
    return load_subject(directory, dtype=job.dtype, chunk=job.chunk, batch_size=job.batch_size)


def comparisons(
    suites: Sequence[Suite], records: Mapping[str, Mapping[str, list[Record]]], baseline: str
) -> dict[str, Comparison]:
    """The comparison of each suite; models are compared with native, or with `baseline` if there is no native."""
    result: dict[str, Comparison] = {}
    for suite in suites:
        by_label = records[suite.name]
        native = "native" if "native" in by_label else baseline
        names = dict.fromkeys(name for rows in by_label.values() for name in metric_names(rows))
        metrics = {
            name: compare(
                {label: samples(rows, name) for label, rows in by_label.items()}, suite.metric(name), native=native
            )
            for name in names
        }
        result[suite.name] = Comparison(native, metrics)
    return result
