"""The guard: which steps are not taken, how far the learning rate is lowered, and when a run has to stop.

A step is bad where its loss or gradient is not finite, or its loss is above the bound:

    bound = RATIO x the lowest value that the median of the last RECENT good losses has had

The median keeps single outliers out, and its lowest value stops a slow climb, which the median alone would
follow. (Of 60 steps of a single block of 128 tokens, the noisiest kind, none was above 2.0 times that value.)

No update of a bad step is made, and the learning rate is lowered by BACKOFF. A loss above the bound says that
the weights are bad already, and so does a second bad step in a row: then weights and optimizer go back to those
of the last good loss. A single loss that is not finite says no more than that its batch is bad, and costs that
one step.

After RECOVERY good steps in a row one lowering is taken back. A run stops at the first bad step with LIMIT
lowerings in force: by then the rate is 2^-LIMIT of what was asked for, and it is not the rate.
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
    """What the guard remembers; it is part of a checkpoint, so that a resumed run judges as the whole one."""

    recent: list[float] = field(default_factory=list)  # good losses, the newest last
    lowest: float = 0.0  # of their medians so far; without meaning before the first
    lowered: int = 0  # times that the rate is lowered now
    quiet: int = 0  # good steps since the last bad one
    suspect: bool = False  # the step before was bad
    skipped: int = 0  # bad steps in all
    exhausted: bool = False  # a bad step although the rate had been lowered LIMIT times: the run has to stop

    @property
    def factor(self) -> float:
        """What the scheduled learning rate is multiplied by."""
        return BACKOFF**self.lowered

    @property
    def bound(self) -> float:
        """The loss above which a step is bad; infinite before the first good one."""
        return RATIO * self.lowest if self.recent else math.inf

    def complaint(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss and gradient is bad, or None."""
        if not math.isfinite(loss):
            return "loss not finite"
        if loss > self.bound:
            return f"loss {loss:.4g} above {self.bound:.4g}"
        return None if math.isfinite(grad_norm) else "gradient not finite"

    def accept(self, loss: float) -> None:
        """A good step's loss."""
        known = [self.lowest] if self.recent else []
        self.recent = [*self.recent, loss][-RECENT:]
        self.lowest = min([statistics.median(self.recent), *known])
        self.suspect = False
        self.quiet += 1
        if self.lowered and self.quiet >= RECOVERY:
            self.lowered, self.quiet = self.lowered - 1, 0

    def reject(self, loss: float) -> bool:
        """A bad step, with its loss; whether the weights have to go back to those of the last good loss."""
        back = self.suspect or (math.isfinite(loss) and loss > self.bound)
        self.exhausted = self.lowered >= LIMIT
        self.lowered = min(LIMIT, self.lowered + 1)
        self.suspect, self.quiet = True, 0
        self.skipped += 1
        return back

    def as_json(self) -> dict[str, Any]:
        """All of it, for a checkpoint; a resumed run gets one more try."""
        return {**dataclasses.asdict(self), "exhausted": False}

    @classmethod
    def from_json(cls, value: Any) -> Guard:
        """The inverse of `as_json`; ValueError where `value` is something else."""
        like = cls()
        names = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            raise ValueError("not a guard's state")
        for name, kind in ((name, type(getattr(like, name))) for name in names):
            if type(value[name]) is not kind:
                raise ValueError(f"{name} must be a {kind.__name__}")
        if not all(type(loss) is float and math.isfinite(loss) for loss in [*value["recent"], value["lowest"]]):
            raise ValueError("a good loss is a finite number")
        if not 0 <= value["lowered"] <= LIMIT:
            raise ValueError(f"the rate is lowered at most {LIMIT} times")
        return cls(**value)
