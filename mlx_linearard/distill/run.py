"""A distillation from its options to its run directory: open, measure, train, export, verify, report."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import DistillConfig, to_yaml
from ..distributed.ranks import Ranks, joined
from ..errors import UserError
from ..evaluate.held_out import Fidelity, measure
from ..evaluate.writing import write
from ..export.fuse import write_adapters, write_base, write_fused
from ..export.verify import Verified, student_logits, verify_export
from ..files import RunDir, disk_errors, locked, new_file, parse_json, sweep
from ..report.card import update_card
from ..report.render import write_report
from ..results import store
from ..results.fields import Field
from ..results.kept import Kept
from ..results.records import Pieces, pieces_of, read_pieces, write_pieces, write_windows
from ..results.rows import ExportInfo, Results, Row, RunInfo
from . import checkpoint
from .dry_run import NOTHING_WRITTEN, check_text
from .listener import Listener
from .loggers import check_loggers, reporting
from .loop import train_run
from .place import check_output
from .prepare import Job, load, make_plan
from .step import TrainState

VERIFY_TOKENS = 64
MEASURED_ON = "measured_on"  # the key of before.json that identifies the weights and the held-out text

Rows = tuple[Fidelity, Fidelity]  # native, scaled


@dataclass(frozen=True)
class Result:
    """What `distill` returns: the run directory, and the rows of its table."""

    run: RunDir
    native: Fidelity
    scaled: Fidelity
    restored: Fidelity
    export: Verified
    seconds: float
    exported_step: int  # the step whose state is `restored`; 0 is the start
    steps: int  # finished steps, skipped ones included
    skipped: int  # steps for which the guard made no update


def distill(config: DistillConfig, listener: Listener | None = None, ranks: Ranks | None = None) -> Result | None:
    """Run a complete distillation (the contract's main path).

    Processes that mlx.launch started share the run. Only the first of them writes files and uses its listener.

    Args:
        ranks: the processes, if they have joined already.
    Returns:
        None after a dry run, and at all ranks but the first.
    Raises:
        UserError: a user's mistake, raised before anything is written.
        KeyboardInterrupt: a signal asked the run to stop; the state is saved.
        LostProcess: another process has ended; the state is saved if possible.
    """
    if ranks is None:
        with joined() as ranks:
            return distill(config, listener, ranks)
    listener = (ranks.leads and listener) or Listener()
    started = time.perf_counter()
    if config.compare:
        raise UserError("--compare asks for several runs: call compare_objectives, which makes them")
    with ranks.meeting():
        if ranks.leads:
            check_loggers(config)
    plan = make_plan(config, listener=listener, ranks=ranks)
    if config.dry_run:
        check_text(plan, listener=listener, ranks=ranks)
        listener.say(NOTHING_WRITTEN)
        return None
    return execute(load(plan, listener=listener, ranks=ranks), listener, started)


def execute(job: Job, listener: Listener, started: float, before: Rows | None = None) -> Result | None:
    """Open the run directory, measure, train, export, verify and report.

    Args:
        started: the `time.perf_counter()` at which the run began.
        before: the rows of native and scaled, if another run of a comparison has measured them.
    Returns:
        None at all ranks but the first, which only train.
    Raises:
        KeyboardInterrupt: a signal asked the run to stop; the state is saved.
    """
    ranks, state, rows = job.ranks, TrainState.start(job.pair, job.schedule), None
    with contextlib.ExitStack() as opened:
        with ranks.on_loss(job.how_to_continue), ranks.meeting():
            if ranks.leads:
                listener = opened.enter_context(reporting(job.config, listener))
                opened.enter_context(open_run(job))
                resume(job, state, listener)
                clear(job, state)
                listener.started(job.run, dataclasses.asdict(_resolved(job)), state.step)
            checkpoint.send_state(state, ranks)
            if ranks.leads:
                rows = measure_start(job, listener, before)
                if state.step == 0:
                    for name, row in zip(("native", "scaled"), rows, strict=True):
                        listener.measured(name, 0, row.row)
            train_run(job, state, rows and rows[1], listener)
        return finish(job, state, rows, listener, started) if rows else None


# ---------------------------------------------------------------------------------------------------
# Open


@contextlib.contextmanager
def open_run(job: Job) -> Iterator[None]:
    """Make the run directory, and keep other processes out of it while the block runs."""
    root = job.run.root
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        check_output(job.config, job.run)  # again: another process may have written here since the plan
        yield


def resume(job: Job, state: TrainState, listener: Listener) -> None:
    """With --resume, load the newest undamaged checkpoint; a run without a checkpoint starts again."""
    sweep(job.run.checkpoints)
    if not job.config.resume or not checkpoint.list_checkpoints(job.run.checkpoints):
        return
    for line in checkpoint.load_newest(job.run.checkpoints, state, job.identity):
        listener.say(line)
    listener.say(f"resuming after step {state.step} of {job.schedule.steps}")


def clear(job: Job, state: TrainState) -> None:
    """Remove the files of an earlier run, and lines of steps after the checkpoint; write config.yaml and base/."""
    run = job.run
    with disk_errors(run.root):
        if not job.config.resume:
            remove_run(run)
        with new_file(run.config) as file:
            file.write_text(to_yaml(_resolved(job)), encoding="utf-8")
        run.checkpoints.mkdir(exist_ok=True)
        sweep(run.root)
        if read_before(job.run, job.measured_on) is None:  # the rows belong to other weights or to another text
            for file in (run.evaluations, run.results, run.report, run.report_markdown):
                file.unlink(missing_ok=True)
        for lines in (run.metrics, run.evaluations):
            _drop_lines_after(lines, state.step)
    write_base(job.pair, run.base)


def remove_run(run: RunDir) -> None:
    """Remove the files of an earlier run, by name, its models first: they must not look like the new run's models."""
    for folder in (run.model, run.adapters, run.base, run.items, run.logs, *checkpoint.list_all(run.checkpoints)):
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
    for file in (
        run.results,
        run.report,
        run.report_markdown,
        run.metrics,
        run.before,
        run.evaluations,
        run.held_out,
        run.held_out_tokens,
    ):
        file.unlink(missing_ok=True)


def _resolved(job: Job) -> DistillConfig:
    """The options with every size and the model's path filled in."""
    return dataclasses.replace(
        job.config,
        model=str(job.pair.path),
        seq_len=job.sizing.seq_len,
        grad_accum=job.sizing.grad_accum,
        steps=job.schedule.steps,
        learning_rate=job.schedule.learning_rate,
        tokens=None,
        resume=False,
        overwrite=False,
        eval_tokens=job.sizing.eval_tokens,
        long_seq_len=job.sizing.long_seq_len or None,
    )


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`; the steps after it are made again, and so are their lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(UserError, KeyError, TypeError):
            if parse_json(line, str(path))["step"] <= step:
                kept.append(line)
    with new_file(path) as file:
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------
# Measure


def measure_start(job: Job, listener: Listener, before: Rows | None) -> Rows:
    """The rows of native and scaled before training (the adapters add nothing yet).

    A resumed run reads the rows from its files if the weights and the held-out text are the same.

    Raises:
        UserError: a number is not finite.
    """
    if job.config.resume and (saved := read_before(job.run, job.measured_on)):
        return saved
    kept = Kept.of_user()
    if before is None and kept and (before := read_kept(kept, job)):
        listener.say("native and scaled were measured before, on the same weights and text: read from the cache")
    native, scaled = before or measure(
        job.pair,
        job.text.held_out,
        native=True,
        workspace_bytes=job.workspace_bytes,
        progress=listener.counter("measuring native and scaled"),
    )
    check_row("native", native)
    check_row("scaled", scaled)
    native = sampled(job, native, job.pair.teacher)
    scaled = sampled(job, scaled, job.pair.student)
    write_pieces(job.run.held_out, {"native": native.pieces, "scaled": scaled.pieces})
    write_windows(job.run.held_out_tokens, job.text.held_out)
    rows = {"native": native.row, "scaled": scaled.row}
    store.write_results(job.run.before, Results(rows, other={MEASURED_ON: job.measured_on}))
    if kept:
        pieces = {"native": native.pieces, "scaled": scaled.pieces}
        kept.write(job.measured_with, {"rows": Results(rows).as_json(), "pieces": pieces})
    return native, scaled


def sampled(job: Job, row: Fidelity, model: Any) -> Fidelity:
    """`row` with what the model writes after the start of the first held-out window, if it has nothing yet."""
    if row.sample:
        return row
    return dataclasses.replace(row, sample=write(job.pair, model, next(iter(job.text.held_out.values()))[0]))


def check_row(name: str, row: Fidelity) -> None:
    """UserError if a number of a row is not finite: no training starts from such a model."""
    numbers = [*row.perplexity.values(), 0.0 if row.kl is None else row.kl]
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(
            f"the {name} model computes numbers that are not finite on the held-out text: "
            "try --dtype float32, or check the model and the text"
        )


def read_before(run: RunDir, measured_on: str) -> Rows | None:
    """The rows of native and scaled that a run has measured on the same weights and text; None if it has not."""
    try:
        before, pieces = store.read_results(run.before), read_pieces(run.held_out)
    except UserError:  # damaged: they are measured again
        return None
    return _rows_of(before.rows, pieces) if before.other.get(MEASURED_ON) == measured_on else None


def read_kept(kept: Kept, job: Job) -> Rows | None:
    """The rows of native and scaled that another run has measured on the same; None if none has."""
    value = kept.read(job.measured_with)
    try:
        at = Field(kept.folder)
        entries = at.mapping(value)
        return _rows_of(Results.from_json(entries.get("rows"), at).rows, pieces_of(entries.get("pieces"), at))
    except UserError:  # there is none, or it is damaged
        return None


def _rows_of(rows: Mapping[str, Row], pieces: Mapping[str, Pieces]) -> Rows | None:
    if not {"native", "scaled"} <= rows.keys() & pieces.keys():
        return None
    native, scaled = (Fidelity.of_row(rows[name], pieces[name]) for name in ("native", "scaled"))
    return native, scaled


# ---------------------------------------------------------------------------------------------------
# Finish


def finish(job: Job, state: TrainState, before: Rows, listener: Listener, started: float) -> Result:
    """Choose the state to keep, export it, verify the export, and write results.json and the report."""
    native, scaled = before
    restored, exported_step = choose_state(job, state, scaled, listener)
    restored = sampled(job, restored, job.pair.student)
    listener.measured("restored", state.step, restored.row)
    verified = export(job, listener)
    seconds = time.perf_counter() - started
    rows = {"native": native, "scaled": scaled, "restored": restored}
    write_pieces(job.run.held_out, {name: row.pieces for name, row in rows.items()})
    result = Result(
        job.run, native, scaled, restored, verified, seconds, exported_step, state.step, state.guard.skipped
    )
    write_results(job, rows, result)
    write_report(job.run.root)
    update_card(job.run.root)
    verified.check(job.run.model)  # after the results and the report, which do not depend on the export
    return result


def choose_state(job: Job, state: TrainState, scaled: Fidelity, listener: Listener) -> tuple[Fidelity, int]:
    """Put the state that --keep asks for into the student; returns its row and its step."""
    job.pair.set_parameters(state.parameters)
    row, best = measure_restored(job, listener), state.best
    if job.config.keep == "last" or best is None or job.score(row) <= best.score:
        return row, state.step
    try:
        parameters = checkpoint.parameters(checkpoint.path_of(job.run.checkpoints, best.step), state)
    except checkpoint.DamagedCheckpoint as error:
        listener.say(f"the state after step {best.step} is better on held-out text, but {error}: the last is exported")
        return row, state.step
    listener.say(f"the state after step {best.step} is better than the last on held-out text, and is exported")
    job.pair.set_parameters(parameters)
    return (measure_restored(job, listener) if best.step else scaled), best.step


def measure_restored(job: Job, listener: Listener) -> Fidelity:
    """The row of the student as it is."""
    return measure(
        job.pair,
        job.text.held_out,
        native=False,
        workspace_bytes=job.workspace_bytes,
        progress=listener.counter("measuring restored"),
    )[1]


def export(job: Job, listener: Listener) -> Verified:
    """Write adapters and fused model, then load the model as mlx-lm does and compare; return how far they differ."""
    run, pair = job.run, job.pair
    listener.say("exporting")
    sample = next(iter(job.text.held_out.values()))[0][:VERIFY_TOKENS]
    expected = student_logits(pair.student, sample)
    note = {"model": str(run.base.resolve()), "linearard": {"method": job.config.method, "factor": job.config.factor}}
    write_adapters(pair, run.adapters, note)
    write_fused(pair, run.model)
    del pair.teacher, pair.student
    verified = verify_export(run.model, sample, expected)
    if verified.note:
        listener.say(f"verifying the export: {verified.note}")
    return verified


def write_results(job: Job, rows: dict[str, Fidelity], result: Result) -> None:
    """results.json: the rows, the verification and the facts of the run."""
    info = RunInfo(
        method=job.config.method,
        factor=job.config.factor,
        objective=job.config.objective,
        long_weight=job.config.long_weight,
        valid_data=job.config.valid_data,
        native_window=job.pair.native_window,
        training_tokens=(job.sizing.tokens_per_step + job.sizing.long_seq_len) * result.steps,
        steps=result.steps,
        skipped_steps=result.skipped,
        exported_step=result.exported_step,
        seconds=round(result.seconds, 1),
        machine=job.machine.name,
        processes=job.ranks.size,
        text=job.text.kinds,
        versions={"mlx_linearard": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")},
    )
    export = ExportInfo(**dataclasses.asdict(result.export))
    models = {name: row.row for name, row in rows.items()}
    store.write_results(job.run.results, Results(models, export=export, run=info))
