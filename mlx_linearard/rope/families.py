"""The one table of the supported model families.

Code, errors, help and docs/families.md read it. Made from the code of mlx-lm 0.32 and transformers 5. Every row has
a tiny model in tests/families, and tests that train, export and compare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import DYNAMIC_TOO, IGNORED, LINEAR_ONLY, PHI3, Family, Values

SILU = ("silu", "swish")
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate")  # one function
OFF = (False,)

# For every family: no supported family of mlx-lm reads these.
ALWAYS: Mapping[str, Values] = {
    "is_causal": (True,),
    "use_bidirectional_attention": OFF,
    "quantize_activations": OFF,  # mlx-lm's loader reads it
    "rope_traditional": OFF,  # mlx-lm's own key: pairs of neighbouring dimensions, which transformers does not rotate
}
_SILU: Mapping[str, Values] = {"hidden_act": SILU}
_TIED: Mapping[str, Values] = {"tie_word_embeddings": (True,)}  # mlx-lm's model has no output head of its own


_GELU = "transformers computes its GELU by tanh, and mlx-lm exactly"
_GRANITE = {
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_bias": False,
}


# Of a layer of gated delta attention, by transformers' defaults.
_LINEAR = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
_GATED: dict[str, Any] = {
    "partial": 0.25,
    "pattern": "interval",
    "rotated": "those with full attention; the layers of linear attention have none",
    "shifted": ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "model.norm"),
}
_QWEN3_5: dict[str, Any] = {**_GATED, "kept": ("mrope_section", "mrope_interleaved")}
_MULTIMODAL: Mapping[str, Values] = {**_SILU, "attn_output_gate": (True,), "mamba_ssm_dtype": ("float32",)}


def _ntk(**row: Any) -> Family:
    return Family(("ntk",), IGNORED, **row)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(fixed=_SILU, architecture="LlamaForCausalLM"),
    "mistral": Family(
        slides="all",
        fixed={**_SILU, "attention_bias": OFF, "mlp_bias": OFF},  # mlx-lm reads its biases as llama's
        architecture="MistralForCausalLM",
    ),
    "qwen2": Family(slides="request", fixed=_SILU, architecture="Qwen2ForCausalLM"),
    "qwen3": Family(slides="request", fixed=_SILU, architecture="Qwen3ForCausalLM"),
    "olmo2": Family(fixed={**_SILU, "mlp_bias": OFF}, architecture="Olmo2ForCausalLM"),
    "granite": Family(
        fixed=_SILU,
        defaults={**_GRANITE, "mlp_bias": False},
        architecture="GraniteForCausalLM",
    ),
    "seed_oss": Family(fixed=_SILU, defaults={"attention_bias": True}, architecture="SeedOssForCausalLM"),
    "smollm3": Family(
        theta=2000000.0,
        rotated="all but those of no_rope_layers",
        slides="request",
        fixed=_SILU,
        architecture="SmolLM3ForCausalLM",
    ),
    "olmo3": Family(
        theta=500000.0,
        nested=True,
        pattern="layer_types",
        fixed=_SILU,
        defaults={"sliding_window": 4096},
        architecture="Olmo3ForCausalLM",
    ),
    "gemma3_text": Family(
        theta=1000000.0,
        nested=True,
        local=10000.0,
        pattern="period",
        fixed={"hidden_activation": GELU_TANH, "attn_logit_softcapping": (), "final_logit_softcapping": ()},
        defaults={"query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6},
        first_token=True,
        architecture="Gemma3ForCausalLM",
    ),
    "phi3": Family(
        ("linear", "ntk", "llama3"),
        PHI3,
        partial=1.0,
        longrope=True,
        slides="all",
        fixed=_SILU,
        projections=("qkv_proj",),
        architecture="Phi3ForCausalLM",
    ),
    "nemotron": Family(
        ("linear", "ntk"),
        LINEAR_ONLY,
        partial=0.5,
        fixed={"hidden_act": ("relu2",)},
        architecture="NemotronForCausalLM",
    ),
    "mixtral": _ntk(
        theta=1000000.0,
        slides="all",
        fixed=_SILU,
        feed_forward="block_sparse_moe",
        experts="w1w2w3",
        architecture="MixtralForCausalLM",
    ),
    "qwen2_moe": _ntk(
        slides="request",
        fixed={
            **_SILU,
            "norm_topk_prob": OFF,
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([],),
            "qkv_bias": (True,),
        },
        experts="list",
        architecture="Qwen2MoeForCausalLM",
    ),
    "qwen3_moe": _ntk(
        slides="request",
        fixed=_SILU,
        defaults={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        experts="list",
        architecture="Qwen3MoeForCausalLM",
    ),
    "gemma2": _ntk(
        slides="some",
        fixed={**_TIED, "hidden_activation": GELU_TANH},
        defaults={
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        first_token=True,
        architecture="Gemma2ForCausalLM",
    ),
    "phi": _ntk(partial=0.5, fixed={"hidden_act": GELU_TANH, "qk_layernorm": OFF}, architecture="PhiForCausalLM"),
    "cohere": _ntk(
        theta=500000.0,
        fixed={**_TIED, **_SILU, "layer_norm_bias": OFF},  # mlx-lm's own key
        architecture="CohereForCausalLM",
    ),
    "glm4": _ntk(
        partial=0.5,
        fixed={**_SILU, "rope_traditional": (True,)},
        defaults={"attention_bias": True},
        architecture="Glm4ForCausalLM",
    ),
    "stablelm": _ntk(partial=0.25, fixed=_SILU, defaults={"use_qkv_bias": False}, architecture="StableLmForCausalLM"),
    "ministral3": Family(
        theta=1000000.0,
        kept=("llama_4_scaling_beta", "original_max_position_embeddings"),
        slides="all",
        fixed={**_SILU, "attention_bias": OFF},
        architecture="Ministral3ForCausalLM",
    ),
    "granitemoe": Family(
        fixed=_SILU,
        defaults=_GRANITE,
        feed_forward="block_sparse_moe",
        experts="joined",
        architecture="GraniteMoeForCausalLM",
    ),
    "exaone4": Family(
        rotated="all, or the sliding layers only if there are any",
        pattern="letters",
        fixed=_SILU,
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
        architecture="Exaone4ForCausalLM",
    ),
    "gpt_oss": Family(
        theta=150000.0,
        pattern="layer_types",
        fixed={**_SILU, "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,), "attention_bias": (True,)},
        defaults={"sliding_window": 128},
        experts="interleaved",
        architecture="GptOssForCausalLM",
        differs="transformers does not round the ends of YaRN's ramp where truncate is false, and mlx-lm does",
        tolerates={"truncate": False},
    ),
    "gemma": _ntk(
        fixed={**_TIED, "hidden_act": ("gelu", *GELU_TANH), "hidden_activation": GELU_TANH, "attention_bias": OFF},
        first_token=True,
        architecture="GemmaForCausalLM",
        differs=_GELU,
    ),
    "starcoder2": _ntk(
        slides="all",
        fixed={"hidden_act": GELU_TANH, "use_bias": (True,)},
        architecture="Starcoder2ForCausalLM",
        differs=_GELU,
    ),
    "cohere2": _ntk(
        rotated="the sliding layers only, so scaling changes little",
        pattern="period",
        fixed={**_TIED, **_SILU, "layer_norm_bias": OFF},
        defaults={"sliding_window": 4096, "sliding_window_pattern": 4},
        architecture="Cohere2ForCausalLM",
    ),
    "glm4_moe": _ntk(
        partial=0.5,
        fixed=_SILU,
        defaults={
            "attention_bias": False,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": False,
        },
        experts="list",
        architecture="Glm4MoeForCausalLM",
    ),
    "olmoe": Family(
        fixed={**_SILU, "clip_qkv": (), "mlp_bias": OFF},
        experts="list",
        architecture="OlmoeForCausalLM",
    ),
    "ernie4_5": _ntk(
        theta=500000.0,
        fixed=_SILU,
        defaults={"head_dim": 128, "use_bias": False},
        architecture="Ernie4_5ForCausalLM",
    ),
    "helium": _ntk(
        theta=100000.0,
        fixed=_SILU,
        defaults={"attention_bias": False, "head_dim": 128, "mlp_bias": False},
        architecture="HeliumForCausalLM",
    ),
    "qwen3_next": Family(
        fixed=_SILU,
        defaults={
            **_LINEAR,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "shared_expert_intermediate_size": 512,
        },
        experts="list",
        architecture="Qwen3NextForCausalLM",
        **_GATED,
    ),
    "qwen3_5_text": Family(fixed=_MULTIMODAL, defaults=_LINEAR, architecture="Qwen3_5ForCausalLM", **_QWEN3_5),
    "qwen3_5_moe_text": Family(
        fixed=_MULTIMODAL, defaults=_LINEAR, experts="list", architecture="Qwen3_5MoeForCausalLM", **_QWEN3_5
    ),
    "lfm2": _ntk(
        theta=1000000.0,
        rotated="those with full attention; the convolutions have none",
        pattern="conv",
        fixed={**_TIED, "tie_embedding": (True,)},
        defaults={
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "conv_bias": False,
            "conv_L_cache": 3,
        },
        feed_forward="feed_forward",
        architecture="Lfm2ForCausalLM",
    ),
    "internlm2": Family(
        ("linear", "ntk"), DYNAMIC_TOO, fixed=_SILU, projections=("wqkv",), feed_forward="feed_forward"
    ),
}

# Multimodal configs of which mlx-lm reads the text model alone: the types that `text_config` may have, the first by
# default.
WRAPPERS: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
}
