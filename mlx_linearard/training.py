"""A run's training: the steps that are left, and what is told, measured and saved between them."""

from __future__ import annotations

import json

from . import checkpoint
from .errors import UserError
from .evaluate.fidelity import Fidelity
from .files import disk_errors
from .interrupt import between_steps
from .job import Job, Listener
from .selection import judge
from .trainer import StepRecord, TrainState, train


def train_run(job: Job, state: TrainState, scaled: Fidelity, listener: Listener) -> None:
    """All steps that are left; afterwards `state` is the last one, and checkpoints hold it and the best.

    `scaled` is the row of the start. Raises KeyboardInterrupt, after saving, where somebody asked to stop, and
    UserError where the guard gives up, also after saving, or the disk is full.
    """
    if state.best is None or state.best.text != job.compared_on:
        state.best = None  # the start; or, where a run goes on with other held-out text, what it goes on from
        judge(state, job.score(job.measure(state) if state.step else scaled), job.compared_on)
    with disk_errors(job.run.root):
        _steps(job, state, listener)


def _steps(job: Job, state: TrainState, listener: Listener) -> None:
    with job.run.metrics.open("a", encoding="utf-8") as metrics, between_steps() as stop:
        steps = train(job.pair, job.objective, job.schedule, job.blocks, state)
        enough = _milestone(job, state, listener)
        while not enough and (record := next(steps, None)):
            metrics.write(json.dumps(record.as_json()) + "\n")
            metrics.flush()
            listener.step(record, job.schedule.steps)
            if record.skipped:
                _skipped(job, state, record, listener)
            if stop.made:
                saved = job.save(state)
                listener.say(
                    f"stopped after step {state.step}, saved in {saved}; go on with the same command and --resume"
                )
                raise KeyboardInterrupt
            enough = _milestone(job, state, listener)
    job.save(state)


def _skipped(job: Job, state: TrainState, record: StepRecord, listener: Listener) -> None:
    """Tell what the guard did; UserError, after saving, where it has done enough."""
    if state.guard.exhausted:
        saved = job.save(state)
        raise UserError(
            f"step {record.step}: {record.skipped}, although the guard has lowered the learning rate to "
            f"{record.learning_rate:.2g}; the last good state is saved in {saved}: begin again (--overwrite) with a "
            f"lower --learning-rate than {job.schedule.learning_rate:g}, with --dtype float32, or with other --data"
        )
    listener.say(
        f"step {record.step}: {record.skipped}; no update is made, and the learning rate is lowered to "
        f"{record.rate_factor:g} of the scheduled one"
    )


def _milestone(job: Job, state: TrainState, listener: Listener) -> bool:
    """What is due after a step: an evaluation, a checkpoint. Whether --patience has run out."""
    config, improved = job.config, False
    assert state.best is not None
    if config.eval_every and state.step % config.eval_every == 0 and state.best.evaluated != state.step:
        improved = _evaluate(job, state, listener)
    due = state.step == 0 or (config.save_every and state.step % config.save_every == 0)
    if improved or (due and not checkpoint.path_of(job.run.checkpoints, state.step).exists()):
        job.save(state)
    best = state.best
    if not config.patience or best.misses < config.patience:
        return False
    listener.say(f"stopping after step {state.step}: {best.misses} evaluations since step {best.step} were no better")
    return True


def _evaluate(job: Job, state: TrainState, listener: Listener) -> bool:
    """Measure the state as it is and write it down; whether it is the best so far."""
    now = job.measure(state)
    improved = judge(state, job.score(now), job.compared_on)
    with job.run.evaluations.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": state.step, **now.as_json()}) + "\n")
    if now.kl is None or now.agreement is None:
        found = f"perplexity {now.perplexity[job.reference]:.2f}"
    else:
        found = f"KL to the teacher {now.kl:.4f}, agreement {now.agreement:.1%}"
    listener.say(f"after step {state.step}: {found}{', the best so far' if improved else ''}")
    return improved
