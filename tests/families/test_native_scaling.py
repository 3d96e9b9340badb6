"""A scaling that a model already has: composed with ntk, the same in stock mlx-lm and in transformers, or refused."""

from __future__ import annotations

from pathlib import Path

import family_models
import numpy as np
import pytest
from test_families import WINDOW, logits, torch_logits_of
from tiny import reload

from mlx_linearard.errors import UserError
from mlx_linearard.models.pair import load_pair
from mlx_linearard.rope import scale_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}

# family, the scaling that its makers publish, the method on top of it
COMPOSED = [
    ("llama", LLAMA3, "ntk"),  # Llama 3.1 and later
    ("exaone4", LLAMA3, "ntk"),
    ("qwen2", YARN, "ntk"),
    ("qwen3", YARN, "ntk"),
    ("qwen3", None, "yarn"),
    ("olmo3", YARN, "ntk"),
    ("gpt_oss", YARN, "ntk"),
    ("gemma3_text", LINEAR, "ntk"),  # Gemma 3 of 4B and more
    ("gemma3", LINEAR, "ntk"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "native", "method"), COMPOSED)
def test_a_composition_is_the_same_everywhere(tmp_path: Path, kind: str, native: dict | None, method: str) -> None:
    from mlx_linearard.convert.hf import scale

    folder = family_models.write(tmp_path / "native", kind, rope_scaling=native)
    pair = load_pair(folder, method=method, factor=4.0, lora_rank=4)
    scale(folder, tmp_path / "scaled", method=method, factor=4.0)
    ours, student = logits(reload(tmp_path / "scaled")), logits(pair.student)
    theirs = torch_logits_of(tmp_path / "scaled", tmp_path / "theirs")
    assert np.abs(ours - student).max() < 1e-5
    assert np.abs(ours - logits(pair.teacher)).max() > 1e-2
    assert np.abs(ours - theirs)[:WINDOW].max() < 1e-4
    assert np.abs(ours - theirs)[WINDOW:].max() < 1e-4


@pytest.mark.parametrize(("kind", "native", "_"), [case for case in COMPOSED if case[1] and case[0] != "gemma3"])
@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_nothing_else_overwrites_a_native_scaling(kind: str, native: dict, _: str, method: str) -> None:
    with pytest.raises(ValueError, match=f"already carries a {native['rope_type']} scaling"):
        scale_rope(family_models.config(kind, rope_scaling=native), method, 2.0)


@pytest.mark.parametrize("method", ["linear", "ntk", "llama3"])
def test_phi_longrope_is_refused_with_the_reason(tmp_path: Path, method: str) -> None:
    """Phi 3 128k and Phi 4 mini: transformers switches the factors at the original window, and mlx-lm does not."""
    folder = family_models.write(tmp_path / "phi", "phi3", rope_scaling=LONGROPE, original_max_position_embeddings=16)
    with pytest.raises(UserError, match="longrope uses the short factors up to the original window in transformers"):
        load_pair(folder, method=method, factor=2.0)


def test_the_queries_of_ministral3_keep_their_original_window() -> None:
    native = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    config = family_models.config("ministral3", rope_parameters={**native, "original_max_position_embeddings": 16})
    with pytest.raises(ValueError, match="scales its queries by its original_max_position_embeddings of 16"):
        scale_rope(config, "yarn", 4.0)
    kept = scale_rope(config, "linear", 4.0)["rope_parameters"]
    assert (kept["llama_4_scaling_beta"], kept["original_max_position_embeddings"]) == (0.1, 16)
