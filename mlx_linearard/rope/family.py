"""What one row of the table of model families says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METHODS = ("linear", "ntk", "yarn", "llama3")

Values = tuple[Any, ...]

IGNORED = "mlx-lm's {} ignores rope_scaling, so the scaling would be lost silently; use ntk"
LINEAR_ONLY = "mlx-lm's {} reads linear scaling only; use linear or ntk"
DYNAMIC_TOO = "mlx-lm's {} reads linear and dynamic scaling only; use linear or ntk"
PHI3 = "{} can write per-frequency factors but no attention factor of its own; use linear, ntk or llama3"

SEPARATE = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """What mlx-lm and transformers do with one model_type.

    RoPE:
    methods  the methods of `METHODS` under which both libraries compute the same rotation
    refusal  why the other methods are refused ({} is replaced by the model_type)
    theta    the theta that transformers assumes if a config names none
    partial  the partial_rotary_factor that transformers assumes; None if the family has none
    nested   rope_parameters are kept per layer type, and only full-attention layers are scaled
    local    the theta of sliding layers if they have one of their own (the key is rope_local_base_freq)
    longrope scalings are written as longrope factors, the only type that transformers accepts here
    kept     parameters of RoPE that mean something else too, and stay under every scaling
    rotated  the layers with RoPE, in words

    Sliding windows:
    pattern   how mlx-lm is told which layers slide: "layer_types", "period" (sliding_window_pattern n: every n-th
              layer has full attention), "letters" (sliding_window_pattern: L for a sliding layer, G for another),
              "interval" (full_attention_interval n: every n-th layer has full attention, and the others linear
              attention, which does not slide), "conv" (full_attn_idxs: the layers with full attention; the others are
              convolutions); "" if every layer must have full attention
    slides    where transformers applies sliding_window and mlx-lm does not: on "all" or "some" layers, on
              "request" (use_sliding_window), or nowhere ("")

    Config keys beside RoPE that change what a model computes:
    fixed    key -> the values for which mlx-lm computes the same as transformers; the first is the usual one. A
             key with any other value is refused by name, because the logits would differ silently. A key that is
             missing or null has the default of transformers.
    defaults key -> the default of transformers, if mlx-lm has another one

    Parts of a layer, by mlx-lm's names:
    projections  the linear layers that make q, k and v
    feed_forward the position-wise part
    experts      how transformers' files keep the experts of a mixture, which mlx-lm stacks into one tensor per
                 projection: "list" (one tensor each), "w1w2w3" (the same with Mixtral's names), "joined" (gate and up
                 in one tensor) or "interleaved" (the same, row by row); "" without experts
    shifted      the norms whose weights transformers' files hold less 1

    Text:
    first_token every text must begin with the tokenizer's first token, because the model computes nonsense without it

    transformers:
    architecture the class that transformers loads it with; "" if transformers has no such model
    differs      what transformers computes otherwise, so that only mlx-lm gives exactly the exported model; ""
                 if both compute the same
    tolerates    parameters of RoPE and the values under which alone the libraries differ so
    """

    methods: tuple[str, ...] = METHODS
    refusal: str = ""
    theta: float = 10000.0
    partial: float | None = None
    nested: bool = False
    local: float | None = None
    longrope: bool = False
    kept: tuple[str, ...] = ()
    rotated: str = "all"
    pattern: str = ""
    slides: str = ""
    fixed: Mapping[str, Values] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    projections: tuple[str, ...] = SEPARATE
    feed_forward: str = "mlp"
    experts: str = ""
    shifted: tuple[str, ...] = ()
    first_token: bool = False
    architecture: str = ""
    differs: str = ""
    tolerates: Mapping[str, Any] = field(default_factory=dict)
