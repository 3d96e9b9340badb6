"""Several objectives trained on the same tokens from the same start, each in its own run, compared in one report.

The comparison's directory holds one run directory per objective, named after it, and a results.json whose rows
are native, scaled and each objective's restored model; `restored` repeats the first of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import OBJECTIVES, DistillConfig, objectives_of, read_yaml, to_yaml
from ..data import hash_of
from ..errors import UserError
from ..files import RunDir, disk_errors, locked, read_json, write_json, write_text
from ..report.render import write_report
from ..results.objectives import combine_runs
from ..results.rows import RESTORED
from ..results.store import update_results
from .checkpoint import differences
from .dry_run import NOTHING_WRITTEN, check_text
from .listener import Listener
from .loggers import check_loggers
from .place import check_directories, check_model_stays, check_not_in_use, check_place
from .prepare import FREE_ON_RESUME, Job, Text, load, make_plan
from .run import Rows, execute, read_before
from .sizing import steps_of


@dataclass(frozen=True)
class ComparedRuns:
    """What `compare_objectives` returns: the directory, the objectives in order, its results.json, and the time."""

    run: RunDir
    objectives: tuple[str, ...]
    results: dict[str, Any]
    seconds: float


def compare_objectives(config: DistillConfig, listener: Listener | None = None) -> ComparedRuns | None:
    """Train every objective of `config.compare` and compare the results; None after a dry run.

    With `resume`, finished objectives are not trained again, a stopped one is continued, and others may be added.

    Raises:
        UserError: a user's mistake, raised before anything is written.
        KeyboardInterrupt: a signal asked the run to stop; the state is saved.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    place, objectives = RunDir(config.output), objectives_of(config.compare)
    check_comparison_place(config, place)
    check_loggers(config)
    if config.dry_run:
        plan_all(config, place, objectives, listener)
        listener.say(NOTHING_WRITTEN)
        return None
    manifest: Manifest | None = None
    text: Text | None = None
    with contextlib.ExitStack() as opened:
        if config.resume:
            opened.enter_context(locked(place.root))
            manifest = read_manifest(place, config)
        for number, objective in enumerate(objectives, 1):
            label = f"{objective}, {number} of {len(objectives)}"
            if manifest and manifest.has_finished(objective, place, config):
                listener.say(f"{label}: finished before")
                continue
            listener.say(f"{label}:")
            run_started = time.perf_counter()
            plan = make_plan(config_of(objective, config, manifest), listener=listener)
            job = load(plan, listener=listener, text=text)
            text = job.text
            if manifest is None:
                manifest = Manifest.of(job)
                opened.enter_context(new_comparison(config, place, manifest))
            manifest.check(_identity(job))
            write_config(place, manifest.with_sizes(config), str(job.pair.path))
            run_objective(objective, job, listener, run_started, measured_before(job, place, objectives))
            del plan, job  # the models, before the next ones are loaded
            mx.clear_cache()
            manifest = manifest.with_finished(objective, config)
            manifest.write(place.comparison)
            gather(place, manifest, config, objectives)
        assert manifest is not None
        write_config(place, manifest.with_sizes(config))
        results = gather(place, manifest, config, objectives)
    return ComparedRuns(place, objectives, results, time.perf_counter() - started)


def check_comparison_place(config: DistillConfig, place: RunDir) -> None:
    """UserError if the comparison cannot be written to `place`."""
    root = place.root
    with disk_errors(root):
        check_place(config, root, "comparison", holds=place.comparison.exists(), missing="comparison to resume")
        check_model_stays(config, root)
    check_not_in_use(config, root)


def plan_all(config: DistillConfig, place: RunDir, objectives: Sequence[str], listener: Listener) -> None:
    """A dry run: check and report the plan of every objective."""
    manifest = read_manifest(place, config) if config.resume else None
    for number, objective in enumerate(objectives, 1):
        listener.say(f"{objective}, {number} of {len(objectives)}:")
        check_text(make_plan(config_of(objective, config, manifest), listener=listener), listener=listener)


def config_of(objective: str, config: DistillConfig, manifest: Manifest | None) -> DistillConfig:
    """The options of one objective's run."""
    run = RunDir(Path(config.output) / objective)
    sized = manifest.with_sizes(config) if manifest else config
    return dataclasses.replace(
        sized,
        compare=None,
        objective=objective,
        project_name=config.project_name or Path(config.output).absolute().name,
        output=str(run.root),
        resume=config.resume and run.config.exists(),
    )


def run_objective(objective: str, job: Job, listener: Listener, started: float, before: Rows | None) -> None:
    """Train one objective; a UserError names it."""
    try:
        execute(job, listener, started, before)
    except UserError as error:
        raise UserError(f"{objective}: {error}") from None


def measured_before(job: Job, place: RunDir, objectives: Sequence[str]) -> Rows | None:
    """The rows of native and scaled, if a run of this comparison has measured them."""
    rows = (read_before(RunDir(place.root / objective), job.measured_on) for objective in objectives)
    return next((pair for pair in rows if pair), None)


# ---------------------------------------------------------------------------------------------------
# The manifest


