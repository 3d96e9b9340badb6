"""The benchmark of a machine: the relation loss and the training step, in about five minutes.

The loss is measured with the same sizes as for the other machines in docs/measured.md. The step trains the model of the
demonstration. A measurement that would take too long on this machine is skipped, with a note.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import DistillConfig
from ..distill.timing import Clock
from ..errors import UserError
from ..files import read_config, write_json
from ..machine import Machine
from ..models.shape import Shape
from .measuring import fastest, file_name, relation_loss, student_and_teacher
from .series import Work, in_own_process

SECONDS = 300.0  # for the complete benchmark
LOSS_SHARE = 0.2  # the part of this time for the loss
LOSS_LENGTHS = (1024, 2048, 4096, 8192, 16384)
STEP_LENGTHS = (1024, 4096)
STEP_SERIES = {"last": "last", "logits": "logits", "mlx-lm": "mlx_lm.lora"}  # and how the table names them
WORKSPACE = 256 << 20
REPEATS = 2
FACTS = ("versions", "system", "device", "memory_gb", "matmul_gflops", "exp_ns", "self_test", "attention")  # no paths

Say = Callable[[str], None]


@dataclass(frozen=True)
class LossCase:
    """The sizes with which the loss is measured: as in the other figures of this kind of device."""

    heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, gpu: bool) -> LossCase:
        return cls(32, 128, "bfloat16") if gpu else cls(2, 64, "float32")


def benchmark(
    machine: Machine,
    facts: dict[str, Any],
    model: Path,
    *,
    say: Say,
    seconds: float = SECONDS,
    loss_lengths: Sequence[int] = LOSS_LENGTHS,
    step_lengths: Sequence[int] = STEP_LENGTHS,
) -> dict[str, Any]:
    """Measure, in about `seconds`; returns the values of the JSON file.

    Args:
        facts: what `examine` returns, for the file.
        model: the directory of the demonstration's model.
        say: called with one line per figure.
    """
    start = time.monotonic()
    loss = _said(loss_rows(LossCase.of(machine.gpu), loss_lengths, LOSS_SHARE * seconds), say)
    step: list[dict[str, Any]] = []
    for number, series in enumerate(STEP_SERIES):
        left = seconds - (time.monotonic() - start)
        share = left / (len(STEP_SERIES) - number)
        step += _said(step_rows(machine, model, series, step_lengths, share), say)
    return {
        **{name: facts[name] for name in FACTS},
        "model": model.name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(time.monotonic() - start, 1),
        "loss": loss,
        "step": step,
    }


def _said(rows: Iterator[dict[str, Any]], say: Say) -> list[dict[str, Any]]:
    """The rows as a list; each is reported as soon as it is measured."""
    found = []
    for row in rows:
        found.append(row)
        say(f"{row['series']}, {row['length']} tokens: {row.get('note') or cell(row)}")
    return found


def loss_rows(case: LossCase, lengths: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """A row per length of the relation loss with its gradient; a length that would take too long gets a note."""
    end, took, last = time.monotonic() + seconds, 0.0, 1
    for length in lengths:
        row: dict[str, Any] = {
            "series": "loss",
            "length": length,
            "heads": case.heads,
            "head_dim": case.head_dim,
            "dtype": case.dtype,
            "workspace_mb": WORKSPACE >> 20,
        }
        expected = took * (length / last) ** 2
        if time.monotonic() + expected > end:
            yield {**row, "note": f"skipped: it would take about {expected:.0f} s"}
            continue
        start = time.monotonic()
        inputs = student_and_teacher((1, case.heads, length, case.head_dim), getattr(mx, case.dtype))
        best, extra = fastest(relation_loss(WORKSPACE), inputs, REPEATS, inputs[0].nbytes)
        took, last = time.monotonic() - start, length
        yield {**row, "seconds": round(best, 5), "extra_mb": round(extra * 2**20 / 1e6, 1)}


def step_rows(
    machine: Machine, model: Path, series: str, lengths: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """A row per length of one series of steps, or a note if the step would take too long on this machine."""
    dtype = None if machine.gpu else "float32"
    # A CPU compiles nothing, so its first step is measured.
    work = Work(series, str(model), model.name, tuple(lengths), steps=REPEATS if machine.gpu else 0, dtype=dtype)
    clock = Clock(Shape.of(read_config(model)), machine, DistillConfig(objective=_objective(series)))
    expected = clock.training((work.steps + 1) * lengths[0], lengths[0])
    if expected > seconds:
        note = f"skipped: it would take about {expected:.0f} s"
        yield from ({**work.about(length), "note": note} for length in lengths)
        return
    yield from in_own_process(work, seconds)


def _objective(series: str) -> str:
    return {"logits": "logits", "mlx-lm": "ce"}.get(series, "relation")


# ---------------------------------------------------------------------------------------------------
# Report


def cell(row: dict[str, Any]) -> str:
    """A row's figures as a cell of the table."""
    if row.get("note"):
        return "not measured"
    if row["series"] == "loss":
        seconds = row["seconds"]
        duration = f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
        return f"{duration}, {row['extra_mb'] / 1e3:.2f} GB"
    speed = row["tokens_per_second"]
    return f"{speed:.{0 if speed >= 100 else 1}f} tokens/s, {row['peak_mb'] / 1e3:.2f} GB"


def table(found: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table with one row, as docs/measured.md collects them."""
    rows = [*found["loss"], *found["step"]]
    heads = [f"{STEP_SERIES.get(row['series'], row['series'])} {row['length']}" for row in rows]
    cells = [f"{found['device']}, {found['memory_gb']:.0f} GB", found["versions"]["mlx"], *map(cell, rows)]
    lines = [["machine", "mlx", *heads], ["---"] * len(cells), cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def notes(found: dict[str, Any]) -> list[str]:
    """A line for each figure that is missing, with the reason."""
    rows = [*found["loss"], *found["step"]]
    return [f"{row['series']} {row['length']}: {row['note']}" for row in rows if row.get("note")]


def file_of(machine: Machine, folder: Path) -> Path:
    """The JSON file of a machine; UserError if `folder` cannot be written."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder} is not a folder that can be written: choose another one")
    return folder / f"benchmark-{file_name(machine.name)}.json"


def write(found: dict[str, Any], file: Path) -> None:
    """Write the JSON file; an older one of the same machine is replaced."""
    write_json(file, found)
