"""The other numbers of a run: its steps (metrics.jsonl) and its held-out text piece by piece (held_out.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import parse_json, read_json, read_text, write_json, write_text
from .fields import Field, exists, is_whole, shown
from .rows import Training

MAX_SAMPLE = 1e9  # nats; statistics add and square these numbers
Pieces = Mapping[str, Mapping[str, float]]  # metric -> piece, named LENGTH/WINDOW/PIECE -> mean over its tokens


@dataclass(frozen=True)
class Step:
    """One line of metrics.jsonl. loss is None if it is not a finite number; memory is the peak, in GB."""

    step: int
    loss: float | None
    memory: float
    tokens: int = 0
    seconds: float = 0.0


def read_steps(path: Path) -> list[Step]:
    """metrics.jsonl; [] if there is no such file. A last line without a line break is incomplete and left out."""
    if not exists(path):
        return []
    lines = read_text(path).split("\n")[:-1]
    return [_step(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _step(path: Path, number: int, line: str) -> Step:
    name = f"line {number}"
    at = Field(path, name)
    try:
        record = parse_json(line, f"{path} {name}")
    except UserError as error:
        raise UserError(f"{error}: fix or delete the line") from None
    if not isinstance(record, dict) or not {"step", "loss", "peak_memory_gb"} <= record.keys():
        raise UserError(f"{path} {name} is not a valid step record: fix or delete it")
    return Step(
        (at / "step").count(record["step"]),
        None if record["loss"] is None else (at / "loss").number(record["loss"]),
        (at / "peak_memory_gb").number(record["peak_memory_gb"]),
        (at / "tokens").count(record.get("tokens", 0)),
        (at / "seconds").number(record.get("seconds", 0.0)),
    )


def training_of(steps: Sequence[Step]) -> Training:
    """Tokens, time and peak memory of `steps`, of which there is at least one."""
    tokens, seconds = sum(step.tokens for step in steps), sum(step.seconds for step in steps)
    return Training(
        tokens, round(seconds, 1), round(tokens / seconds, 2) if seconds else 0.0, max(step.memory for step in steps)
    )


def read_pieces(path: Path) -> dict[str, Pieces]:
    """held_out.json, by model; {} if there is no such file."""
    if not exists(path):
        return {}
    return pieces_of(read_json(path), Field(path))


def pieces_of(value: Any, at: Field) -> dict[str, Pieces]:
    """The pieces by model of a JSON value; UserError if it is not valid."""
    return {model: _metrics(at / model, metrics) for model, metrics in at.mapping(value).items()}


def _metrics(at: Field, value: Any) -> Pieces:
    return {metric: _samples(at / metric, pieces) for metric, pieces in at.mapping(value).items()}


def _samples(at: Field, value: Any) -> dict[str, float]:
    pieces = at.mapping(value)
    for piece in pieces:
        parts = piece.split("/")
        if len(parts) != 3 or not all(map(is_whole, parts)):
            at.fail(f"has the key {shown(piece)} instead of LENGTH/WINDOW/PIECE")
    return {piece: (at / piece).number(number, MAX_SAMPLE) for piece, number in pieces.items()}


def write_pieces(path: Path, models: Mapping[str, Pieces]) -> None:
    """Replace held_out.json, completely or not at all."""
    write_json(path, models)


def write_windows(path: Path, windows: Mapping[int, np.ndarray]) -> None:
    """held_out_tokens.json: the held-out text by length, windows (n, length + 1) of token ids."""
    write_text(path, json.dumps({str(length): ids.tolist() for length, ids in windows.items()}) + "\n")


def read_windows(path: Path) -> dict[int, np.ndarray]:
    """The windows (n, length + 1) int32 by length; {} if there is no such file, as in runs of earlier versions."""
    if not exists(path):
        return {}
    found = {}
    for length, rows in Field(path).by_length(read_json(path)).items():
        at = Field(path) / length
        ids = [[at.count(token) for token in at.items(row)] for row in at.items(rows)]
        if not ids or any(len(row) != length + 1 for row in ids) or max(map(max, ids)) >= 1 << 31:
            at.fail(f"must hold windows of {length + 1} token ids")
        found[length] = np.array(ids, np.int32)
    return found
