"""Suites over directories: each is loaded once, each item measured once, and what is done is never lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..results.statistics import compare
from ..results.store import COMPARISONS, NOT_MODELS, ItemLog, Record, merge_results, read_results
from .subject import CHUNK, Directory, Subject, digest, load_subject, same_tokenizer
from .suite import Item, Suite, all_options, identity, metric_names, samples, summary

Progress = Callable[[str, int, int], None]  # (label, tokens done by the work they are, tokens in all)


def run_suite(
    subject: Subject, suite: Suite, *, log: ItemLog | None = None, progress: Progress | None = None,
    window: int | None = None,
) -> tuple[dict[str, Any], list[Record]]:  # fmt: skip
    """One suite on one loaded model: (what results.json keeps of it, the records of its items).

    Items that `log` already holds are not measured again. `window` is the longest context that is let
    through, by default the model's own. Raises UserError where data or lengths do not fit.
    """
    items = suite.items(subject.directory, window or subject.directory.window)
    done = log.read() if log else {}
    state = _Done(f"{suite.name}, {subject.label}", items, done, progress, subject.directory.balance)
    for item in items:
        if item.id not in done:
            done[item.id] = suite.measure(subject, item, state.tick)
            if log:
                log.append(done[item.id])
            state.finish(item)
    records = [done[item.id] for item in items]
    return summary(suite, records), records


class _Done:
    """Tells how much is done, item by item and within an item; only what is left is counted in all.

    It is told in tokens, but each counts for the work it is: the more of its item stand before it, the more.
    """

    def __init__(
        self, label: str, items: Sequence[Item], done: Mapping[str, Any], progress: Progress | None, balance: float
    ):
        self.label, self.progress, self.balance = label, progress, balance
        left = [item.cost for item in items if item.id not in done]
        self.total, self.work = sum(left), sum(map(self._work, left))
        self.before, self.within, self.told = 0.0, 0, 0

    def tick(self, tokens: int) -> None:
        self.within += tokens
        self._tell(self.before + self._work(self.within))

    def finish(self, item: Item) -> None:
        self.before, self.within = self.before + self._work(item.cost), 0
        self._tell(self.before)

    def _work(self, tokens: int) -> float:
        """Work of an item's first `tokens`, in tokens that see nothing before them."""
        return tokens + tokens * tokens / (2 * self.balance)

    def _tell(self, work: float) -> None:
        now = min(round(work / self.work * self.total), self.total)
        if self.progress and now > self.told:
            self.told = now
            self.progress(self.label, now, self.total)


@dataclass(frozen=True)
class Evaluation:
    """Which directories, what is asked of them and where it is written. The first directory is the model in question.

    suites: made once the reference is loaded, where `fidelity` needs one.
    """

    directories: Sequence[Directory]
    suites: Callable[[Subject | None], Sequence[Suite]]
    out: Path
    reference: Directory | None = None
    dtype: str = "auto"
    chunk: int = CHUNK

    @property
    def window(self) -> int:
        """The longest window of the directories: what is measured must be a fair question to one of them."""
        return max(directory.window for directory in self.directories)


def evaluate(job: Evaluation, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run an evaluation; returns results.json as it then stands.

    A suite's numbers are merged into `job.out` when it ends, its items into a log beside it as they are done,
    so a run that is stopped and started again goes on where it was, and a part measured later (further lengths
    or tasks) adds to what is there. Comparisons with all models that were measured on the same, now or before,
    stand under `comparisons`.
    """
    check(job)
    reference = _load(job, job.reference) if job.reference else None
    suites = job.suites(reference)
    for suite in suites:  # complaints about data and lengths come before the weights
        suite.items(job.directories[0], job.window)
    records: dict[str, dict[str, list[Record]]] = {suite.name: {} for suite in suites}
    for directory in job.directories:
        reuse = reference is not None and directory.path == reference.directory.path
        subject = Subject(directory, reference.model, job.chunk) if reuse and reference else _load(job, directory)
        for suite in suites:
            key = digest([directory.fingerprint(), suite.name, identity(suite.options, suite.parts), job.dtype])
            log = ItemLog.beside(job.out, directory.label, suite.name, key)
            run_suite(subject, suite, log=log, progress=progress, window=job.window)
            records[suite.name][directory.label] = list(log.read().values())
            _merge(job.out, directory.label, suite, log)
        del subject
    everything = {suite.name: {**_before(job.out, suite), **records[suite.name]} for suite in suites}
    compared = [suite for suite in suites if len(everything[suite.name]) > 1]
    if compared:
        merge_results(job.out, {COMPARISONS: comparisons(compared, everything, _measure(job))})
    return read_results(job.out)


def _merge(out: Path, label: str, suite: Suite, log: ItemLog) -> None:
    """Put what a log holds into results.json, in the place of what an earlier part of it gave."""
    before = read_results(out).get(label, {})
    entry = before.get(suite.name, {}) if isinstance(before, Mapping) else {}
    same = isinstance(entry, Mapping) and entry.get("items") == log.path.name
    options = all_options(suite, entry["options"]) if same else suite.options
    kept = {**summary(suite, list(log.read().values())), "options": options, "items": log.path.name}
    merge_results(out, {label: {suite.name: kept}})


def _before(out: Path, suite: Suite) -> dict[str, list[Record]]:
    """label -> records of the models that results.json has of the same suite, text and seed."""
    found: dict[str, list[Record]] = {}
    for label, row in read_results(out).items():
        entry = row.get(suite.name) if isinstance(row, Mapping) and label not in NOT_MODELS else None
        options = entry.get("options") if isinstance(entry, Mapping) else None
        if (
            not isinstance(entry, Mapping)
            or not isinstance(options, Mapping)
            or not isinstance(entry.get("items"), str)
        ):
            continue
        if identity(options, suite.parts) == identity(suite.options, suite.parts):
            found[label] = list(ItemLog.named(out, entry["items"]).read().values())
    return {label: records for label, records in found.items() if records}


def _measure(job: Evaluation) -> str:
    """The model that others are measured by: native, or else the reference, or the first that was given against."""
    labels = [directory.label for directory in job.directories]
    if "native" in labels or len(labels) < 2:
        return "native"
    paths = [directory.path for directory in job.directories]
    return labels[paths.index(job.reference.path)] if job.reference and job.reference.path in paths[1:] else labels[1]


def check(job: Evaluation) -> None:
    """UserError where labels clash, tokenizers differ, or the results file is no place to merge into."""
    labels = [directory.label for directory in job.directories]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two directories are called {label}: name them, as in --against NAME=DIR")
        if label in NOT_MODELS:
            raise UserError(f"a directory cannot be called {label}: name it, as in --model NAME=DIR")
    everything = [*job.directories, *([job.reference] if job.reference else [])]
    same_tokenizer(everything)
    read_results(job.out)


def _load(job: Evaluation, directory: Directory) -> Subject:
    return load_subject(directory, dtype=job.dtype, chunk=job.chunk)


def comparisons(
    suites: Sequence[Suite], records: Mapping[str, Mapping[str, list[Record]]], measure: str
) -> dict[str, Any]:
    """suite -> {metrics: metric -> label -> the row of `compare`}; models are held against native, or `measure`."""
    result: dict[str, Any] = {}
    for suite in suites:
        found = records[suite.name]
        native = "native" if "native" in found else measure
        names = dict.fromkeys(name for rows in found.values() for name in metric_names(rows))
        result[suite.name] = {
            "against": native,
            "metrics": {
                name: compare(
                    {label: samples(rows, name) for label, rows in found.items()}, suite.metric(name), native=native
                )
                for name in names
            },
        }
    return result
