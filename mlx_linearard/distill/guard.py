"""The guard: decides which updates are skipped, how far the learning rate is lowered, and when a run stops.

A step is bad if its loss or gradient is not finite, or its loss is above the bound:

    bound = RATIO x the lowest median so far of the last RECENT good losses

The median ignores single outliers. Its lowest value detects a slow climb, which the median alone would follow.
(Of 60 steps of a single block of 128 tokens, the noisiest kind, none was above 2.0 times this lowest median.)

A bad step makes no update, and it multiplies the learning rate by BACKOFF. A loss above the bound means that the
weights are bad already, and so does a second bad step in a row: the weights and the optimizer then return to
those of the last good loss. A single loss that is not finite means only that its batch is bad; it costs one step.

After RECOVERY good steps in a row, one lowering is undone. The run stops at the first bad step while LIMIT
lowerings are in force: the learning rate is then 2^-LIMIT of the requested one, so it is not the cause.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

RECENT = 16  # good losses
RATIO = 3.0
BACKOFF = 0.5
RECOVERY = 50  # steps
LIMIT = 8


@dataclass
class Guard:
    """The state of the guard. Checkpoints contain it, so a resumed run decides like an uninterrupted one."""

    recent: list[float] = field(default_factory=list)  # good losses in nats, the newest last
    lowest: float = 0.0  # the lowest median so far; without meaning before the first good loss
    lowered: int = 0  # lowerings of the learning rate in force
    quiet: int = 0  # good steps since the last bad one
    suspect: bool = False  # the last step was bad
    skipped: int = 0  # bad steps so far
    exhausted: bool = False  # a bad step with LIMIT lowerings in force: the run has to stop

    @property
    def factor(self) -> float:
        """The factor of the scheduled learning rate."""
        return BACKOFF**self.lowered

    @property
    def bound(self) -> float:
        """The loss, in nats, above which a step is bad; infinite before the first good step."""
        return RATIO * self.lowest if self.recent else math.inf

    def complaint(self, loss: float, grad_norm: float) -> str | None:
        """The reason why a step with this loss and gradient norm is bad, or None."""
        if not math.isfinite(loss):
            return "loss not finite"
        if loss > self.bound:
            return f"loss {loss:.4g} above {self.bound:.4g}"
        return None if math.isfinite(grad_norm) else "gradient not finite"

    def accept(self, loss: float) -> None:
        """Record the loss of a good step."""
        before = [self.lowest] if self.recent else []
        self.recent = [*self.recent, loss][-RECENT:]
        self.lowest = min([statistics.median(self.recent), *before])
        self.suspect = False
        self.quiet += 1
        if self.lowered and self.quiet >= RECOVERY:
            self.lowered, self.quiet = self.lowered - 1, 0

    def reject(self, loss: float) -> bool:
        """Record the loss of a bad step; return whether the weights must return to those of the last good loss."""
        back = self.suspect or (math.isfinite(loss) and loss > self.bound)
        self.exhausted = self.lowered >= LIMIT
        self.lowered = min(LIMIT, self.lowered + 1)
        self.suspect, self.quiet = True, 0
        self.skipped += 1
        return back

    def as_json(self) -> dict[str, Any]:
        """The state for a checkpoint; a resumed run may try once more."""
        return {**dataclasses.asdict(self), "exhausted": False}

    @classmethod
    def from_json(cls, value: Any) -> Guard:
        """The inverse of `as_json`; ValueError if `value` is something else."""
        example = cls()
        names = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            raise ValueError("not a guard's state")
        for name, kind in ((name, type(getattr(example, name))) for name in names):
            if type(value[name]) is not kind:
                raise ValueError(f"{name} must be a {kind.__name__}")
        if not all(type(loss) is float and math.isfinite(loss) for loss in [*value["recent"], value["lowest"]]):
            raise ValueError("a good loss is a finite number")
        if not 0 <= value["lowered"] <= LIMIT:
            raise ValueError(f"the rate is lowered at most {LIMIT} times")
        return cls(**value)
