"""Every family of the table: a tiny model of mlx-lm's own class is distilled, exported, and read by stock mlx-lm."""

from __future__ import annotations

from pathlib import Path

import family_models
import mlx.core as mx
import numpy as np
import pytest
from tiny import reload as plain_reload

from mlx_linearard.data import Blocks
from mlx_linearard.distill.long import LongLoss, LongPart
from mlx_linearard.distill.long_text import LongBlocks, LongSizes
from mlx_linearard.distill.objective import Objective, resolve_objective
from mlx_linearard.distill.step import Schedule, TrainState, train
from mlx_linearard.errors import UserError
from mlx_linearard.export.fuse import write_base, write_fused
from mlx_linearard.export.verify import TOLERANCE
from mlx_linearard.files import read_config
from mlx_linearard.models.directory import check_config
from mlx_linearard.models.experts import compute_in_float32
from mlx_linearard.models.pair import Pair, load_pair
from mlx_linearard.rope import FAMILIES, WRAPPERS, family, native_window

WINDOW, FACTOR = family_models.WINDOW, family_models.FACTOR
LONG = 2 * WINDOW
TOKENS = (np.arange(2 * LONG) * 7919 % 251).astype(np.int32)

# Fusing rounds W + scale B A once more, and float32 sums of some hundred products of numbers near 1 differ by 1e-5.
CLOSE = 2e-4
# bfloat16 keeps 8 bits: rounding W + scale B A once more moves the logits, which are some units, by some hundredths.
KL = TOLERANCE[mx.bfloat16]
DIFFERENT = 2e-2  # two kinds of GELU
# A head of linear attention divides by the length of its output, which is near zero at some positions of a random
# model: there transformers' own float32 and float64 logits differ by 1.5e-3.
NOISE = 5e-3


def best_method(kind: str) -> str:
    """The method that the family's users would choose; ntk keeps a scaling that the model has already."""
    config = family_models.config(kind)
    native = (config.get("text_config", config).get("rope_parameters") or {}).get("rope_type", "default")
    wanted = ("ntk",) if native != "default" else ("yarn", "llama3", "linear", "ntk")
    return next(method for method in wanted if method in family(config).methods)


def distilled(folder: Path, kind: str, objective: str, **options) -> tuple[Pair, list[float]]:
    """A pair after three steps on the same tokens with a long part, and the loss of each step."""
    pair = load_pair(folder, method=best_method(kind), factor=FACTOR, lora_rank=4, **options)
    schedule = Schedule(3, 1, 1, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    long_loss = LongLoss(("ce",), Objective(layers=(), ce_weight=1.0, workspace_bytes=1 << 20))
    long = LongPart(0.2, LongSizes(LONG), LongBlocks(TOKENS, LONG, 0, np.array([0])), long_loss)
    blocks = Blocks(TOKENS[: WINDOW + 1], WINDOW, 0)
    resolved = resolve_objective(pair.student, objective, workspace_bytes=1 << 20)
    records = list(train(pair, resolved, schedule, blocks, state, long=long))
    pair.set_parameters(state.parameters)
    return pair, [record.loss for record in records]


def logits(model, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """(T, V) float32."""
    return np.array(model(mx.array(tokens[None])).astype(mx.float32))[0]


def reload(folder: Path):
    """The directory as stock mlx-lm loads it; experts that this device cannot multiply in bfloat16, in float32."""
    model = plain_reload(folder)
    compute_in_float32(model)
    return model


def test_every_family_has_a_tiny_model() -> None:
    assert family_models.OWN.keys() == FAMILIES.keys()
    assert family_models.WRAPPED.keys() == WRAPPERS.keys()
    assert set(family_models.WRAPPED.values()) >= family_models.INSIDE


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
    loaded = logits(reload(folder / "fused"))
    if model.get("dtype") == "bfloat16":
        assert divergence(student, loaded) < KL
    else:
        assert np.abs(student - loaded).max() < CLOSE
    return pair


def divergence(a: np.ndarray, b: np.ndarray) -> float:
    """The mean KL of the predictions, in nats per token."""
    log_a, log_b = (x - x.max(-1, keepdims=True) for x in (a, b))
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_a, log_b))
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())


@pytest.mark.parametrize(("objective", "bits"), [("relation", None), ("logits", 4)], ids=["relation", "logits-4-bit"])
@pytest.mark.parametrize("kind", family_models.KINDS)
def test_a_family_is_distilled_and_served(tmp_path: Path, kind: str, objective: str, bits: int | None) -> None:
    check(tmp_path, kind, objective, bits=bits)


def torch_logits_of(folder: Path, target: Path) -> np.ndarray:
    """(T, V) of transformers in float32, on the directory converted for it."""
    from mlx_linearard.convert.hf import to_hf
    from mlx_linearard.convert.verify import torch_logits

    return torch_logits(to_hf(folder, target), TOKENS[None])[0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["relation", "logits"])
@pytest.mark.parametrize("bits", [None, 4], ids=["bfloat16", "4-bit"])
@pytest.mark.parametrize("kind", family_models.KINDS)
def test_the_result_of_a_family_is_the_same_everywhere(
    tmp_path: Path, kind: str, bits: int | None, objective: str
) -> None:
    """In bfloat16 as in memory; with the same weights in float32, transformers on torch agrees below and beyond."""
    row = family(family_models.config(kind))
    # 4 bits with bfloat16 scales have values that bfloat16 cannot hold
    check(tmp_path, kind, objective, bits=bits, dtype="float32" if bits else "bfloat16")
    fused = plain_reload(tmp_path / "fused")
    fused.set_dtype(mx.float32)
    ours = logits(fused)
    if not row.architecture:
        with pytest.raises(UserError, match=f"transformers has no {kind}"):
            torch_logits_of(tmp_path / "fused", tmp_path / "theirs")
        return
    apart = np.abs(ours - torch_logits_of(tmp_path / "fused", tmp_path / "theirs")).max(axis=-1)
    limit = DIFFERENT if row.differs == FAMILIES["gemma"].differs else 1e-4 * max(1.0, np.abs(ours).max())
    limit = max(limit, NOISE if row.pattern == "interval" else 0.0)
    assert apart[:WINDOW].max() < limit
    assert apart[WINDOW:].max() < limit


@pytest.mark.parametrize("kind", sorted(WRAPPERS))
def test_a_multimodal_config_says_everything_once(tmp_path: Path, kind: str) -> None:
    """transformers takes RoPE at the top level of such a config for that of the multimodal model."""
    pair = load_pair(family_models.write(tmp_path / "m", kind), method="ntk", factor=FACTOR)
    write_base(pair, tmp_path / "base")
    written = read_config(tmp_path / "base")
    assert native_window(written) == written["text_config"]["max_position_embeddings"] == WINDOW * FACTOR
    assert not {"max_position_embeddings", "rope_parameters", "rope_scaling", "hidden_size"} & written.keys()
    assert check_config(tmp_path / "base") == pair.scaled_config
