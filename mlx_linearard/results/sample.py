"""The text that a model writes after a prompt, as results.json has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .fields import Field, Json


@dataclass(frozen=True)
class Sample:
    """A model's most likely continuation `text` of `prompt`, one token after the other."""

    prompt: str
    text: str

    def as_json(self) -> Json:
        return {"prompt": self.prompt, "text": self.text}

    @classmethod
    def from_json(cls, value: Any, at: Field) -> Sample:
        entries = at.mapping(value)
        return cls((at / "prompt").text(entries.get("prompt")), (at / "text").text(entries.get("text")))
