"""Training uses mlx's attention only if a probe found it linear in memory and exact; the answer is kept in a file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_linearard.distill import plan as planning
from mlx_linearard.distill.plan import attention_choice, inspect_model, objective_of, plan_run
from mlx_linearard.distill.prepare import load
from mlx_linearard.machine import Machine, on_gpu
from mlx_linearard.ops import attention as room
from mlx_linearard.ops import probe as probing
from mlx_linearard.ops.attention import attention, attention_in_training, peak_bytes
from mlx_linearard.ops.fused import Choice
from mlx_linearard.ops.probe import FILE, LENGTHS, Probe, choice_of, probe, probe_once, recorded
from tests.tiny_runs import small

LINEAR = Probe(1.0, 1e-7, 1e-7, 5_000_000, 6_000_000)
QUADRATIC = Probe(1.9, 1e-7, 1e-7, 50_000_000, 6_000_000)
on_cpu = pytest.mark.skipif(on_gpu(), reason="about mlx's attention on a CPU")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "LENGTHS", {True: (64, 256), False: (64, 256)})


@on_cpu
def test_on_a_cpu_mlx_holds_scores_and_the_own_tiles_are_chosen() -> None:
    found = probe(mx.float32, 64)
    assert found.growth > 1.5 and not found.fused
    assert found.error < 1e-5 and found.own_error < 1e-5  # both are exact
    assert found.own_peak < found.peak
    assert found.line().startswith("own tiles (mlx: memory grows as T^")


def linear(wrong: float = 1.0, at: int | None = None) -> Any:
    """An attention that mlx sees in linear memory: numpy makes its gradient.

    wrong: a factor of the gradient, at the length `at` only if that is given.
    """

    def attend(*qkv: mx.array, **_: Any) -> mx.array:
        @mx.custom_function
        def output(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return mx.zeros_like(q)

        @output.vjp
        def _(primals: Any, cotangent: mx.array, outputs: Any) -> list[mx.array]:
            factor = wrong if at in (None, primals[0].shape[2]) else 1.0
            arrays = [np.array(a).astype(np.float64) for a in (*primals, cotangent)]
            with np.errstate(invalid="ignore"):
                return [mx.array((g * factor).astype(np.float32)) for g in probing._float64(*arrays)]

        return output(*qkv)

    return attend


def test_a_linear_and_exact_kernel_is_chosen(short: None) -> None:
    found = probe(mx.float32, 32, linear())
    assert found.growth < 1.5 and found.fused and found.line().startswith("mlx (")


@pytest.mark.parametrize("wrong", [1.001, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("at", [None, 64, 256])
def test_a_linear_kernel_with_a_wrong_gradient_is_not_chosen(short: None, wrong: float, at: int | None) -> None:
    found = probe(mx.float32, 32, linear(wrong, at))
    assert found.growth < 1.5 and found.error > 9e-4 and not found.fused


def test_a_kernel_that_fails_is_not_chosen(short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: mx.array, **__: Any) -> mx.array:
        raise ValueError("no kernel for this head size")

    found = probe(mx.float32, 32, fails)
    assert not found.fused and "it fails" in found.line()
    monkeypatch.setattr(probing, "probe", lambda *_: found)
    assert probe_once(mx.float32, 32, tmp_path) == found == recorded(mx.float32, 32, tmp_path)


def test_the_lengths_are_far_enough_apart_to_tell_linear_from_quadratic() -> None:
    assert all(long >= 4 * short for short, long in LENGTHS.values())


# ---------------------------------------------------------------------------------------------------
# The file


def probes(monkeypatch: pytest.MonkeyPatch, answer: Probe = LINEAR) -> list[int]:
    """Replaces the probe by one that answers at once; the list gets the head size of each call."""
    calls: list[int] = []

    def fake(dtype: mx.Dtype, dim: int) -> Probe:
        calls.append(dim)
        return answer

    monkeypatch.setattr(probing, "probe", fake)
    return calls


def test_each_dtype_head_size_and_version_is_probed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = probes(monkeypatch)
    folder = tmp_path / "new" / "cache"
    for _ in range(2):
        for dtype, dim in ((mx.float32, 64), (mx.bfloat16, 64), (mx.bfloat16, 128)):
            assert probe_once(dtype, dim, folder) == LINEAR
    assert calls == [64, 64, 128] and len(json.loads((folder / FILE).read_text())) == 3
    monkeypatch.setattr(probing, "version", lambda _: "99.0")
    probe_once(mx.float32, 64, folder)
    monkeypatch.setenv("MLX_SDPA_VJP_BLOCK", "0")
    probe_once(mx.float32, 64, folder)
    assert calls == [64, 64, 128, 64, 64]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", "\x00\xff", '{"a": NaN}', "[" * 5000, "{KEY: 1}", "{KEY: {}}", "{KEY: null}"]
    + [json.dumps({"KEY": {**dataclasses.asdict(LINEAR), "growth": value}}) for value in ("1.0", True, -1, [])]
    + [json.dumps({"KEY": {**dataclasses.asdict(LINEAR), "peak": value}}) for value in (None, "x")],
)
def test_a_damaged_file_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    calls = probes(monkeypatch)
    key = json.dumps(probing._key(mx.float32, 64))
    (tmp_path / FILE).write_text(damage.replace('"KEY"', key).replace("KEY", key))
    assert probe_once(mx.float32, 64, tmp_path) == LINEAR == recorded(mx.float32, 64, tmp_path)
    assert calls == [64]


@pytest.mark.parametrize("place", ["none", "a file", "a folder in the file's place"])
def test_without_a_place_to_keep_it_the_answer_still_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    probes(monkeypatch)
    (tmp_path / "file").write_text("")
    (tmp_path / "cache" / FILE).mkdir(parents=True)
    folder = {"none": None, "a file": tmp_path / "file"}.get(place, tmp_path / "cache")
    assert probe_once(mx.float32, 64, folder) == LINEAR
    assert recorded(mx.float32, 64, folder) is None


def test_a_gpu_is_probed_for_a_run_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = probes(monkeypatch)
    monkeypatch.setattr(probing, "on_gpu", lambda: False)
    assert choice_of(mx.bfloat16, 64, tmp_path) is None and not calls
    monkeypatch.setattr(probing, "on_gpu", lambda: True)
    assert choice_of(mx.bfloat16, 64, tmp_path) == Choice("bfloat16", 64, True)
    monkeypatch.setattr(probing, "on_gpu", lambda: False)
    assert choice_of(mx.bfloat16, 64, tmp_path) == Choice("bfloat16", 64, True) and calls == [64]


# ---------------------------------------------------------------------------------------------------
# What follows the choice


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that mlx's attention gets."""
    calls: list[tuple[int, ...]] = []

    def counted(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        calls.append(queries.shape)
        return own(queries, keys, values, **options)

    own = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(room.mx.fast, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize(
    ("choice", "fused"),
    [
        (Choice("float32", 16, True), True),
        (Choice("float32", 16, False), False),
        (Choice("float32", 32, True), False),  # of another head size
        (Choice("bfloat16", 16, True), False),  # of another dtype
        (None, False),
    ],
)
@on_cpu
def test_training_follows_the_choice(kernel: list[tuple[int, ...]], choice: Choice | None, fused: bool) -> None:
    q, k, v = (mx.random.normal((1, heads, 24, 16), key=mx.random.key(heads)) for heads in (4, 2, 2))
    found = attention_in_training(q, k, v, scale=0.25, mask="causal", choice=choice)
    assert bool(kernel) == fused
    assert mx.allclose(found, attention(q, k, v, scale=0.25, mask="causal"), atol=1e-5).item()
    kernel.clear()
    attention_in_training(q, k, v, scale=0.25, mask=mx.zeros((24, 24)), choice=choice)
    assert not kernel  # the probe says nothing about a mask of one's own


def test_the_memory_of_attention_follows_the_choice() -> None:
    sizes: dict[str, Any] = {"workspace": 1 << 24, "size": 4}
    assert peak_bytes(1, 4, 2, 512, 64, gpu=True, fused=True, **sizes) == 0
    tiles = peak_bytes(1, 4, 2, 512, 64, gpu=True, fused=False, **sizes)
    assert tiles > 0 and tiles == peak_bytes(1, 4, 2, 512, 64, gpu=True, **sizes)  # float32: no known kernel


def test_plan_and_objective_follow_the_choice(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(model_dir, text_file, tmp_path / "run", seq_len=96, layers="all", long_weight=0.5, long_seq_len=96)
    inspected, machine = inspect_model(config, model_dir), Machine("test", False, 1 << 40, 100.0)
    monkeypatch.setattr(planning, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(probing, "on_gpu", lambda: False)
    assert attention_choice(config, inspected) is None
    monkeypatch.setattr(probing, "on_gpu", lambda: True)
    probes(monkeypatch)
    choice = attention_choice(config, inspected)
    assert choice == Choice("float32", 16, True)
    plan = plan_run(config, inspected, machine, attention=choice)
    assert plan.step.fused and plan.long_step is not None and plan.long_step.fused
    job = load(plan)
    assert job.objective.attention == choice and job.long is not None and job.long.loss.run.attention == choice
    assert objective_of(config, inspected.model).attention is None


def test_no_home_folder_keeps_nothing(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    config = small(model_dir, text_file, tmp_path / "run")
    monkeypatch.setattr(planning, "cache_directory", no_home)
    monkeypatch.setattr(probing, "on_gpu", lambda: True)
    probes(monkeypatch, QUADRATIC)
    assert attention_choice(config, inspect_model(config, model_dir)) == Choice("float32", 16, False)
