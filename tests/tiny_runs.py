"""Small runs as functions, for tests of the files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.listener import Listener
from mlx_linearard.distill.step import StepRecord


def small(model: Path, text: Path, output: Path, **changes: Any) -> DistillConfig:
    """Eight steps of relations on two blocks of 32 tokens, linear scaling, unless `changes` say otherwise."""
    options = {
        "method": "linear",
        **({} if "compare" in changes else {"objective": "relation"}),
        "seq_len": 32,
        "grad_accum": 2,
        "steps": 8,
        "long_weight": 0.0,
        "lora_rank": 4,
        "learning_rate": 2e-3,
        "eval_tokens": 128,
    }
    return DistillConfig(model=str(model), data=str(text), output=str(output), **{**options, **changes})


class Stopped(Exception):
    """Ends a run without a save."""


class StopsAt(Listener):
    """Raises after step `step` is reported and before it is saved; without a number it never raises."""

    def __init__(self, step: int | None = None) -> None:
        self.at = step

    def step(self, record: StepRecord, total: int) -> None:
        if record.step == self.at:
            raise Stopped


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, read strictly: NaN is not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.jsonl")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_adapters(a: Path, b: Path) -> bool:
    """Whether two runs have the same adapters, bit for bit."""
    one, two = (mx.load(str(run / "adapters" / "adapters.safetensors")) for run in (a, b))
    return one.keys() == two.keys() and all(mx.array_equal(one[name], two[name]).item() for name in one)
