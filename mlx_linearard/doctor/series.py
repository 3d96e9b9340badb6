"""Speed and peak memory of a training step against length, beside mlx-lm's own LoRA training.

`last` and `all` match the relations of the last layer or of all layers; `logits`, `relation+logits` and `ce` are
the other objectives. `mlx-lm` is the training loop of mlx_lm.lora with --grad-checkpoint: the same adapters, model,
length and optimizer, on the next-token loss. Each series runs in its own process, so that no series counts the
memory of another, and a slow series can be ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import OBJECTIVES, DistillConfig
from ..distill.gradient import Gradients
from ..distill.kept import Kept, kept_always
from ..distill.memory import SHORTEST, keeping
from ..distill.objective import resolve_objective
from ..distill.plan import inspect_model, plan_run
from ..distill.step import Schedule, TrainState, train_step
from ..files import read_config
from ..machine import describe, machine_of_speed
from ..models.adapters import qkv_keys
from ..models.pair import load_pair
from ..ops.row_kernel import on_cuda
from ..ops.tiling import without_settings
from ..rope import normalise, scale_rope

SERIES = ("last", "all", "logits", "relation+logits", "ce", "mlx-lm")
RANK, SCALE, FACTOR = 64, 2.0, 4.0
LARGEST_ID = 250  # random token ids are below this number; every model has them
CUDA_TOKENS, CUDA_STEPS = (
    65536,
    40,
)  # short steps settle late on CUDA: so many tokens are timed, in so many steps at most
GROWTH = 2.0  # the time of a step grows at most as length to this power

Measure = Callable[[int], tuple[int, float]]  # length -> (peak bytes, tokens per second)


@dataclass(frozen=True)
class Work:
    """The settings of one series."""

    series: str
    model: str  # a model directory
    name: str  # the model's name in results
    lengths: tuple[int, ...]
    steps: int = 3  # timed, after one that warms up; 0 times the first one
    workspace: int = 256 << 20  # bytes
    dtype: str | None = None  # dtype of the weights in memory; None keeps the dtype of the files
    memory_limit: int | None = None  # MB, distill's --memory-limit
    recompute: str = "all"  # distill's --recompute

    def timed(self, length: int) -> int:
        """How many steps are timed."""
        if not self.steps or not on_cuda():
            return self.steps
        return max(self.steps, min(CUDA_STEPS, CUDA_TOKENS // length))

    def about(self, length: int) -> dict[str, Any]:
        """The columns that name a row."""
        return {
            "machine": describe(),
            "mlx": version("mlx"),
            "model": self.name,
            "series": self.series,
            "length": length,
        }


def rows(work: Work, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """A row per length, measured in this process.

    Args:
        seconds: a length that would probably take longer than the rest of this time gets a row with a `note`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    own = work.series != "mlx-lm"
    if work.memory_limit and own:
        mx.set_memory_limit(work.memory_limit << 20)
    measure = own_step(work) if own else mlx_lm_step(work)
    weights, took, last = mx.get_active_memory(), 0.0, 1
    for length in work.lengths:
        expected = took * (length / last) ** GROWTH
        if end is not None and time.monotonic() + expected > end:
            yield {**work.about(length), "note": f"skipped: it would take about {expected:.0f} s"}
            continue
        mx.clear_cache()
        start = time.monotonic()
        peak, speed = measure(length)
        took, last = time.monotonic() - start, length
        yield {
            **work.about(length),
            "peak_mb": round(peak / 1e6, 1),
            "weights_mb": round(weights / 1e6, 1),
            "tokens_per_second": round(speed, 1),
            "workspace_mb": work.workspace >> 20,
            "memory_limit_mb": (own and work.memory_limit) or "",
            "recompute": work.recompute if own else "",
        }


def own_step(work: Work) -> Measure:
    """This project's training step."""
    pair = load_pair(work.model, method="linear", factor=FACTOR, lora_rank=RANK, lora_scale=SCALE, dtype=work.dtype)
    name, layers = (work.series, "last") if work.series in OBJECTIVES else ("relation", work.series)
    objective = resolve_objective(pair.student, name, layers=layers, workspace_bytes=work.workspace)
    always = kept_always(work.recompute, objective.last_layer(len(pair.student.layers)) + 1)
    kept_of = _planned(work, name, layers) if always is None else lambda _: always
    schedule = Schedule(1000, 1, 1, 1e-4, 0, 0.0, 5.0, 0)
    state, gradients_of = TrainState.start(pair, schedule), Gradients(pair)

    def measure(length: int) -> tuple[int, float]:
        peak, speeds, chosen = 0, [], dataclasses.replace(objective, kept=kept_of(length))
        for step in range(work.timed(length) + 1):
            tokens = mx.random.randint(0, LARGEST_ID, (1, length + 1))
            mx.eval(tokens)
            record = train_step(pair, chosen, schedule, state, [tokens], gradients_of=gradients_of)
            peak = max(peak, record.peak_memory)
            speeds += [record.tokens / record.seconds] if step or not work.steps else []
        return peak, _settled(speeds)

    return measure


