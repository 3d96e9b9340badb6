"""The sizes of a model that decide its memory and speed, read from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ops.mlp import active_width, kept_width, width_of


@dataclass(frozen=True)
class LinearAttention:
    """The sizes of the layers of gated delta attention (`ops.gated_delta`)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    share: float  # of all layers

    @classmethod
    def of(cls, config: dict[str, Any]) -> LinearAttention | None:
        """The sizes in `config`; None for a model without such layers."""
        names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        if any(config.get(name) is None for name in names):
            return None
        key_heads, value_heads, key_dim, value_dim = (int(config[name]) for name in names)
        return cls(key_heads, value_heads, key_dim, value_dim, 1 - 1 / int(config["full_attention_interval"]))

    @property
    def keys(self) -> int:
        """The width of the keys, and of the queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide memory, read from a Hugging Face config."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the widest feed-forward part; in a mixture, those of a position's experts added
    ffn_held: int  # the width that decides memory (ops.mlp.width_of)
    ffn_kept: int  # the numbers per position that a layer keeps, if it does (ops.mlp.kept_width)
    vocabulary: int
    tied: bool
    linear: LinearAttention | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """The sizes in `config`. Missing sizes are derived as transformers derives them."""
        width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            width=width,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or width // heads),
            ffn=active_width(config),
            ffn_held=width_of(config),
            ffn_kept=kept_width(config),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            linear=LinearAttention.of(config),
        )

    @property
    def block_weights(self) -> int:
        """The number of weights in the matrix products of one token, without the output head."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.kv_heads)
        if self.linear:
            linear = self.width * (2 * self.linear.keys + 3 * self.linear.values)
            attention = round(attention + self.linear.share * (linear - attention))
        return self.layers * (attention + 3 * self.width * self.ffn)

    def heads_of(self, relations: str) -> list[int]:
        """The number of heads of each relation of `relations`."""
        return [self.heads if name == "q" else self.kv_heads for name in relations]
