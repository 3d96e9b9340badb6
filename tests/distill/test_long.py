"""The long part of a step: its blocks, its loss, its memory, and that a stopped run continues bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import tiny_model
from tiny_runs import Stopped, StopsAt, metrics, same_adapters, small

import mlx_linearard
from mlx_linearard.distill.long import LongBlocks, LongPart, long_objective
from mlx_linearard.distill.memory import plan_memory
from mlx_linearard.distill.objective import objective_loss, resolve_objective
from mlx_linearard.distill.prepare import make_plan
from mlx_linearard.distill.step import Schedule, TrainState, train_step
from mlx_linearard.errors import UserError
from mlx_linearard.machine import Machine
from mlx_linearard.models.adapters import put
from mlx_linearard.models.pair import Pair, load_pair

END = 257


def stream(*lengths: int) -> np.ndarray:
    """Documents of so many tokens, each ended by END; tokens count up within a document."""
    return np.concatenate([[*range(n - 1), END] for n in lengths]).astype(np.int32)


# ---------------------------------------------------------------------------------------------------
# Blocks


def test_blocks_lie_inside_documents_that_are_long_enough() -> None:
    blocks = LongBlocks.of(stream(10, 100, 20, 70), 30, 0, END)
    for number in range(2 * len(blocks.starts)):
        block = blocks.block(number)[0]
        assert len(block) == 31
        assert END not in block[:-1]
    assert len(blocks.starts) == 3 + 2


def test_blocks_cross_documents_if_none_is_long_enough() -> None:
    assert len(LongBlocks.of(stream(10, 10, 10, 10), 15, 0, END).starts) == 2
    assert len(LongBlocks.of(stream(40), 15, 0, None).starts) == 2


def test_every_block_is_read_once_per_epoch_in_an_order_of_its_own() -> None:
    blocks = LongBlocks.of(stream(400), 15, 3, END)
    count = len(blocks.starts)
    epochs = [[int(blocks.block(e * count + i)[0, 0]) for i in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    again = LongBlocks.of(stream(400), 15, 3, END)
    assert np.array_equal(again.block(count + 4), blocks.block(count + 4))


def test_too_little_long_text_is_refused() -> None:
    with pytest.raises(UserError, match="too few for one block of 41"):
        LongBlocks.of(stream(40), 40, 0, END)


# ---------------------------------------------------------------------------------------------------
# The loss


def short_and_long(pair: Pair, parameters: list[dict[str, mx.array]], short: mx.array, long: mx.array) -> mx.array:
    """The definition: KL of the logits on the short text, plus 0.3 times cross-entropy on the long text."""
    own = pair.parameters()
    for index, leaves in zip(pair.adapter.layers, parameters, strict=True):
        put(pair.student.layers[index], leaves)
    log_s, log_t = nn.log_softmax(pair.student(short[:, :-1])), nn.log_softmax(pair.teacher(short[:, :-1]))
    kl = (mx.exp(log_t) * (log_t - log_s)).sum(-1).mean()
    ce = nn.losses.cross_entropy(pair.student(long[:, :-1]), long[:, 1:]).mean()
    pair.set_parameters(own)
    return kl + 0.3 * ce


def test_the_loss_and_the_update_are_those_of_the_weighted_sum(model_dir: Path) -> None:
    pair = load_pair(model_dir, method="yarn", factor=4.0, lora_rank=4)
    mx.random.seed(1)
    start = [{k: v + 0.05 * mx.random.normal(v.shape) for k, v in leaves.items()} for leaves in pair.parameters()]
    pair.set_parameters(start)
    tokens = np.array([[(7 * i * i + 3 * i) % 256 for i in range(1000)]], np.int32)
    short, long = mx.array(tokens[:, :33]), mx.array(tokens[:, :201])  # the native window is 128
    expected, gradients = mx.value_and_grad(lambda p: short_and_long(pair, p, short, long))(start)
    blocks = LongBlocks(tokens[0], 200, 0, np.array([0]))
    schedule = Schedule(4, 1, 1, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    part = LongPart(0.3, blocks, long_objective(1 << 20))
    record = train_step(pair, resolve_objective(pair.student, "logits"), schedule, state, [short], long=part)
    assert record.loss == pytest.approx(float(expected.item()), rel=1e-5)
    assert record.loss == pytest.approx(record.parts["logits"] + 0.3 * record.parts["long"], rel=1e-6)
    squares = sum(float((g * g).sum().item()) for leaves in gradients for g in leaves.values())
    assert record.grad_norm == pytest.approx(squares**0.5, rel=1e-4)
    assert record.tokens == 32 + 200


def test_the_teacher_reads_nothing_long(model_dir: Path) -> None:
    """A teacher that would fail on long text changes nothing: only the student reads it."""
    pair = load_pair(model_dir, method="yarn", factor=4.0, lora_rank=4)
    tokens = mx.array([[i % 256 for i in range(201)]])
    before = objective_loss(pair, long_objective(1 << 20), pair.parameters(), tokens)[0]
    for layer in pair.teacher.layers:
        layer.mlp = None
    after = objective_loss(pair, long_objective(1 << 20), pair.parameters(), tokens)[0]
    assert before.item() == after.item()


# ---------------------------------------------------------------------------------------------------
# Runs

LONG = {"method": "yarn", "objective": "logits", "long_weight": 0.5, "long_seq_len": 200}


@pytest.mark.parametrize("objective", ["logits", "relation", "ce"])
def test_a_run_trains_both_parts_and_says_so(model_dir: Path, text_file: Path, tmp_path: Path, objective: str) -> None:
    options = {**LONG, "objective": objective, "long_weight": 5.0}
    result = mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    lines = metrics(tmp_path / "run")
    assert result.steps == 8 and all(line["long"] > 0 and line["tokens"] == 264 for line in lines)
    assert lines[-1]["long"] < lines[0]["long"]
    assert json.loads((tmp_path / "run" / "adapters" / "adapter_config.json").read_text())["num_layers"] == 3


def test_a_stopped_run_continues_bit_for_bit(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = {**LONG, "lora_dropout": 0.1, "save_every": 3}
    mlx_linearard.distill(small(model_dir, text_file, straight, **options))
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model_dir, text_file, stopped, **options), StopsAt(5))
    mlx_linearard.distill(small(model_dir, text_file, stopped, **options, resume=True))
    assert same_adapters(straight, stopped)
    assert [line["loss"] for line in metrics(straight)] == [line["loss"] for line in metrics(stopped)]


def test_another_long_part_is_another_run(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, **LONG))
    with pytest.raises(UserError, match=r"long_weight was 0\.5 and is 0\.2"):
        mlx_linearard.distill(small(model_dir, text_file, run, **{**LONG, "long_weight": 0.2}, resume=True))
    other = tmp_path / "other.txt"
    other.write_text("Some other long text. " * 400)
    with pytest.raises(UserError, match="long_data"):
        mlx_linearard.distill(small(model_dir, text_file, run, **LONG, long_data=str(other), resume=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"long_seq_len": 200}, "need --long-weight"),
        ({"long_weight": 0.2, "long_seq_len": 1000}, "at most 512"),
        ({"long_weight": -1.0}, "negative"),
        ({"long_weight": 0.2, "long_data": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"method": "linear", "yarn_beta_fast": 12.0}, "ramp of yarn"),
        ({"method": "yarn", "yarn_beta_fast": 2.0, "yarn_beta_slow": 3.0}, "above beta_slow"),
    ],
)
def test_options_that_do_not_fit(model_dir: Path, text_file: Path, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_the_ramp_of_yarn_reaches_the_export(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"method": "yarn", "yarn_beta_fast": 12.0, "yarn_beta_slow": 6.0}
    mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run", **options))
    for folder in ("model", "base"):
        config = json.loads((tmp_path / "run" / folder / "config.json").read_text())
        assert (config["rope_scaling"]["beta_fast"], config["rope_scaling"]["beta_slow"]) == (12.0, 6.0)


# ---------------------------------------------------------------------------------------------------
# The plan

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512}


def plan_of(folder: Path, text: Path, tmp_path: Path, memory: int = 1 << 40, **options: object):
    machine = Machine("tiny", False, memory, 10.0)
    return make_plan(small(folder, text, tmp_path / "run", **{**LONG, **options}), machine)


def test_the_default_length_is_twice_the_native_window_or_what_fits(text_file: Path, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", **WIDE)
    plan = plan_of(folder, text_file, tmp_path, long_seq_len=None)
    assert plan.sizing.long_seq_len == 1024
    assert plan_of(folder, text_file, tmp_path, long_seq_len=None, factor=1.5).sizing.long_seq_len == 768
    smaller = plan_of(folder, text_file, tmp_path, plan.memory.total - 1, long_seq_len=None)
    assert plan_memory(smaller.step).total < smaller.memory.total < plan.memory.total
    assert smaller.sizing.long_seq_len < 1024
    with pytest.raises(UserError, match="--long-seq-len"):
        plan_of(folder, text_file, tmp_path, plan.memory.total - 1, long_seq_len=1024)


@pytest.mark.parametrize("objective", [pytest.param("relation", marks=pytest.mark.slow), "logits"])
def test_the_plan_of_a_long_part_is_near_the_peak(tmp_path: Path, text_file: Path, objective: str) -> None:
    folder = tiny_model(tmp_path / "m", **WIDE)
    plan = plan_of(folder, text_file, tmp_path, objective=objective, long_seq_len=1024, workspace=8)
    pair = load_pair(folder, method="yarn", factor=4.0, lora_rank=4, dtype="float32")
    schedule = Schedule(4, 1, 2, 1e-3, 0, 0.0, 0.0, 0)
    state = TrainState.start(pair, schedule)
    tokens = np.arange(4000, dtype=np.int32) % 256
    part = LongPart(0.5, LongBlocks(tokens, 1024, 0, np.array([0, 1])), long_objective(8 << 20))
    target = dataclasses.replace(resolve_objective(pair.student, objective), workspace_bytes=8 << 20)
    resident = mx.get_active_memory() - sum(a.nbytes for _, a in _arrays(pair))
    peaks = []
    for _ in range(3):
        batches = [mx.array(tokens[None, :33]), mx.array(tokens[None, 5:38])]
        peaks.append(train_step(pair, target, schedule, state, batches, long=part).peak_memory)
    assert plan.memory.total == pytest.approx(max(peaks[1:]) - max(0, resident), rel=0.2)


def _arrays(pair: Pair) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten([pair.teacher.parameters(), pair.parameters()])
