"""Every family of the table: a tiny model of mlx-lm's own class is distilled, exported, and read by stock mlx-lm."""

from __future__ import annotations

from pathlib import Path

import family_models
import mlx.core as mx
import numpy as np
import pytest
from tiny import reload

from mlx_linearard.data import Blocks
from mlx_linearard.distill.long import LongLoss, LongPart
from mlx_linearard.distill.long_text import LongBlocks, LongSizes
from mlx_linearard.distill.objective import Objective, resolve_objective
from mlx_linearard.distill.step import Schedule, TrainState, train
from mlx_linearard.export.fuse import write_fused
from mlx_linearard.models.pair import Pair, load_pair
from mlx_linearard.rope import FAMILIES

KINDS = sorted(FAMILIES)
WINDOW, FACTOR = family_models.WINDOW, family_models.FACTOR
LONG = 2 * WINDOW
TOKENS = (np.arange(2 * LONG) * 7919 % 251).astype(np.int32)

# Fusing rounds W + scale B A once more, and float32 sums of some hundred products of numbers near 1 differ by 1e-5.
CLOSE = 2e-4


def best_method(kind: str) -> str:
    """The method that the family's users would choose."""
    return next(method for method in ("yarn", "llama3", "linear", "ntk") if method in FAMILIES[kind].methods)


def distilled(folder: Path, kind: str, objective: str, **options) -> tuple[Pair, list[float]]:
    """A pair after three steps on the same tokens with a long part, and the loss of each step."""
    pair = load_pair(folder, method=best_method(kind), factor=FACTOR, lora_rank=4, **options)
    schedule = Schedule(3, 1, 1, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    long_loss = LongLoss(("ce",), Objective(layers=(), ce_weight=1.0, workspace_bytes=1 << 20))
    long = LongPart(0.2, LongSizes(LONG), LongBlocks.of(TOKENS[: LONG + 1], LONG, 0, None), long_loss)
    blocks = Blocks(TOKENS[: WINDOW + 1], WINDOW, 0)
    resolved = resolve_objective(pair.student, objective, workspace_bytes=1 << 20)
    records = list(train(pair, resolved, schedule, blocks, state, long=long))
    pair.set_parameters(state.parameters)
    return pair, [record.loss for record in records]


def logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """(T, V) float32."""
    return np.array(model(mx.array(tokens[None])).astype(mx.float32))[0]


def test_every_family_has_a_tiny_model() -> None:
    assert family_models.OWN.keys() == FAMILIES.keys()


def check(folder: Path, kind: str, objective: str, **model) -> Pair:
    """Distils, exports and reads a tiny model; its pair."""
    native = family_models.write(folder / "native", kind, **model)
    before = logits(reload(native))
    pair, losses = distilled(native, kind, objective)
    assert losses[-1] < losses[0]
    assert np.array_equal(logits(pair.teacher), before)  # the teacher is the native model, before and after
    student = logits(pair.student)
    assert np.abs(student - before).max() > 100 * CLOSE  # the comparison is worth something
    write_fused(pair, folder / "fused")
    assert np.abs(student - logits(reload(folder / "fused"))).max() < CLOSE
    return pair


WAITING = pytest.mark.xfail(reason="attention written out", strict=True)
PARAMETERS = [pytest.param(kind, marks=WAITING) if kind == "gemma2" else kind for kind in KINDS]


@pytest.mark.parametrize(("objective", "bits"), [("relation", None), ("logits", 4)], ids=["relation", "logits-4-bit"])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_family_is_distilled_and_served(tmp_path: Path, kind: str, objective: str, bits: int | None) -> None:
    check(tmp_path, kind, objective, bits=bits)
