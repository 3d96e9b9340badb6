"""RoPE configs: both spellings, every method, every refusal, against mlx-lm's own frequencies."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import initialize_rope

from mlx_linearard.rope import (
    FAMILIES,
    METHODS,
    attention_factor,
    disagreement,
    inverse_frequencies,
    native_window,
    normalise,
    rotary_dims,
    scale_rope,
)

FULL = "full_attention"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(kind="llama", **over):
    base = {
        "model_type": kind,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rope_theta": 50000.0,
    }
    return {**base, **over}


def v4(both):
    return {key: value for key, value in both.items() if key != "rope_parameters"}


def v5(both):
    gone = ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor")
    return {key: value for key, value in both.items() if key not in gone}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
@pytest.mark.parametrize("method", METHODS)
def test_each_spelling_alone_means_both(kind, method):
    native = config(kind)
    if method not in FAMILIES[kind].methods:
        with pytest.raises(ValueError, match=f"{kind} does not honour {method}: .*use"):
            scale_rope(native, method, 4.0)
        return
    before = copy.deepcopy(native)
    both = scale_rope(native, method, 4.0)
    assert native == before
    assert both["max_position_embeddings"] == 8192
    assert normalise(both) == both
    assert normalise(v4(both)) == both
    assert normalise(v5(both)) == both
    assert disagreement(both) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1.5, 4, 32.0])
def test_frequencies_agree_with_mlx_lm(method, factor):
    scaled = scale_rope(config(), method, factor)
    rope = initialize_rope(64, scaled["rope_theta"], False, scaled["rope_scaling"], 2048)
    ours = inverse_frequencies(scaled)[FULL]
    assert ours.dtype == np.float64
    if hasattr(rope, "_freqs"):  # yarn and llama3; the others are one line of arithmetic
        np.testing.assert_allclose(1 / np.array(rope._freqs), ours, rtol=1e-5, atol=1e-9)
    else:
        theirs = rope.scale * rope.base ** (-np.arange(0, 64, 2) / 64)
        np.testing.assert_allclose(theirs, ours, rtol=1e-12)
    assert attention_factor(scaled) == pytest.approx(getattr(rope, "mscale", 1.0), rel=1e-12)


def test_what_each_method_writes():
    linear = scale_rope(config(), "linear", 4)
    assert linear["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert isinstance(linear["rope_scaling"]["factor"], float)
    assert linear["rope_parameters"] == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    ntk = scale_rope(config(), "ntk", 4.0)
    assert ntk["rope_scaling"] is None
    assert ntk["rope_theta"] == ntk["rope_parameters"]["rope_theta"] == 50000.0 * 4 ** (64 / 62)
    for method in ("yarn", "llama3"):
        written = scale_rope(config(), method, 4.0)["rope_scaling"]
        assert written["original_max_position_embeddings"] == 2048
        assert not {"attention_factor", "truncate", "mscale", "mscale_all_dim"} & set(written)


@pytest.mark.parametrize("factor", [1, 1.0, 0.5, -2, 0, math.nan, math.inf, "4", None, True])
def test_a_factor_that_does_not_lengthen_the_window_is_refused(factor):
    with pytest.raises(ValueError, match="factor must be"):
        scale_rope(config(), "linear", factor)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown method 'dynamic': choose one of linear, ntk, yarn, llama3"):
        scale_rope(config(), "dynamic", 2.0)
    with pytest.raises(ValueError, match=r"'mambo': it is not among .*llama"):
        scale_rope(config("mambo"), "ntk", 2.0)
    with pytest.raises(ValueError, match="no model_type"):
        scale_rope({}, "ntk", 2.0)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        scale_rope({**config(), "max_position_embeddings": None}, "ntk", 2.0)
    with pytest.raises(ValueError, match="rotates whole heads"):
        scale_rope(config("glm"), "ntk", 2.0)


def test_a_native_scaling_is_composed_with_ntk_or_refused():
    native = config(max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=LLAMA3)
    assert native_window(native) == 131072
    for method in ("linear", "yarn", "llama3"):
        with pytest.raises(ValueError, match="already carries a llama3 scaling"):
            scale_rope(native, method, 2.0)
    composed = scale_rope(native, "ntk", 2.0)
    assert composed["rope_scaling"] == {"type": "llama3", **LLAMA3}
    assert composed["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0 * 2 ** (64 / 62)}
    assert composed["max_position_embeddings"] == 262144
    for scaling in ({"type": "dynamic", "factor": 2.0}, {"type": "longrope", "long_factor": [1.0] * 32}):
        with pytest.raises(ValueError):
            scale_rope(config(rope_scaling=scaling), "ntk", 2.0)


def test_phi3_writes_linear_and_llama3_as_longrope_factors():
    for method in ("linear", "llama3"):
        phi = scale_rope(config("phi3"), method, 4.0)
        assert phi["rope_scaling"]["type"] == "longrope"
        assert phi["original_max_position_embeddings"] == phi["max_position_embeddings"] == 8192
        assert attention_factor(phi) == 1.0
        expected = inverse_frequencies(scale_rope(config(), method, 4.0))[FULL]
        np.testing.assert_allclose(inverse_frequencies(phi)[FULL], expected, rtol=1e-12)


def test_partial_rotation_counts_the_rotated_dimensions_only():
    phi = config("phi3", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75})
    assert rotary_dims(phi) == 48
    assert normalise(phi)["partial_rotary_factor"] == 0.75
    assert scale_rope(phi, "ntk", 4.0)["rope_theta"] == 50000.0 * 4 ** (48 / 46)


def test_gemma3_scales_its_global_layers_only():
    gemma = config("gemma3_text", head_dim=64, sliding_window=512, rope_local_base_freq=12345.0)
    scaled = scale_rope(gemma, "linear", 8.0)
    before, after = inverse_frequencies(gemma), inverse_frequencies(scaled)
    np.testing.assert_array_equal(before["sliding_attention"], after["sliding_attention"])
    np.testing.assert_allclose(after[FULL], before[FULL] / 8, rtol=1e-12)
    assert scaled["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 12345.0}


def test_a_disagreement_of_the_libraries_is_refused_with_the_reason():
    mistral = config("mistral", sliding_window=1024)
    assert "sliding window of 1024" in disagreement(mistral)
    with pytest.raises(ValueError, match="sliding_window to null"):
        scale_rope(mistral, "linear", 2.0)
    assert normalise(config("mistral", sliding_window=4096))["sliding_window"] is None
    assert "sliding_window" in normalise(config("mistral"))  # transformers would assume 4096
    yarn = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}
    assert "attention_factor" in disagreement(config(rope_scaling=yarn))
    default = {**yarn, "attention_factor": 0.1 * math.log(4.0) + 1}
    assert disagreement(config(rope_scaling=default)) is None
    long = {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    assert "short factors" in disagreement(config("phi3", rope_scaling=long))
    assert "not read by mlx-lm's mixtral" in disagreement(config("mixtral", rope_scaling=LLAMA3))


def test_a_scaling_without_an_original_window_gets_the_window_of_the_model():
    yarn = normalise(config(rope_scaling={"type": "yarn", "factor": 4}))
    assert yarn["rope_scaling"]["original_max_position_embeddings"] == 2048  # mlx-lm would assume 4096


_values = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(), st.text(max_size=4))
_dicts = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "rope_theta", "long_factor", "full_attention", "truncate"]),
    st.one_of(_values, st.sampled_from(["linear", "yarn", "llama3", "longrope", "default"]), st.just({})),
)


@given(
    kind=st.sampled_from(sorted(FAMILIES)),
    scaling=st.one_of(_values, _dicts),
    parameters=st.one_of(_values, _dicts),
    theta=_values,
    method=st.sampled_from(METHODS),
)
@settings(max_examples=200, deadline=None)
def test_nonsense_raises_nothing_but_value_errors(kind, scaling, parameters, theta, method):
    odd = config(kind, rope_scaling=scaling, rope_parameters=parameters, rope_theta=theta)
    try:
        scaled = scale_rope(odd, method, 2.0)
    except ValueError:
        return
    assert normalise(scaled) == scaled
    assert scaled["max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 1}, "rope_theta must be greater than 1"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 0}}, "beta_slow must be greater than 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": [1]}}, "beta_fast must be a finite number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor must be greater"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [{}] * 32}}, "long_factor must be a finite number"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 31}}, "long_factor must hold 32 numbers"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' has no fixed frequencies"),
    ],
)
def test_parameters_without_frequencies_raise_value_errors(changes, said):
    with pytest.raises(ValueError, match=said):
        inverse_frequencies(config(**changes))
