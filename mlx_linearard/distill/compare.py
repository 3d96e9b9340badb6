"""Several objectives on the same tokens from the same start, each a run of its own, weighed in one report.

The comparison's directory holds a run directory for each objective, named after it, and a results.json whose
rows are native, scaled and each objective's restored model; `restored` repeats the first of them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import OBJECTIVES, DistillConfig, objectives_of, read_yaml, to_yaml
from ..data import hash_of
from ..errors import UserError
from ..evaluate.held_out import Fidelity
from ..files import RunDir, disk_errors, read_json, write_json
from ..report.content import write_report
from ..results.store import COMPARISONS, merged_dict, read_results
from ..results.weighing import HELD_OUT, weigh
from .checkpoint import differences
from .plan import steps_of
from .run import FREE_ON_RESUME, Job, Listener, Text, check_place, execute, plan_only, prepare, read_before

RESTORED = "restored"


@dataclass(frozen=True)
class Comparison:
    """What `compare_objectives` returns: the directory, the objectives in order, its results.json, and the time."""

    run: RunDir
    objectives: tuple[str, ...]
    results: dict[str, Any]
    seconds: float


def compare_objectives(config: DistillConfig, listener: Listener | None = None) -> Comparison | None:
    """Train every objective of `config.compare` and weigh them; None after a dry run.

    With `resume`, finished objectives are not trained again, a stopped one goes on, and others may be added.
    Raises UserError for a user's mistake, before anything is written; KeyboardInterrupt after saving.
    """
    started = time.perf_counter()
    session = _Session(config, listener or Listener())
    for number, name in enumerate(session.names, 1):
        session.one(number, name)
        mx.clear_cache()
    if config.dry_run:
        return None
    session.write_config()
    return Comparison(session.place, session.names, session.gather(), time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------
# What the runs have in common


@dataclass
class _Common:
    """comparison.json: what all runs must agree on, their sizes, and which are finished after how many steps."""

    identity: dict[str, Any]
    sizes: dict[str, int]
    finished: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> _Common:
        sizing = job.sizing
        sizes = {
            "seq_len": sizing.seq_len, "grad_accum": sizing.grad_accum, "steps": job.schedule.steps,
            "eval_tokens": sizing.eval_tokens,
        }  # fmt: skip
        return cls(_identity(job), sizes)

    @classmethod
    def read(cls, path: Path) -> _Common:
        found = read_json(path)
        names = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in names):
            raise UserError(f"{path} is not a comparison's: start again with --overwrite")
        return cls(*(found[name] for name in names))

    def write(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    def fixed(self, config: DistillConfig) -> DistillConfig:
        """`config` with sizes where it leaves them open, and --tokens as steps."""
        sizes: dict[str, Any] = {name: getattr(config, name) or size for name, size in self.sizes.items()}
        if config.tokens:
            sizes["steps"] = steps_of(config.tokens, sizes["seq_len"] * config.batch_size * sizes["grad_accum"])
        return dataclasses.replace(config, tokens=None, **sizes)

    def check(self, now: Mapping[str, Any]) -> None:
        """UserError that names what differs from the runs there are; what `now` does not say is not looked at."""
        if different := differences(self.identity, now, now):
            raise UserError(
                f"--resume: the runs of this comparison would differ: {different}; give the options it "
                "began with, or another --output"
            )


def _identity(job: Job) -> dict[str, Any]:
    """What a job must share with the others: all that a checkpoint asks for but the objective, and held-out text."""
    same = {name: value for name, value in job.identity.items() if name != "objective"}
    return json.loads(json.dumps({**same, "held_out": hash_of(*job.held_out.values())}))


# ---------------------------------------------------------------------------------------------------
# The runs


class _Session:
    """One call of `compare_objectives`: the options, made definite by the first run, and what is shared."""

    def __init__(self, config: DistillConfig, listener: Listener):
        self.config, self.listener = config, listener
        self.names = objectives_of(config.compare)
        self.place = RunDir(config.output)
        _check_place(config, self.place)
        self.text: Text | None = None
        self.common: _Common | None = None
        if config.resume:
            self.common = _Common.read(self.place.comparison)
            self.config = self.common.fixed(config)
            free = {*FREE_ON_RESUME, "objective"}
            self.common.check({k: v for k, v in dataclasses.asdict(self.config).items() if k not in free})

    def child(self, name: str) -> RunDir:
        return RunDir(self.place.root / name)

    def one(self, number: int, name: str) -> None:
        """Train one objective, where it is not finished, and put it beside the others."""
        label = f"{name}, {number} of {len(self.names)}"
        if self.finished(name):
            self.listener.say(f"{label}: finished before")
            return
        self.listener.say(f"{label}:")
        started = time.perf_counter()
        run = self.child(name)
        config = dataclasses.replace(
            self.config, compare=None, objective=name, output=str(run.root),
            resume=self.config.resume and run.config.exists(),
        )  # fmt: skip
        if self.config.dry_run and self.common is None:
            plan_only(config, self.listener)
            return
        job = prepare(config, self.listener, self.text)
        self.text = job.blocks.tokens, job.held_out
        self._agree(job)
        if not self.config.dry_run:
            try:
                execute(job, self.listener, started, self._measured())
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            self._finish(name)

    def finished(self, name: str) -> bool:
        """Whether a run has come to its end, as long as it is asked to be, and is still there."""
        common, run = self.common, self.child(name)
        ended = common is not None and common.finished.get(name) == self.config.steps
        return ended and all(path.exists() for path in (run.results, run.held_out, run.metrics, run.model))

    def _agree(self, job: Job) -> None:
        """The first run sets what the others must share; the directory is made when it is ready to start."""
        if self.common is None:
            self.common = _Common.of(job)
            self.config = self.common.fixed(self.config)
            if not self.config.dry_run:
                _open(self.place, self.common)
        self.common.check(_identity(job))
        if not self.config.dry_run:
            self.write_config(str(job.pair.path))

    def write_config(self, model: str | None = None) -> None:
        """config.yaml, with the objectives of this call and the model where it lies."""
        before = read_yaml(self.place.config) if self.place.config.exists() else {}
        config = dataclasses.replace(self.config, model=model or before.get("model"))
        with disk_errors(self.place.config):
            self.place.config.write_text(to_yaml(config), encoding="utf-8")

    def _measured(self) -> tuple[Fidelity, Fidelity] | None:
        """Native and scaled as another run of this comparison has measured them."""
        found = (read_before(self.child(name)) for name in self.names)
        return next((rows for rows in found if rows), None)

    def _finish(self, name: str) -> None:
        assert self.common is not None and self.config.steps
        self.common.finished[name] = self.config.steps
        self.common.write(self.place.comparison)
        self.gather()

    def gather(self) -> dict[str, Any]:
        """results.json and the report of what is finished; what `evaluate` has put into it stays."""
        names = [name for name in self.names if self.finished(name)]
        parts = _results({name: self.child(name) for name in names}, self.names)
        gone = {*OBJECTIVES, RESTORED}.difference(names)
        kept = {key: value for key, value in read_results(self.place.results).items() if key not in gone}
        results = merged_dict(kept, parts)
        write_json(self.place.results, results)
        write_report(self.place.root)
        return results


def _check_place(config: DistillConfig, place: RunDir) -> None:
    root = place.root
    check_place(config, root, "comparison", holds=place.comparison.exists(), missing="comparison to go on with")
    if config.overwrite and config.model and Path(config.model).resolve().is_relative_to(root.resolve()):
        raise UserError(f"--overwrite would remove --model {config.model}: choose another --output")


def _open(place: RunDir, common: _Common) -> None:
    """Make the directory; of an earlier comparison nothing stays."""
    with disk_errors(place.root):
        place.root.mkdir(parents=True, exist_ok=True)
        for old in [*(place.root / name for name in OBJECTIVES), place.items]:
            if old.is_dir():
                shutil.rmtree(old)
        for file in (place.results, place.report, place.report_markdown):
            file.unlink(missing_ok=True)
        common.write(place.comparison)


# ---------------------------------------------------------------------------------------------------
# One table of all


def _results(runs: Mapping[str, RunDir], names: Sequence[str]) -> dict[str, Any]:
    """results.json of the comparison from the finished runs'; {} where none is."""
    if not runs:
        return {}
    found = {name: read_json(run.results) for name, run in runs.items()}
    pieces = {name: read_json(run.held_out) for name, run in runs.items()}
    first = next(iter(runs))
    rows = {name: {**found[name][RESTORED], "training": _training(run)} for name, run in runs.items()}
    models = {**{name: pieces[first][name] for name in ("native", "scaled")},
              **{name: pieces[name][RESTORED] for name in runs}}  # fmt: skip
    own = ("method", "factor", "native_window", "machine", "versions")
    return {
        **{name: found[first][name] for name in ("native", "scaled")},
        **({RESTORED: rows[names[0]]} if names[0] in rows else {}),
        **rows,
        COMPARISONS: {HELD_OUT: weigh(models, list(runs))},
        "run": {
            **{key: found[first]["run"][key] for key in own},
            "training_tokens": max(row["training"]["tokens"] for row in rows.values()),
            "seconds": round(sum(row["training"]["seconds"] for row in rows.values()), 1),
        },
    }  # fmt: skip


def _training(run: RunDir) -> dict[str, Any]:
    """Tokens, time and peak memory of a run's steps, from its metrics.jsonl."""
    steps = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in steps)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 2),
        "peak_memory_gb": max(step["peak_memory_gb"] for step in steps),
    }
