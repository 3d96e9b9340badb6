"""The model families that mlx-lm has and this tool refuses, each with what is missing.

The keys are mlx-lm's names: a model_type of a config, or of the file that mlx-lm reads it with. A test checks that
every architecture of the installed mlx-lm is here or in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .families import WRAPPERS

_LATENT = "its attention is multi-head latent attention, whose keys and values are compressed: it has no plain q, k, v"
_STATE = "its state-space or recurrent layers have no gradient in linear memory here, as gated delta attention has"
_NO_ROPE = "it has no RoPE to scale: its state-space layers alone tell positions apart"
_ONLY_STATE = "it has no attention and no RoPE, only state-space or linear-attention layers"
_MULTIMODAL = f"it is multimodal, and of such configs only {', '.join(sorted(WRAPPERS))} are read, for their text model"
_POSITIONS = "it has learned positions and no RoPE to scale"
_LAYOUT = "its attention is not made of plain q, k, v projections that see each position once"
_UNCOMPARED = "transformers has no such model to compare it with, so nothing shows which config keys mlx-lm ignores"
_UNCHECKED = "its config keys were not compared with transformers yet, so mlx-lm may ignore some of them in silence"

_GROUPS: Mapping[str, tuple[str, ...]] = {
    _LATENT: (
        "bailing_hybrid", "bailing_moe_v3", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41",
        "deepseek_v41_text", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash", "kimi_k2", "kimi_k25", "kimi_k3",
        "kimi_linear", "kimi_vl", "longcat_flash", "longcat_flash_ngram", "minicpm3", "mistral4", "youtu_llm",
    ),
    _STATE: ("falcon_h1", "granitemoehybrid", "recurrent_gemma"),
    _NO_ROPE: ("jamba", "nemotron_h"),
    _ONLY_STATE: ("falcon_mamba", "mamba", "mamba2", "rwkv7"),
    _MULTIMODAL: (
        "gemma3n", "gemma4", "gemma4_unified", "lfm2-vl", "llama4", "llava", "minimax_m3_vl",
        "muse_glimmer", "muse_spark", "pixtral", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe",
    ),
    _POSITIONS: ("gpt2", "gpt_bigcode"),
    _LAYOUT: ("afm7", "baichuan_m1", "iquestloopcoder", "nemotron-nas", "openelm", "phi3small"),
    _UNCOMPARED: (
        "Klear", "bailing_moe", "bailing_moe_linear", "bitnet", "deepseek", "gear", "hunyuan", "lille-130m", "mimo",
        "minicpm", "nanbeige", "phi-msft", "phixtral", "plamo", "plamo2", "plamo3", "prism_hadamard_qwen35", "qwen",
        "spark2_5", "step3p5", "talkie", "telechat3", "xverse",
    ),
    _UNCHECKED: (
        "afmoe", "dbrx", "dots1", "exaone_moe", "gptj", "hunyuan_v1_dense", "internlm3", "iquestcoder", "laguna",
        "lfm2_moe", "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "nanochat",
        "olmo_hybrid", "phimoe", "solar_open",
    ),
    "mlx-lm leaves out the correction of its routers that transformers applies, so both choose other experts": (
        "ernie4_5_moe",
    ),
    "its config says by other names what scaling reads, such as num_layers and rotary_emb_base": ("exaone", "gpt_neox"),
    "the numbers of its activation have another shape in mlx-lm's files than in transformers'": ("apertus",),
    "mlx-lm rotates whole heads and transformers half of each": ("glm",),
    "mlx-lm reads it only in its own layout and with another package": ("olmo",),
    "its layers hand keys and values on to later layers, so they are no plain sequence": ("gemma4_text",),
}  # fmt: skip

REFUSED: Mapping[str, str] = {name: reason for reason, names in _GROUPS.items() for name in names}
