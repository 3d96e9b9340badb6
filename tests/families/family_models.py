"""A tiny config of every family of the table, as its makers would write one for mlx-lm's own model class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_model

WINDOW = 32
FACTOR = 4.0

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 258,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "architectures": None,  # tiny.CONFIG names Llama's
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LINEAR = {
    **{"num_hidden_layers": 4, "full_attention_interval": 2, "partial_rotary_factor": 0.5},
    **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_value_head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
_MROPE: dict[str, Any] = {
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }
}
_MIXED = ["sliding_attention", "full_attention"]
_GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
}

# What a family's config has beside, or instead of, the base.
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "granite": {**_GRANITE, "mlp_bias": False},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0},
    "olmo3": {"sliding_window": 16, "num_hidden_layers": 4},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None, "pad_token_id": 0},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi": {"num_key_value_heads": 4, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": False, "tie_word_embeddings": True},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 0},
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8},
            **{"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        }
    },
    "granitemoe": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": "LG", "layer_types": _MIXED},
    "gpt_oss": {
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "hidden_act": "silu"},
        "layer_types": _MIXED,
    },
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True},
    "cohere2": {
        **{"layer_norm_eps": 1e-5, "logit_scale": 0.25, "tie_word_embeddings": True},
        **{"sliding_window": 16, "sliding_window_pattern": 2},
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
        **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "use_qk_norm": True},
        **{"first_k_dense_replace": 1, "attention_bias": True, "partial_rotary_factor": 0.5, "rope_scaling": None},
    },
    "internlm2": {"bias": False},
    "lfm2": {
        **{"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "tie_word_embeddings": True, "block_dim": 64},
        **{"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True},
        **{"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
    },
    "qwen3_next": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": True},
    "qwen3_5_text": {**_LINEAR, **_MROPE},
    "qwen3_5_moe_text": {**_LINEAR, **_MROPE, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False, "clip_qkv": None},
    "ernie4_5": {"use_bias": True, "pad_token_id": 0},
    "helium": {"attention_bias": False, "mlp_bias": True, "pad_token_id": 0},
    "stablelm": {"layer_norm_eps": 1e-5, "use_qkv_bias": True, "partial_rotary_factor": 0.25, "qk_layernorm": False},
}


# The text models of multimodal configs.
WRAPPED = {
    "gemma3": "gemma3_text",
    "mistral3": "ministral3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
INSIDE = {"qwen3_5_text", "qwen3_5_moe_text"}  # mlx-lm reads them inside such a config only
KINDS = sorted({*OWN, *WRAPPED} - INSIDE)


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """The tiny config of a family, or of a multimodal model of it."""
    if kind in WRAPPED:
        inner = WRAPPED[kind]
        text = {key: value for key, value in config(inner, **changes).items() if value is not None}
        return {"model_type": kind, "architectures": None, "vocab_size": 258, "text_config": text}
    return {**_BASE, "model_type": kind, **OWN[kind], **changes}


def write(folder: Path, kind: str, *, dtype: str = "float32", bits: int | None = None, **changes: Any) -> Path:
    """A directory of the tiny model of a family, with random weights and a byte-level tokenizer."""
    return tiny_model(folder, dtype=dtype, bits=bits, **config(kind, **changes))
