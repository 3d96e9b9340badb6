"""How much memory a run will need, from a model's config alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide memory, read from a Hugging Face config."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The sizes in `config`; missing ones as transformers derives them."""
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            width=width,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            ffn=int(config.get("intermediate_size") or 4 * width),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def block_weights(self) -> int:
        """Weights of matrix products that a token passes, without the head."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn)

    @property
    def weights(self) -> int:
        """All weights, embedding and head included; norms are nothing beside them."""
        return self.block_weights + self.vocabulary * self.width * (1 if self.tied else 2)

    def qkv_outputs(self) -> tuple[int, int, int]:
        """Output widths of the q, k and v projections."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, at the fullest moment of a step."""

    weights: int
    adapters: int  # with gradients and the optimizer's two moments
    hidden: int  # each layer's input, kept for the backward pass
    layer: int  # what one layer needs while it is recomputed
    tiles: int  # scores and logits, bounded by the workspace

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.hidden + self.layer + self.tiles

    def line(self) -> str:
        """The plan in one line, in MB."""
        parts = ", ".join(f"{name} {getattr(self, name) / 1e6:.0f}" for name in self.__dataclass_fields__)
        return f"about {self.total / 1e9:.2f} GB of memory (MB: {parts})"


def plan_memory(
    config: dict[str, Any],
    *,
    tokens: int,
    seq_len: int,
    dtype: str,
    fine_tune_type: str,
    rank: int,
    logits: bool,
    workspace_bytes: int,
) -> MemoryPlan:
    """Estimate a step's peak for `tokens` = batch size x block length a forward pass."""
    shape, size = Shape.of(config), BYTES.get(dtype, 2)
    scores = 3 * FLOAT32 * shape.heads * tokens * seq_len
    head = 6 * FLOAT32 * tokens * shape.vocabulary if logits else 0
    return MemoryPlan(
        weights=_weight_bytes(config, shape, size),
        adapters=4 * FLOAT32 * _trainable(shape, fine_tune_type, rank),
        hidden=shape.layers * tokens * shape.width * size,
        layer=tokens * (4 * shape.ffn + 10 * shape.width) * size,
        tiles=min(workspace_bytes, max(scores, head)),
    )


def _weight_bytes(config: dict[str, Any], shape: Shape, size: int) -> int:
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return shape.weights * size
    bits = quantization["bits"] + 2 * 8 * size / quantization["group_size"]  # a scale and a bias a group
    return int(shape.weights * bits / 8)


def _trainable(shape: Shape, fine_tune_type: str, rank: int) -> int:
    outputs = shape.qkv_outputs()
    if fine_tune_type == "full":
        return shape.layers * shape.width * sum(outputs)
    magnitudes = sum(outputs) if fine_tune_type == "dora" else 0
    return shape.layers * (sum(rank * (shape.width + n) for n in outputs) + magnitudes)
