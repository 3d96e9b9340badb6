"""A run's training: the steps that are left, and what is told, measured and saved between them."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..evaluate.held_out import Fidelity
from ..files import disk_errors
from . import checkpoint
from .best import judge
from .interrupt import SIGNALS, between_steps
from .job import Job, Listener
from .step import Best, StepRecord, TrainState, train

T = TypeVar("T")


def train_run(job: Job, state: TrainState, scaled: Fidelity | None, listener: Listener) -> None:
    """All steps that are left; afterwards `state` is the last one, and checkpoints hold it and the best.

    `scaled` is the row of the start; of several ranks only the first needs it, which measures, writes and tells for
    all. Raises KeyboardInterrupt, after saving, where somebody asked any rank to stop, and UserError where the guard
    gives up, also after saving, or the disk is full.
    """
    run = _Run(job, state, listener)
    run.judge_start(scaled)
    with job.ranks.on_loss(job.way_on, run.rescue):
        run.steps()


class _Run:
    """A job, its state, and who listens, for as long as the steps go on."""

    def __init__(self, job: Job, state: TrainState, listener: Listener):
        self.job, self.state, self.listener = job, state, listener
        self.whole: TrainState | None = None  # as the last step that is in metrics.jsonl left it

    def at_first(self, body: Callable[[], T]) -> T:
        """The value (of JSON) that `body` has at the first rank, where it may write."""

        def writing() -> T:
            with disk_errors(self.job.run.root):
                return body()

        return self.job.ranks.from_first(writing)

    def append(self, path: Path, value: dict[str, Any]) -> None:
        """Add a line to a file of the run."""
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    def rescue(self) -> None:
        """Save the last whole state, where this rank saves; called from another thread."""
        if self.whole is not None:
            self.job.rescue(self.whole)

    # -----------------------------------------------------------------------------------------------
    # The loop

    def steps(self) -> None:
        """Steps to the end, or to the moment where they have to stop."""
        job, state, ranks = self.job, self.state, self.job.ranks
        # mlx.launch sends SIGTERM to those that are still saving when others have stopped.
        with between_steps(SIGNALS if ranks.size == 1 else (signal.SIGINT,)) as stop:
            steps = train(job.pair, job.objective, job.schedule, job.blocks, state, ranks)
            enough = self.milestone()
            while not enough and (record := next(steps, None)):
                self.at_first(lambda record=record: self.tell(record))  # type: ignore[misc]
                if any(ranks.gathered(lambda: stop.made)):
                    self.at_first(self.stop)
                    raise KeyboardInterrupt
                enough = self.milestone()
            self.at_first(self.save)

    def tell(self, record: StepRecord) -> None:
        """Write a step down, and tell what the guard did; UserError, after saving, where it has done enough."""
        self.append(self.job.run.metrics, record.as_json())
        if self.job.ranks.size > 1:
            self.whole = self.state.frozen()
        self.listener.step(record, self.job.schedule.steps)
        if record.skipped is None:
            return
        if self.state.guard.exhausted:
            raise UserError(
                f"step {record.step}: {record.skipped}, although the guard has lowered the learning rate to "
                f"{record.learning_rate:.2g}; the last good state is saved in {self.job.save(self.state)}: begin again "
                f"(--overwrite) with a lower --learning-rate than {self.job.schedule.learning_rate:g}, with --dtype "
                "float32, or with other --data"
            )
        self.listener.say(
            f"step {record.step}: {record.skipped}; no update is made, and the learning rate is lowered to "
            f"{record.rate_factor:g} of the scheduled one"
        )

    def save(self) -> None:
        """A checkpoint of the state as it is."""
        self.job.save(self.state)

    def stop(self) -> None:
        """A checkpoint, and how to go on from it."""
        saved = self.job.save(self.state)
        self.listener.say(
            f"stopped after step {self.state.step}, saved in {saved}; go on with the same command and --resume"
        )

    # -----------------------------------------------------------------------------------------------
    # Between steps

    def judge_start(self, scaled: Fidelity | None) -> None:
        """See that there is a best state: the start, or, where a run goes on with other held-out text, that."""
        job, state = self.job, self.state

        def judged() -> dict[str, Any]:
            if state.best is None or state.best.text != job.compared_on:
                state.best = None
                assert scaled is not None
                judge(state, job.score(job.measure(state) if state.step else scaled), job.compared_on)
            return self.best()

        state.best = Best(**job.ranks.from_first(judged))

    def best(self) -> dict[str, Any]:
        """The best state so far, as JSON."""
        assert self.state.best is not None
        return dataclasses.asdict(self.state.best)

    def milestone(self) -> bool:
        """What is due after a step: an evaluation, a checkpoint. Whether --patience has run out."""
        config, state = self.job.config, self.state
        assert state.best is not None
        evaluates = bool(config.eval_every) and state.step % config.eval_every == 0
        evaluates = evaluates and state.best.evaluated != state.step
        saves = state.step == 0 or (bool(config.save_every) and state.step % config.save_every == 0)
        if evaluates or saves:
            state.best = Best(**self.at_first(lambda: self.due(evaluates, saves)))
        misses = state.best.misses
        if not config.patience or misses < config.patience:
            return False
        self.listener.say(
            f"stopping after step {state.step}: {misses} evaluations since step {state.best.step} were no better"
        )
        return True

    def due(self, evaluates: bool, saves: bool) -> dict[str, Any]:
        """Evaluate and save; the best state, as JSON."""
        improved = evaluates and self.evaluate()
        missing = not checkpoint.path_of(self.job.run.checkpoints, self.state.step).exists()
        if improved or (saves and missing):
            self.save()
        return self.best()

    def evaluate(self) -> bool:
        """Measure the state as it is and write it down; whether it is the best so far."""
        job, state = self.job, self.state
        now = job.measure(state)
        improved = judge(state, job.score(now), job.compared_on)
        self.append(job.run.evaluations, {"step": state.step, **now.as_json()})
        if now.kl is None or now.agreement is None:
            found = f"perplexity {now.perplexity[job.reference]:.2f}"
        else:
            found = f"KL to the teacher {now.kl:.4f}, agreement {now.agreement:.1%}"
        self.listener.say(f"after step {state.step}: {found}{', the best so far' if improved else ''}")
        return improved
