"""Suites over directories: each is loaded once, each item measured once, and what is done is never lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .compare import compare
from .store import COMPARISONS, NOT_MODELS, ItemLog, merge_results, read_results
from .subject import CHUNK, Directory, Subject, digest, load_subject, same_tokenizer
from .suite import Item, Record, Suite, metric_names, samples, summary

Progress = Callable[[str, int, int], None]  # (label, cost done, cost in all)


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
    state = _Done(f"{suite.name}, {subject.label}", items, done, progress)
    for item in items:
        if item.id not in done:
            done[item.id] = suite.measure(subject, item, state.tick)
            if log:
                log.append(done[item.id])
            state.finish(item)
    records = [done[item.id] for item in items]
    return summary(suite, records), records


class _Done:
    """Counts the cost of what is done, item by item and within an item; only what is left is counted in all."""

    def __init__(self, label: str, items: Sequence[Item], done: Mapping[str, Any], progress: Progress | None):
        self.label, self.progress = label, progress
        self.total = sum(item.cost for item in items if item.id not in done)
        self.before = self.within = self.told = 0

    def tick(self, tokens: int) -> None:
        self.within += tokens
        self._tell(self.before + self.within)

    def finish(self, item: Item) -> None:
        self.before, self.within = self.before + item.cost, 0
        self._tell(self.before)

    def _tell(self, now: int) -> None:
        now = min(now, self.total)
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
    so a run that is stopped and started again goes on where it was. Comparisons, where there are several
    directories, stand under `comparisons`.
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
            key = digest([directory.fingerprint(), suite.name, suite.options, job.dtype])
            log = ItemLog.beside(job.out, directory.label, suite.name, key)
            kept, found = run_suite(subject, suite, log=log, progress=progress, window=job.window)
            records[suite.name][directory.label] = found
            merge_results(job.out, {directory.label: {suite.name: kept}})
        del subject
    if len(job.directories) > 1:
        merge_results(job.out, {COMPARISONS: comparisons(suites, records)})
    return read_results(job.out)


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


def comparisons(suites: Sequence[Suite], records: Mapping[str, Mapping[str, list[Record]]]) -> dict[str, Any]:
    """suite -> {metrics: metric -> label -> the row of `compare`}; the measure is the native model, or the last one."""
    result: dict[str, Any] = {}
    for suite in suites:
        found = records[suite.name]
        native = "native" if "native" in found else list(found)[-1]
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
