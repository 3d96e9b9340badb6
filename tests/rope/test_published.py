"""Configs as their makers publish them are read right: window, native scaling, methods, heads, and planned memory.

published.json has the keys of each config.json on the Hub that decide what a model computes (token ids and versions
of libraries are left out). None was downloaded for this file; the copies come from:

    gpt-oss-20b, Llama-3.2-1B               config.json, checked in unchanged in public repositories
    Ministral-3-3B                          the text_config in mlx-vlm's tests and in mlc-llm; no vision part
    OLMo-2-1B, SmolLM3-3B, gemma-3-1b,      copies in the tests of programs that read them
      granite-3.3-2b, Qwen3-30B-A3B
    Qwen2.5-7B-Instruct-1M                  such a copy, and a report that quotes its dual_chunk_attention_config
    OLMo-3-7B                               a copy cut to 4 layers; here with the 32 that its makers state
    Phi-4-mini                              its sizes and factors, quoted from a named revision by two programs
    Qwen3-4B                                sizes quoted from its config.json; window and flags as in Qwen3-30B-A3B
    GLM-4-9B-0414                           quoted by a converter and vLLM; intermediate_size and vocab_size are the
                                            defaults of transformers' Glm4Config, which are this model's
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plan as planning
import pytest

from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.plan import Plan, inspect_model, plan_run
from mlx_linearard.errors import UserError
from mlx_linearard.machine import Machine
from mlx_linearard.models.shape import Shape
from mlx_linearard.rope import METHODS, native_window, normalise, rotary_dims, scale_rope

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published.json").read_text())
SHAPES = json.loads((planning.FOLDER / "shapes.json").read_text())
USABLE = 2 * (16 << 30) // 3  # bytes: macOS recommends two thirds of 16 GB to the GPU (machine.Machine.limit)
DUAL_CHUNKS = "Qwen/Qwen2.5-7B-Instruct-1M"
FOUR_BITS = 4.5 / 8  # bytes per weight: 4 bits, and 16 bits of scale and of bias for every 64 weights


@dataclass(frozen=True)
class Facts:
    """What is known of a model without this program."""

    window: int
    heads: tuple[int, int, int]  # heads, key-value heads, head size
    rotary: int  # dimensions that rotate
    billions: float  # weights of the text model, as its makers or the Hub state them
    native: tuple[str, float, int] | None = None  # type, factor and original window of its own scaling
    methods: tuple[str, ...] = METHODS
    refusal: str = ""  # of the other methods
    fits: bool = True  # in 4 bits on a Mac with 16 GB


NTK, OVERWRITE, IGNORED = ("ntk",), "which {} would overwrite: use ntk", "ignores rope_scaling"
DUAL = "needs? the dual chunk attention .* set max_position_embeddings to 262144"
FACTS = {
    "Qwen/Qwen3-4B": Facts(40960, (32, 8, 128), 128, 4.02),
    "Qwen/Qwen3-30B-A3B": Facts(40960, (32, 4, 128), 128, 30.5, None, NTK, IGNORED, fits=False),
    "Qwen/Qwen2.5-7B-Instruct-1M": Facts(1010000, (28, 4, 128), 128, 7.62, None, (), DUAL),
    "meta-llama/Llama-3.2-1B": Facts(131072, (32, 8, 64), 64, 1.24, ("llama3", 32, 8192), NTK, OVERWRITE),
    "mistralai/Ministral-3-3B-Instruct-2512": Facts(
        262144, (32, 8, 128), 128, 3.4, ("yarn", 16, 16384), NTK, OVERWRITE
    ),
    "allenai/OLMo-2-0425-1B": Facts(4096, (16, 16, 128), 128, 1.48),
    "allenai/Olmo-3-7B-Think": Facts(65536, (32, 32, 128), 128, 7.3, ("yarn", 8, 8192), NTK, OVERWRITE),
    "microsoft/Phi-4-mini-instruct": Facts(
        131072, (24, 8, 128), 96, 3.84, ("longrope", 32, 4096), (), "short factors|no attention factor"
    ),
    "google/gemma-3-1b-it": Facts(32768, (4, 1, 256), 256, 1.0),
    "HuggingFaceTB/SmolLM3-3B": Facts(65536, (16, 4, 128), 128, 3.08),
    "ibm-granite/granite-3.3-2b-instruct": Facts(131072, (32, 8, 64), 64, 2.53),
    "openai/gpt-oss-20b": Facts(131072, (64, 8, 64), 64, 20.9, ("yarn", 32, 4096), NTK, OVERWRITE, fits=False),
    "zai-org/GLM-4-9B-0414": Facts(32768, (32, 2, 128), 64, 9.4, None, NTK, IGNORED),
}


@pytest.fixture(params=FACTS, ids=lambda name: name.rpartition("/")[2])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE of full-attention layers."""
    parameters = normalise(config)["rope_parameters"]
    return parameters.get("full_attention", parameters)


