"""The entries of results.json about the run itself: how it was made, and how far the export is from the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..data import PROSE, TEXT
from .fields import Field, Json, optional, other_entries, present


@dataclass(frozen=True)
class TextInfo:
    """The kinds of documents (see data/rows.py) that were trained on and held out.

    chat_model: whether the model's tokenizer has a chat template.
    """

    trained: Sequence[str] = ()
    held_out: Sequence[str] = ()
    chat_model: bool = False

    @property
    def words(self) -> str:
        """Which kind of text was trained and measured, as a sentence."""
        return f"Trained on {' and '.join(self.trained)}; the held-out text is {' and '.join(self.held_out)}."

    @property
    def warning(self) -> str | None:
        """What is unknown of a chat model that has read no conversation; None if nothing is."""
        if not self.chat_model or not {*self.trained} <= {PROSE, TEXT}:
            return None
        return (
            "The model has a chat template, and no conversation is trained on: what scaling costs in conversations is "
            "not restored on purpose, and not measured. Rows with `messages` in --data do both."
        )

    @classmethod
    def from_json(cls, value: Any, at: Field) -> TextInfo:
        entries = at.mapping(value)
        kinds = {
            name: tuple((at / name).text(kind) for kind in (at / name).items(entries.get(name, [])))
            for name in ("trained", "held_out")
        }
        return cls(**kinds, chat_model=entries.get("chat_model") is True)


@dataclass(frozen=True)
class RunInfo:
    """How a run was made; every entry may be missing. `other` has entries that are only kept for the reader."""

    method: str | None = None
    factor: float | None = None
    objective: str | None = None
    long_weight: float | None = None  # of the long part of every step; 0 without one
    valid_data: str | None = None  # the source of held-out text, if it has one of its own
    native_window: int | None = None  # tokens
    training_tokens: int | None = None
    steps: int | None = None
    skipped_steps: int | None = None  # by the guard
    exported_step: int | None = None  # the step whose state was exported; 0 is the start
    seconds: float | None = None
    machine: str | None = None
    processes: int | None = None
    versions: Mapping[str, str] | None = None
    text: TextInfo | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> Json:
        known = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "other"}
        text = None if self.text is None else asdict(self.text)
        return {**present(**{**known, "text": text}), **self.other}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> RunInfo:
        entries = at.mapping(value)
        read: dict[str, Callable[[Any], Any]] = {
            **{name: (at / name).text for name in ("method", "objective", "machine", "valid_data")},
            **{name: (at / name).number for name in ("factor", "seconds", "long_weight")},
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
            "text": lambda value: TextInfo.from_json(value, at / "text"),
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
