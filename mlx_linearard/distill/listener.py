"""The events that a run reports. A command prints them; a function call may ignore them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..files import RunDir
from ..results.rows import Row
from .step import StepRecord


class Listener:
    """Receives the events of a run; this one ignores them."""

    def started(self, run: RunDir, config: Mapping[str, Any], step: int) -> None:
        """The run directory is open, with `config` as its config.yaml has it, and `step` steps are done already."""

    def say(self, text: str) -> None:
        """One line about what is happening."""

    def progress(self, label: str, done: int, total: int, note: str = "") -> None:
        """A part of a long piece of work is done: `done` of `total`."""

    def step(self, record: StepRecord, total: int) -> None:
        """An optimizer step is done, of `total` steps."""

    def measured(self, name: str, step: int, row: Row) -> None:
        """A model was measured on held-out text after `step` steps: native, scaled, evaluation or restored."""

    def stopping(self, step: int) -> None:
        """A signal asked the run to stop: it finishes step number `step` and saves. Comes from another thread."""

    def counter(self, label: str) -> Callable[[int, int], None]:
        """A function (done, total) that reports the progress of the work called `label`."""
        return lambda done, total: self.progress(label, done, total)