def test_the_issue_s_models_are_all_here() -> None:
    assert PUBLISHED.keys() == FACTS.keys() and len(FACTS) == 13


def test_window_and_heads(name: str) -> None:
    config, facts = PUBLISHED[name], FACTS[name]
    shape = Shape.of(normalise(config))
    assert native_window(config) == facts.window
    assert (shape.heads, shape.kv_heads, shape.head_dim) == facts.heads
    assert rotary_dims(normalise(config)) == facts.rotary


def test_native_scaling(name: str) -> None:
    rope, native = rope_of(PUBLISHED[name]), FACTS[name].native
    assert rope["rope_type"] == (native[0] if native else "default")
    if native is None:
        return
    assert rope["original_max_position_embeddings"] == native[2]
    if native[0] == "longrope":
        assert len(rope["long_factor"]) == len(rope["short_factor"]) == FACTS[name].rotary // 2
        assert FACTS[name].window == native[1] * native[2]
    else:
        assert rope["factor"] == native[1]
    if native[0] == "yarn":
        assert (rope["beta_fast"], rope["beta_slow"]) == (32, 1)


@pytest.mark.parametrize("method", METHODS)
def test_methods(name: str, method: str) -> None:
    config, facts = PUBLISHED[name], FACTS[name]
    if method not in facts.methods:
        with pytest.raises(ValueError, match=facts.refusal.format(method)):
            scale_rope(config, method, 4.0)
        return
    scaled, before = scale_rope(config, method, 4.0), rope_of(config)
    after = rope_of(scaled)
    assert native_window(scaled) == 4 * facts.window
    if method == "ntk":  # theta grows, and everything else stays
        growth = 4.0 ** (facts.rotary / (facts.rotary - 2))
        assert after == {**before, "rope_theta": pytest.approx(before["rope_theta"] * growth)}
        return
    assert (after["rope_type"], after["factor"], after["rope_theta"]) == (method, 4.0, before["rope_theta"])
    if method in ("yarn", "llama3"):
        assert after["original_max_position_embeddings"] == facts.window


def test_yarn_s_betas_are_written(name: str) -> None:
    if "yarn" not in FACTS[name].methods:
        return
    after = rope_of(scale_rope(PUBLISHED[name], "yarn", 4.0, beta_fast=16.0, beta_slow=2.0))
    assert (after["beta_fast"], after["beta_slow"]) == (16.0, 2.0)


def planned(config: dict[str, Any], method: str, folder: Path) -> Plan:
    """The plan of a run with the model in 4 bits on a Mac with 16 GB."""
    model = planning.empty_model(folder / "model", {**config, "quantization": {"group_size": 64, "bits": 4}})
    options = DistillConfig(
        model=str(model), data="text.txt", output=str(folder / "run"), method=method, factor=2.0, dtype="bfloat16"
    )
    machine = Machine("an Apple GPU with 16 GB", gpu=True, memory=16 << 30, gflops=3000.0, limit=USABLE)
    return plan_run(options, inspect_model(options, model), machine)


def test_planned_memory_on_a_mac_with_16_gb(name: str, tmp_path: Path) -> None:
    facts, config = FACTS[name], PUBLISHED[name]
    if name == DUAL_CHUNKS:
        with pytest.raises(UserError, match=facts.refusal):
            planned(config, "yarn", tmp_path / "as published")
        config = without_dual_chunks()
    elif not facts.methods:
        with pytest.raises(UserError, match=facts.refusal):
            planned(config, "ntk", tmp_path)
        return
    plan = planned(config, "yarn" if "yarn" in facts.methods else "ntk", tmp_path)
    assert plan.memory.weights == pytest.approx(facts.billions * 1e9 * FOUR_BITS, rel=0.025)
    hidden = plan.step.layers * plan.step.tokens * Shape.of(normalise(config)).width * 2  # before each layer, bfloat16
    assert plan.memory.total > plan.memory.weights + hidden
    assert facts.fits == (plan.memory.total <= USABLE)
    if facts.fits:
        plan.check()
        return
    with pytest.raises(UserError, match=r"needs about [\d.]+ GB and this machine has 11\.45"):
        plan.check()


def without_dual_chunks() -> dict[str, Any]:
    """Qwen2.5-1M as the refusal says to change it."""
    config = {**PUBLISHED[DUAL_CHUNKS], "max_position_embeddings": 262144}
    del config["dual_chunk_attention_config"]
    return config


def test_without_dual_chunk_attention_qwen_1m_is_scaled() -> None:
    assert native_window(scale_rope(without_dual_chunks(), "yarn", 2.0)) == 524288


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() & SHAPES.keys()))
def test_the_recipes_shapes_are_the_published_ones(name: str) -> None:
    published = PUBLISHED[name]
    assert {key: published[key] for key in SHAPES[name]} == SHAPES[name]
