"""The entries of results.json about the run itself: how it was made, and how far the export is from the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .fields import Field, Json, optional, other_entries, present


@dataclass(frozen=True)
class RunInfo:
    """How a run was made; every entry may be missing. `other` has entries that are only kept for the reader."""

    method: str | None = None
    factor: float | None = None
    objective: str | None = None
    native_window: int | None = None  # tokens
    training_tokens: int | None = None
    steps: int | None = None
    skipped_steps: int | None = None  # by the guard
    exported_step: int | None = None  # the step whose state was exported; 0 is the start
    seconds: float | None = None
    machine: str | None = None
    processes: int | None = None
    versions: Mapping[str, str] | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> Json:
        known = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "other"}
        return {**present(**known), **self.other}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> RunInfo:
        entries = at.mapping(value)
        read: dict[str, Callable[[Any], Any]] = {
            **{name: (at / name).text for name in ("method", "objective", "machine")},
            **{name: (at / name).number for name in ("factor", "seconds")},
            **{
                name: (at / name).count
                for name in (
                    "native_window",
                    "training_tokens",
                    "steps",
                    "skipped_steps",
                    "exported_step",
                    "processes",
                )
            },
            "versions": (at / "versions").mapping,
        }
        known = {name: optional(reader, entries.get(name)) for name, reader in read.items()}
        return cls(**known, other=other_entries(entries, list(read)))


@dataclass(frozen=True)
class ExportInfo:
    """How far the exported model is from the trained one, on one sample of `tokens` tokens.

    max_difference: of the logits. kl: in nats per token, at most `tolerance`. Both are None if they are not finite.
    unstable: the sides that gave different logits when computed again. `other` is only kept for the reader.
    """

    max_difference: float | None = None
    kl: float | None = None
    tokens: int | None = None
    tolerance: float | None = None
    unstable: Sequence[str] = ()
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the export was verified and is not what was trained."""
        return self.tolerance is not None and (self.kl is None or not self.kl <= self.tolerance)

    def as_json(self) -> Json:
        numbers = {"max_difference": self.max_difference, "kl": self.kl}
        return {
            **{name: value for name, value in numbers.items() if value is not None and math.isfinite(value)},
            **present(tokens=self.tokens, tolerance=self.tolerance),
            "unstable": list(self.unstable),
            **self.other,
        }

    @classmethod
    def from_json(cls, value: Any, at: Field) -> ExportInfo:
        entries = at.mapping(value)
        numbers = ("max_difference", "kl", "tolerance")
        unstable = (at / "unstable").items(entries.get("unstable", []))
        return cls(
            **{name: optional((at / name).number, entries.get(name)) for name in numbers},
            tokens=optional((at / "tokens").count, entries.get("tokens")),
            unstable=tuple((at / "unstable").text(side) for side in unstable),
            other=other_entries(entries, [*numbers, "tokens", "unstable"]),
        )
