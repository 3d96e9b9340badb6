"""A run measures as much held-out text as suits its training time, and its plan names the time of each part."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.amounts import Amount, grouped
from mlx_linearard.distill.prepare import make_plan
from mlx_linearard.distill.run import distill
from mlx_linearard.distill.sizing import Sizing, size_run
from mlx_linearard.distill.timing import MEASURING_SHARE, choose_eval_tokens
from mlx_linearard.machine import Machine
from tests.tiny_runs import small

SLOW = Machine("a slow processor", False, 8 << 30, 4.0)
FAST = Machine("a GPU", True, 80 << 30, 100_000.0)
SMOLLM2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip


def sized(machine: Machine = SLOW, **options: Any) -> Sizing:
    return size_run(
        DistillConfig(**{"model": "a model", "data": "a text", "long_weight": 0.0, **options}), SMOLLM2, machine
    )


@pytest.mark.parametrize("objective", ["relation", "logits", "relation+logits", "ce"])
@pytest.mark.parametrize("seq_len", [64, 256])
def test_a_short_run_on_a_slow_machine_measures_no_longer_than_it_trains(objective: str, seq_len: int) -> None:
    found = sized(objective=objective, seq_len=seq_len, steps=12, batch_size=1, grad_accum=1)
    assert found.eval_tokens >= 4 * seq_len
    assert found.times.measuring <= found.times.training


def test_one_step_still_measures_a_window() -> None:
    assert sized(seq_len=64, steps=1, batch_size=1, grad_accum=1).eval_tokens >= 64


def test_a_long_run_measures_a_share_of_its_training_and_at_most_32768_tokens() -> None:
    found = sized(seq_len=64, steps=100, batch_size=1, grad_accum=1)
    assert 4 * 64 < found.eval_tokens < 32768
    assert 0.5 * MEASURING_SHARE < found.times.measuring / found.times.training <= MEASURING_SHARE
    assert sized(FAST).eval_tokens == 32768 and sized(FAST, steps=100_000).eval_tokens == 32768


def test_evaluations_during_training_count_as_measuring() -> None:
    run = {"seq_len": 64, "steps": 400, "grad_accum": 1}
    often = sized(**run, eval_every=100)
    assert often.eval_tokens < sized(**run).eval_tokens
    assert often.times.measuring <= MEASURING_SHARE * often.times.training


def test_the_long_part_counts_as_training() -> None:
    run = {"seq_len": 64, "steps": 12, "grad_accum": 1}
    assert sized(**run, long_weight=0.2, long_seq_len=640).times.training > 11 * sized(**run).times.training


def test_the_option_wins() -> None:
    found = sized(seq_len=64, steps=12, grad_accum=1, eval_tokens=20_000)
    assert found.eval_tokens == 20_000 and found.times.measuring > found.times.training


@pytest.mark.parametrize("window", [1, 300, 32768, 100_000])
def test_there_is_always_a_window(window: int) -> None:
    assert choose_eval_tokens(0.0, float, window) == window
    assert choose_eval_tokens(1e12, float, window) == max(1, 32768 // window) * window


def test_the_plan_names_the_time_of_each_part() -> None:
    found = sized(seq_len=64, steps=12, grad_accum=1)
    text = "\n".join(Amount(7680).lines(found))
    assert found.times.total == found.times.measuring + found.times.training + found.times.exporting
    assert all(f"{name} " in text for name in ("measuring", "training", "exporting"))
    assert "training text: 7 680 tokens; the run reads 768, 0.1 epochs" in text
    assert f"held-out text: {grouped(found.eval_tokens)} tokens in windows of 64" in text


def test_a_resumed_run_keeps_the_held_out_text_it_began_with(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The run begins on a slow machine and is resumed on a fast one."""
    config = small(model_dir, text_file, tmp_path / "run", steps=2, eval_tokens=None)
    slower, faster = (dataclasses.replace(SLOW, gflops=speed) for speed in (1e-3, 1e6))
    assert make_plan(config, slower).sizing.eval_tokens != make_plan(config, faster).sizing.eval_tokens
    assert distill(dataclasses.replace(config, steps=2)) is not None
    began = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["eval_tokens"]
    resumed = dataclasses.replace(config, resume=True, steps=4)
    for machine in (slower, faster):
        assert make_plan(resumed, machine).sizing.eval_tokens == began


@pytest.mark.parametrize(
    ("tokens", "rate"), [(64, 4e-5), (512, 1.1e-4), (2048, 2.2e-4), (8192, 4.5e-4), (16384, 4.5e-4)]
)
def test_smaller_steps_learn_more_slowly(tokens: int, rate: float) -> None:
    small_steps = {"seq_len": 64, "grad_accum": tokens // 64}
    assert sized(**small_steps).learning_rate == rate
    assert sized(**small_steps, learning_rate=1e-3).learning_rate == 1e-3
    assert sized(seq_len=2048, batch_size=2, steps=9).learning_rate == 4.5e-4  # accumulated to 8192 tokens


def test_a_resumed_run_keeps_the_learning_rate_it_began_with(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = small(model_dir, text_file, tmp_path / "run", steps=2, learning_rate=None)
    assert distill(config) is not None
    began = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"]
    (tmp_path / "run" / "config.yaml").write_text(f"learning_rate: {began / 2}\n")  # of an older version
    assert make_plan(dataclasses.replace(config, resume=True), SLOW).sizing.learning_rate == began / 2
