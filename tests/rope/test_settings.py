"""Config keys that mlx-lm ignores: sound values pass, and every other value is refused by name."""

from __future__ import annotations

import pytest

from mlx_linearard.rope import FAMILIES, disagreement, ignored_setting, normalise, scale_rope

FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"


def config(kind="llama", **changes):
    base = {
        "model_type": kind,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    return {**base, **changes}


def refused(kind, key, **changes):
    """Every way to a scaled or converted model names the key."""
    settings = normalise(config(kind, **changes))
    assert key in ignored_setting(settings)
    assert key in disagreement(settings)
    with pytest.raises(ValueError, match=key):
        scale_rope(config(kind, **changes), "ntk", 2.0)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_plain_config_passes(kind):
    settings = normalise(config(kind))
    assert ignored_setting(settings) is None
    assert normalise(settings) == settings
    for key, value in FAMILIES[kind].defaults.items():
        assert settings[key] == ("LLLGLL" if (kind, key) == ("exaone4", "sliding_window_pattern") else value)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_each_fixed_value_passes_and_others_do_not(kind):
    for key, values in FAMILIES[kind].fixed.items():
        for value in (*values, None):
            assert ignored_setting(normalise(config(kind, **{key: value}))) is None
        for value in ("gelu", "relu", True, 2, [], {}, [0], ["silu"], 0.5):
            if value not in values:
                refused(kind, key, **{key: value})


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_attention_is_causal_and_rotates_halves(kind):
    refused(kind, "is_causal", is_causal=False)
    refused(kind, "use_bidirectional_attention", use_bidirectional_attention=True)
    refused(kind, "use_bidirectional_attention", use_bidirectional_attention="all")
    refused(kind, "quantize_activations", quantize_activations=True)
    refused(kind, "rope_traditional", rope_traditional=kind != "glm4")


def test_a_number_is_not_a_truth_value():
    refused("qwen2_moe", "decoder_sparse_step", decoder_sparse_step=True)
    refused("qwen2_moe", "norm_topk_prob", norm_topk_prob=0)


@pytest.mark.parametrize(
    "kind", [kind for kind, row in sorted(FAMILIES.items()) if not row.pattern and kind != "gemma2"]
)
def test_layers_with_a_sliding_window(kind):
    mixed = [SLIDING, FULL] * 3
    assert ignored_setting(normalise(config(kind, layer_types=[FULL] * 6, sliding_window=8))) is None
    refused(kind, "layer_types", layer_types=mixed, sliding_window=8)
    refused(kind, "layer_types", layer_types=[FULL] * 5)
    refused(kind, "layer_types", layer_types="full_attention")
    refused(kind, "layer_types", layer_types=[FULL] * 5 + ["chunked_attention"], sliding_window=4096)
    refused(kind, "layer_types", layer_types=[FULL] * 5 + [None], sliding_window=4096)


def test_a_window_that_begins_to_bind_when_the_model_is_scaled():
    settings = config("llama", layer_types=[SLIDING, FULL] * 3, sliding_window=256)
    assert disagreement(settings) is None
    assert scale_rope(settings, "linear", 2.0)
    with pytest.raises(ValueError, match="layer_types"):
        scale_rope(settings, "linear", 4.0)


def test_the_layers_of_a_hybrid_follow_an_interval():
    def hybrid(**changes):
        return normalise(config("qwen3_next", **changes))

    for interval in (1, 2, 3, 6):
        layer_types = [LINEAR if (i + 1) % interval else FULL for i in range(6)]
        for settings in (hybrid(layer_types=layer_types), hybrid(full_attention_interval=interval)):
            assert settings["full_attention_interval"] == interval and ignored_setting(settings) is None
    for layer_types in ([FULL, LINEAR] * 3, [LINEAR] * 6, [LINEAR, FULL], "full_attention", [SLIDING, FULL] * 3):
        refused("qwen3_next", "layer_types", layer_types=layer_types, full_attention_interval=2)
    for interval in (0, -1, 2.5, True, "6", 7):
        refused("qwen3_next", "full_attention_interval", full_attention_interval=interval)


def test_the_convolutions_of_lfm2_are_named_by_either_key():
    mixed = [CONV, CONV, FULL, CONV, FULL, CONV]
    for settings in (config("lfm2", layer_types=mixed), config("lfm2", full_attn_idxs=[2, 4])):
        said = normalise({**settings, "block_ff_dim": 96})
        assert said["layer_types"] == mixed and said["full_attn_idxs"] == [2, 4] and ignored_setting(said) is None
        assert (said["intermediate_size"], said["block_dim"]) == (96, said["hidden_size"])
    both = normalise(config("lfm2", layer_types=mixed, full_attn_idxs=[0]))  # layer_types win in transformers
    assert both["full_attn_idxs"] == [2, 4]
    assert normalise(config("lfm2"))["full_attn_idxs"] == list(range(6))
    for layer_types in ([CONV] * 6, [FULL], [FULL] * 5 + [SLIDING], "conv"):
        refused("lfm2", "layer_types", layer_types=layer_types)
    refused("lfm2", "tie_embedding", tie_embedding=False)


def test_the_layers_of_gemma3_follow_a_period():
    def gemma(**changes):
        return normalise(config("gemma3_text", sliding_window=32, **changes))

    for period in (1, 2, 3, 6):
        layer_types = [SLIDING if (i + 1) % period else FULL for i in range(6)]
        settings = gemma(layer_types=layer_types)
        assert settings["sliding_window_pattern"] == period and ignored_setting(settings) is None
        settings = gemma(layer_types=layer_types, sliding_window_pattern=4)  # layer_types win in transformers
        assert settings["sliding_window_pattern"] == period
    for layer_types in ([FULL, SLIDING] * 3, [SLIDING] * 6, [SLIDING, FULL, FULL] * 2, [FULL] + [SLIDING] * 5):
        refused("gemma3_text", "layer_types", layer_types=layer_types)
    for period in (0, -1, 2.5, True, "6"):
        refused("gemma3_text", "sliding_window_pattern", layer_types=[SLIDING] * 6, sliding_window_pattern=period)


def test_the_layers_of_exaone4_are_letters():
    def exaone(**changes):
        return normalise(config("exaone4", **changes))

    mixed = [SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL]
    given = {"layer_types": mixed, "sliding_window": 8, "sliding_window_pattern": "LLLG"}
    assert exaone(**given)["sliding_window_pattern"] == "LLLGLG"  # layer_types win in transformers
    assert exaone(sliding_window_pattern=3)["layer_types"] == [SLIDING, SLIDING, FULL] * 2
    assert exaone(sliding_window=None, sliding_window_pattern="LLLG")["sliding_window_pattern"] is None
    assert ignored_setting(exaone(**given)) is None
    refused("exaone4", "layer_types", layer_types=[SLIDING] * 6)
    refused("exaone4", "layer_types", layer_types=[*mixed[:5], "chunked_attention"])
    refused("exaone4", "sliding_window", layer_types=mixed, sliding_window=0)


@pytest.mark.parametrize("kind", ["gpt_oss", "olmo3"])
def test_layers_of_one_kind_only_are_refused_where_mlx_lm_needs_both(kind):
    refused(kind, "both kinds", layer_types=[FULL] * 6, sliding_window=8)


@pytest.mark.parametrize("kind", ["cohere2", "gemma3_text", "gpt_oss", "olmo3"])
@pytest.mark.parametrize("window", [None, 0, -5, True, "512", 3.5])
def test_sliding_layers_need_a_window(kind, window):
    refused(kind, "sliding_window", sliding_window=window)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps(key):
    for value in (None, 0, -1.0, True, "50", float("nan"), 10**400):
        refused("gemma2", key, **{key: value})
    assert ignored_setting(normalise(config("gemma2", **{key: 20.0}))) is None
    for value in (5.0, 30, 0):
        refused("gemma3_text", key, **{key: value})