@dataclass(frozen=True)
class Manifest:
    """comparison.json: the facts on which all runs agree, their sizes, and the steps of each finished objective."""

    identity: dict[str, Any]
    sizes: dict[str, int]
    finished: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> Manifest:
        """The manifest of a new comparison, whose first job this is."""
        sizing = job.sizing
        sizes = {
            "seq_len": sizing.seq_len,
            "grad_accum": sizing.grad_accum,
            "steps": job.schedule.steps,
            "eval_tokens": sizing.eval_tokens,
            **({"long_seq_len": sizing.long_seq_len} if sizing.long_seq_len else {}),
        }
        return cls(_identity(job), sizes)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in `path`; UserError if the file holds something else."""
        value = read_json(path)
        names = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in names):
            raise UserError(f"{path} is not a comparison's manifest: start again with --overwrite")
        numbers = [*value["sizes"].values(), *value["finished"].values()]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(f"{path} is not a comparison's manifest: start again with --overwrite")
        return cls(*(value[name] for name in names))

    def write(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    def with_sizes(self, config: DistillConfig) -> DistillConfig:
        """`config` with the sizes that it leaves open, and with --tokens as steps."""
        sizes: dict[str, Any] = {name: getattr(config, name) or size for name, size in self.sizes.items()}
        if config.tokens:
            sizes["steps"] = steps_of(config.tokens, sizes["seq_len"] * config.batch_size * sizes["grad_accum"])
        for name in ("long_weight", "learning_rate"):
            if getattr(config, name) is None:
                sizes[name] = self.identity.get(name)
        return dataclasses.replace(config, tokens=None, **sizes)

    def with_finished(self, objective: str, config: DistillConfig) -> Manifest:
        """The manifest after `objective` has made all steps that `config` asks for."""
        steps = self.with_sizes(config).steps
        assert steps is not None
        return dataclasses.replace(self, finished={**self.finished, objective: steps})

    def has_finished(self, objective: str, place: RunDir, config: DistillConfig) -> bool:
        """Whether `objective` has made all steps that `config` asks for, and its run is still there."""
        run = RunDir(place.root / objective)
        complete = self.finished.get(objective) == self.with_sizes(config).steps
        return complete and all(path.exists() for path in (run.results, run.held_out, run.metrics, run.model))

    def check(self, facts: Mapping[str, Any]) -> None:
        """UserError that names the differences between `facts` and those of the runs so far."""
        if different := differences(self.identity, facts, facts):
            raise UserError(
                f"--resume: the runs of this comparison would differ: {different}; give the options with which the "
                "comparison began, or another --output"
            )


def read_manifest(place: RunDir, config: DistillConfig) -> Manifest:
    """The manifest of the comparison in `place`; UserError if the options of `config` do not fit it."""
    manifest = Manifest.read(place.comparison)
    options = dataclasses.asdict(manifest.with_sizes(config))
    manifest.check({name: options[name] for name in options.keys() - FREE_ON_RESUME - {"objective"}})
    return manifest


def _identity(job: Job) -> dict[str, Any]:
    """The facts on which all jobs agree: those of a checkpoint without the objective, and the held-out text."""
    same = {name: value for name, value in job.identity.items() if name != "objective"}
    return json.loads(json.dumps({**same, "held_out": hash_of(*job.text.held_out.values())}))


# ---------------------------------------------------------------------------------------------------
# The directory


@contextlib.contextmanager
def new_comparison(config: DistillConfig, place: RunDir, manifest: Manifest) -> Iterator[None]:
    """Make the directory, remove an earlier comparison, and keep other processes out while the block runs."""
    with disk_errors(place.root):
        place.root.mkdir(parents=True, exist_ok=True)
    with locked(place.root):
        check_place(config, place.root, "comparison", holds=place.comparison.exists(), missing="")
        for objective in OBJECTIVES:
            check_directories(config, RunDir(place.root / objective))
        with disk_errors(place.root):
            for old in [*(place.root / objective for objective in OBJECTIVES), place.items]:
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
            for file in (place.config, place.results, place.report, place.report_markdown):
                file.unlink(missing_ok=True)
            manifest.write(place.comparison)
        yield


def write_config(place: RunDir, config: DistillConfig, model: str | None = None) -> None:
    """Write config.yaml: the options with all sizes, and the model's path (by default the path in the file)."""
    if model is None and place.config.exists():
        model = read_yaml(place.config).get("model")
    write_text(place.config, to_yaml(dataclasses.replace(config, model=model, resume=False, overwrite=False)))


# ---------------------------------------------------------------------------------------------------
# One table for all runs


def gather(place: RunDir, manifest: Manifest, config: DistillConfig, objectives: Sequence[str]) -> dict[str, Any]:
    """Write results.json and the report of the finished objectives; rows that `evaluate` has added stay."""
    finished = [name for name in objectives if manifest.has_finished(name, place, config)]
    rows = combine_runs({name: RunDir(place.root / name) for name in finished}, objectives[0])
    gone = {*OBJECTIVES, RESTORED}.difference(finished)
    results = update_results(place.results, lambda old: old.without(gone).merged(rows))
    write_report(place.root)
    return results.as_json()
