"""The training loop: the remaining steps of a run, and what is logged, evaluated and saved between them."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

from ..config import DistillConfig
from ..errors import UserError
from ..evaluate.held_out import Fidelity
from ..files import disk_errors
from .best import judge
from .gradient import Gradients
from .interrupt import SIGNALS, Request, stop_requests
from .listener import Listener
from .prepare import Job
from .step import StepRecord, TrainState, train


def train_run(job: Job, state: TrainState, scaled: Fidelity | None, listener: Listener) -> None:
    """Train until the last step. Then `state` is the last state, and checkpoints hold the last and the best state.

    All ranks train. Only the first rank logs, evaluates and saves, and needs `scaled`, the row of the start.

    Raises:
        KeyboardInterrupt: a signal asked a rank to stop; the state is saved.
        UserError: the guard gives up, and the state is saved; or the disk is full.
    """
    ranks, rescue, first = job.ranks, _Rescue(job), state.step
    # mlx.launch sends SIGTERM to ranks that still save when others have stopped, so there only Ctrl-C counts twice.
    hurried = SIGNALS if ranks.size == 1 else (signal.SIGINT,)
    stops = stop_requests(hurried, lambda: listener.stopping(min(state.step + 1, job.schedule.steps)))
    with ranks.on_loss(job.how_to_continue, rescue.save), stops as stop:
        if ranks.leads:
            ensure_best(job, state, scaled)
            save_if_due(job, state, improved=evaluate_if_due(job, state, listener))
        if not ranks.any(out_of_patience(job, state, listener)):
            gradients_of = Gradients(job.pair)
            if gradients_of.compiles:
                listener.say("compiling the step: the first one takes some seconds longer, minutes on a new machine")
            of_job = (job.pair, job.objective, job.schedule, job.blocks, state, ranks, job.long)
            for record in train(*of_job, gradients_of):
                if gradients_of.failure and record.step == first + 1:
                    listener.say(f"steps are not compiled on this machine: {gradients_of.failure}")
                if ranks.leads:
                    log(job, record, listener)
                    rescue.keep(state)
                    check_guard(job, state, record, listener)
                stop_if_asked(job, state, stop, listener)
                if not is_due(job.config, state.step):
                    continue
                if ranks.leads:
                    save_if_due(job, state, improved=evaluate_if_due(job, state, listener))
                if ranks.any(out_of_patience(job, state, listener)):
                    break
        if ranks.leads:
            job.save(state)


class _Rescue:
    """The state after the last logged step, which another thread saves if a rank is lost."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state: TrainState | None = None

    def keep(self, state: TrainState) -> None:
        if self.job.ranks.size > 1:
            self.state = state.frozen()

    def save(self) -> None:
        if self.state is not None:
            self.job.save_if_missing(self.state)


# ---------------------------------------------------------------------------------------------------
# After each step


def log(job: Job, record: StepRecord, listener: Listener) -> None:
    """Add a step to metrics.jsonl and report it."""
    with disk_errors(job.run.metrics):
        append_line(job.run.metrics, record.as_json())
    listener.step(record, job.schedule.steps)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add a JSON line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, allow_nan=False) + "\n")


def finite_json(value: Any) -> Any:
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_guard(job: Job, state: TrainState, record: StepRecord, listener: Listener) -> None:
    """Report a skipped step; UserError, after saving, if the guard gives up."""
    if record.skipped is None:
        return
    if state.guard.exhausted:
        raise UserError(
            f"step {record.step}: {record.skipped}, although the guard has lowered the learning rate to "
            f"{record.learning_rate:.2g}; the last good state is saved in {job.save(state)}: start again "
            f"(--overwrite) with a lower --learning-rate than {job.schedule.learning_rate:g}, with --dtype "
            "float32, or with other --data"
        )
    listener.say(
        f"step {record.step}: {record.skipped}; no update is made, and the learning rate is lowered to "
        f"{record.rate_factor:g} of the scheduled one"
    )


def stop_if_asked(job: Job, state: TrainState, stop: Request, listener: Listener) -> None:
    """Save and raise KeyboardInterrupt, at all ranks, if a signal asked any rank to stop."""
    if not job.ranks.any(stop.requested):
        return
    if job.ranks.leads:
        saved = job.save(state)
        listener.say(f"stopped after step {state.step}, saved in {saved}; continue with the same command and --resume")
    job.ranks.wait()
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------
# Evaluations and checkpoints


def is_due(config: DistillConfig, step: int) -> bool:
    """Whether an evaluation or a checkpoint is due after `step` steps."""
    return _is_multiple(step, config.eval_every) or step == 0 or _is_multiple(step, config.save_every)


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def ensure_best(job: Job, state: TrainState, scaled: Fidelity | None) -> None:
    """If there is no best state on the present held-out text, make the present state the best one."""
    if state.best is None or state.best.text != job.compared_on:
        state.best = None
        assert scaled is not None
        judge(state, job.score(job.measure(state) if state.step else scaled), job.compared_on)


def evaluate_if_due(job: Job, state: TrainState, listener: Listener) -> bool:
    """Evaluate the state if --eval-every asks for it, and log the row; return whether the state is the best so far."""
    assert state.best is not None
    if not _is_multiple(state.step, job.config.eval_every) or state.best.evaluated == state.step:
        return False
    row = job.measure(state)
    improved = judge(state, job.score(row), job.compared_on)
    with disk_errors(job.run.evaluations):
        append_line(job.run.evaluations, finite_json({"step": state.step, **row.as_json()}))
    if row.kl is None or row.agreement is None:
        text = f"perplexity {row.perplexity[job.reference]:.2f}"
    else:
        text = f"KL to the teacher {row.kl:.4f}, top-1 agreement {row.agreement:.1%}"
    listener.measured("evaluation", state.step, row.row)
    listener.say(f"after step {state.step}: {text}{', the best so far' if improved else ''}")
    return improved


def save_if_due(job: Job, state: TrainState, *, improved: bool) -> None:
    """Save the state if it is the best so far, or if --save-every asks for a checkpoint that does not exist yet."""
    due = state.step == 0 or _is_multiple(state.step, job.config.save_every)
    if improved or (due and not job.has_checkpoint(state.step)):
        job.save(state)


def out_of_patience(job: Job, state: TrainState, listener: Listener) -> bool:
    """Whether --patience ends the run here; the first rank decides, and reports it."""
    if not job.ranks.leads or not job.config.patience:
        return False
    assert state.best is not None
    if state.best.misses < job.config.patience:
        return False
    listener.say(
        f"stopping after step {state.step}: {state.best.misses} evaluations since step {state.best.step} were no better"
    )
    return True