def _planned(work: Work, name: str, layers: str) -> Callable[[int], Kept]:
    """What --recompute auto lets the layers of a step keep, by its length."""
    config = DistillConfig(
        model=work.model,
        method="linear",
        factor=FACTOR,
        lora_rank=RANK,
        objective=name,
        layers=layers,
        seq_len=SHORTEST,
        batch_size=1,
        grad_accum=1,
        long_weight=0.0,
        workspace=work.workspace >> 20,
        dtype=work.dtype or "auto",
        recompute=work.recompute,
        memory_limit=work.memory_limit,
    )
    machine = machine_of_speed(1.0)
    step = plan_run(config, inspect_model(config, Path(work.model)), machine).step
    return lambda length: keeping(dataclasses.replace(step, seq_len=length), config, machine.usable).kept


def _settled(speeds: list[float]) -> float:
    """The median of the second half."""
    return statistics.median(speeds[len(speeds) // 2 :])


def mlx_lm_step(work: Work) -> Measure:
    """mlx-lm's training loop with --grad-checkpoint, on the same adapters, with mlx as its own command runs it."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, grad_checkpoint, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    without_settings()
    config = scale_rope(normalise(read_config(work.model)), "linear", FACTOR)
    model, _ = load_model(Path(work.model), lazy=True, model_config=config)
    if work.dtype:
        model.set_dtype(getattr(mx, work.dtype))
    model.freeze()
    mx.eval(model.parameters())
    keys = set(qkv_keys(model))
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": keys})
    mx.eval(model.parameters())
    grad_checkpoint(model.layers[0])

    def measure(length: int) -> tuple[int, float]:
        tokens = [(mx.random.randint(0, LARGEST_ID, (length + 1,)).tolist(), 0) for _ in range(2)]
        reports: Any = _Reports()  # a TrainingCallback
        mx.reset_peak_memory()
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:  # noqa: PTH123
            args = TrainingArgs(
                batch_size=1,
                iters=1 + max(1, work.timed(length)),
                val_batches=0,
                steps_per_report=1,
                steps_per_eval=10**9,
                steps_per_save=10**9,
                max_seq_length=length + 1,
                adapter_file=str(Path(folder) / "a.safetensors"),
            )
            with contextlib.redirect_stdout(nowhere):
                train(model, optim.AdamW(learning_rate=1e-4), _Rows(tokens), None, args=args, training_callback=reports)
        return mx.get_peak_memory(), _settled(reports.speeds[1:])

    return measure


class _Reports:
    """The tokens per second of mlx-lm's steps; the first one compiles."""

    def __init__(self) -> None:
        self.speeds: list[float] = []

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.speeds.append(info["tokens_per_second"])

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        pass


class _Rows(list[Any]):
    """Token rows as mlx-lm's trainer takes them."""

    def itemlen(self, index: int) -> int:
        return len(self[index][0])


# ---------------------------------------------------------------------------------------------------
# A process of its own


def in_own_process(work: Work, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """`rows` of a process of its own, which is ended after `seconds`. A length that is missing gets a `note`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(work, seconds, sender), daemon=True)
    process.start()
    sender.close()
    end = None if seconds is None else time.monotonic() + seconds
    missing, reason = list(work.lengths), ""
    try:
        while not reason:
            if end is not None and not receiver.poll(max(0.0, end - time.monotonic())):
                reason = f"skipped: not finished after {seconds:.0f} s"
                break
            try:
                row = json.loads(receiver.recv_bytes())
            except EOFError:
                process.join()
                reason = f"failed with status {process.exitcode}"
                break
            missing.remove(row["length"])
            yield row
    finally:
        process.kill()
        process.join()
        receiver.close()
    yield from ({**work.about(length), "note": reason} for length in missing)


def _send_rows(work: Work, seconds: float | None, sender: Connection) -> None:
    for row in rows(work, seconds):
        sender.send_bytes(json.dumps(row).encode())
    sender.close()
