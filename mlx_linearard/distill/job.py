"""A run that is ready to start, and what it tells while it goes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DistillConfig
from ..data import Blocks, hash_of
from ..distributed.ranks import ALONE, Ranks
from ..distributed.watchdog import BEGIN
from ..evaluate.held_out import Fidelity, measure
from ..files import RunDir
from ..machine import Machine
from ..models.pair import Pair
from . import checkpoint
from .best import reference_length, score
from .objective import Objective
from .plan import Sizing
from .step import Schedule, StepRecord, TrainState


class Listener:
    """What a run tells while it goes; a command prints it, a function call may ignore it."""

    def say(self, text: str) -> None:
        """A line on what is happening."""

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        """A part of something long is done."""

    def step(self, record: StepRecord, total: int) -> None:
        """An optimizer step is done."""


@dataclass
class Job:
    """A run that is ready to start: everything checked and loaded, nothing written yet."""

    config: DistillConfig
    pair: Pair
    objective: Objective
    schedule: Schedule
    blocks: Blocks
    held_out: dict[int, np.ndarray]
    run: RunDir
    sizing: Sizing
    machine: Machine
    identity: dict[str, Any]
    ranks: Ranks = ALONE
    _saving: threading.Lock = field(default_factory=threading.Lock)

    @property
    def workspace_bytes(self) -> int:
        return self.config.workspace << 20

    @property
    def reference(self) -> int:
        """The length at which states are compared."""
        return reference_length(self.held_out, self.pair.native_window)

    @property
    def compared_on(self) -> str:
        """A hash of the windows on which states are compared."""
        return hash_of(self.held_out[self.reference])

    def score(self, row: Fidelity) -> float:
        """A student's row as one number; lower is better."""
        return score(row, self.config.objective, self.reference)

    def measure(self, state: TrainState) -> Fidelity:
        """The row of a state, at the length where states are compared."""
        self.pair.set_parameters(state.parameters)
        windows = {self.reference: self.held_out[self.reference]}
        return measure(self.pair, windows, native=False, workspace_bytes=self.workspace_bytes)[1]

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of this run; its directory."""
        with self._saving:
            return checkpoint.save(self.run.checkpoints, state, self.identity, self.config.keep_checkpoints)

    def rescue(self, state: TrainState) -> None:
        """Write a checkpoint where there is none of this state; for another thread than the run's."""
        with self._saving:
            if not checkpoint.path_of(self.run.checkpoints, state.step).exists():
                checkpoint.save(self.run.checkpoints, state, self.identity, self.config.keep_checkpoints)

    def way_on(self) -> str:
        """How a run that has lost a process is gone on with."""
        again = "go on with the same command and --resume"
        if saved := checkpoint.found(self.run.checkpoints):
            return f"the state after step {checkpoint.step_of(saved[-1])} is in {saved[-1]}: {again}"
        if self.run.config.exists():
            return f"no step was saved: {again}"
        return BEGIN if self.ranks.leads else f"what is saved lies with the first process: {again}"
