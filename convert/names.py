"""Tables of names: ggml's tensor types by number, and the names of a llama GGUF file's tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

# ggml's tensor types by number (ggml.h), - for a number that is not used; gguf_blocks.py has those that are read.
_GGML = (
    "F32 F16 Q4_0 Q4_1 - - Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 - - - TQ1_0 TQ2_0 - - - MXFP4"
)
GGML_TYPES = {number: name for number, name in enumerate(_GGML.split()) if name != "-"}

# The tensors of a llama GGUF file, outside and inside its blocks.
GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
GGUF_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # of Qwen 3
_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def from_gguf(name: str) -> str | None:
    """The Hugging Face name of a llama GGUF file's tensor; None if llama has no such tensor."""
    if name in GGUF_TOP:
        return GGUF_TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in GGUF_BLOCK:
        return None
    return f"model.layers.{int(match[1])}.{GGUF_BLOCK[match[2]]}.{match[3]}"


def to_gguf(name: str, more: Collection[str] = ()) -> str | None:
    """The name in a GGUF file of a tensor with Hugging Face's name; None if llama has no such tensor.

    `more` are the tensors of a block that another architecture has beside llama's.
    """
    for theirs, ours in GGUF_TOP.items():
        if ours == name:
            return theirs
    match = _LAYER.fullmatch(name)
    for theirs, ours in (*GGUF_BLOCK.items(), *((key, GGUF_NORMS[key]) for key in more)):
        if match and ours == match[2]:
            return f"blk.{int(match[1])}.{theirs}.{match[3]}"
    return None
