"""The block types of ggml's tensors: the layout of each type in a file, and its values.

A tensor's last axis is cut into blocks of 1, 32 or 256 values. Layouts and formulas follow ggml (ggml-common.h and
ggml-quants.c); the k-quants' superblocks of 256 values hold a scale, and often a minimum, for each sub-block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The value of each 4-bit code of IQ4_NL and IQ4_XS, before the scale.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


@dataclass(frozen=True)
class Block:
    """One ggml type: values per block, the block's numpy layout, and its dequantization.

    values maps blocks (N,) of the layout to float32 values (N, size).
    """

    size: int
    layout: np.dtype
    values: Callable[[np.ndarray], np.ndarray]


def _bfloat16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.astype(np.uint32) << 16).view(np.float32)


def _float(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


def _column(blocks: np.ndarray, name: str) -> np.ndarray:
    """A block's own number (d, m or dmin) as float32 (N, 1)."""
    return blocks[name].astype(np.float32)[:, None]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Bytes (..., B) as their low halves and then their high halves (..., 2 B)."""
    return np.concatenate([codes & 0x0F, codes >> 4], axis=-1)


def _fields(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes (..., B) as 8 / bits fields of `bits` bits, the lowest first: (..., 8 / bits, B)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return codes[..., None, :] >> shifts & ((1 << bits) - 1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["q"] * _column(blocks, "d")


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_nibbles(blocks["q"]).astype(np.float32) - 8) * _column(blocks, "d")


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks["q"]) * _column(blocks, "d") + _column(blocks, "m")


def _five_bits(blocks: np.ndarray) -> np.ndarray:
    """The codes 0 to 31 of Q5_0 and Q5_1 (N, 32): bit i of `h` is the fifth bit of value i."""
    fifth = np.unpackbits(blocks["h"], axis=-1, bitorder="little")
    return (_nibbles(blocks["q"]) | fifth << 4).astype(np.float32)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return (_five_bits(blocks) - 16) * _column(blocks, "d")


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    return _five_bits(blocks) * _column(blocks, "d") + _column(blocks, "m")


def _scaled(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """Codes (N, 256) times their sub-block's scale (N, S), less its minimum (N, S)."""
    codes = codes.astype(np.float32).reshape(*scales.shape, -1) * scales[..., None]
    return (codes if minima is None else codes - minima[..., None]).reshape(len(codes), -1)


def _two_bits(blocks: np.ndarray) -> np.ndarray:
    """The 2-bit codes of Q2_K and Q3_K, (N, 2, 4, 32): in each half, 32 bytes hold four rows of 32 values."""
    return _fields(blocks["q"].reshape(-1, 2, 32), 2)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales = _column(blocks, "d") * (blocks["scales"] & 0x0F)
    minima = _column(blocks, "dmin") * (blocks["scales"] >> 4)
    return _scaled(_two_bits(blocks), scales, minima)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks["scales"]
    high = _fields(packed[:, 8:], 2).reshape(-1, 16)  # the upper two of each scale's six bits
    scales = (_nibbles(packed[:, :8]) | high << 4).astype(np.float32) - 32
    third = _fields(blocks["h"], 1).reshape(-1, 2, 4, 32)
    codes = (_two_bits(blocks) | third << 2).astype(np.float32) - 4
    return _scaled(codes, _column(blocks, "d") * scales)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima (N, 8) of Q4_K and Q5_K, six bits each in 12 bytes."""
    first, second, third = np.split(blocks["scales"], 3, axis=1)
    scales = np.concatenate([first & 0x3F, third & 0x0F | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 0x3F, third >> 4 | second >> 6 << 4], axis=1)
    return _column(blocks, "d") * scales, _column(blocks, "dmin") * minima


def _four_bits(blocks: np.ndarray) -> np.ndarray:
    """The 4-bit codes of Q4_K and Q5_K (N, 8, 32): 32 bytes hold two sub-blocks."""
    return _fields(blocks["q"].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _scaled(_four_bits(blocks), *_scales_and_minima(blocks))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    return _scaled(_four_bits(blocks) | _fields(blocks["h"], 1) << 4, *_scales_and_minima(blocks))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _fields(blocks["q"].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    codes = (low | _fields(blocks["h"].reshape(-1, 2, 32), 2) << 4).astype(np.float32) - 32
    return _scaled(codes, _column(blocks, "d") * blocks["scales"])


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _IQ4[_nibbles(blocks["q"])] * _column(blocks, "d")


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    low = np.stack([blocks["low"] & 0x0F, blocks["low"] >> 4], axis=-1).reshape(-1, 8)
    high = blocks["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    return _scaled(_IQ4[_nibbles(blocks["q"].reshape(-1, 8, 16))], _column(blocks, "d") * scales)


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype:
    return np.dtype(list(fields))


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")

# ggml's name of each type that is read
BLOCKS: dict[str, Block] = {
    "F32": Block(1, np.dtype("<f4"), _float),
    "F16": Block(1, np.dtype("<f2"), _float),
    "BF16": Block(1, np.dtype("<u2"), _bfloat16),
    "Q8_0": Block(32, _layout(_D, ("q", "i1", 32)), _q8_0),
    "Q4_0": Block(32, _layout(_D, ("q", "u1", 16)), _q4_0),
    "Q4_1": Block(32, _layout(_D, _M, ("q", "u1", 16)), _q4_1),
    "Q5_0": Block(32, _layout(_D, ("h", "u1", 4), ("q", "u1", 16)), _q5_0),
    "Q5_1": Block(32, _layout(_D, _M, ("h", "u1", 4), ("q", "u1", 16)), _q5_1),
    "Q2_K": Block(256, _layout(("scales", "u1", 16), ("q", "u1", 64), _D, _DMIN), _q2_k),
    "Q3_K": Block(256, _layout(("h", "u1", 32), ("q", "u1", 64), ("scales", "u1", 12), _D), _q3_k),
    "Q4_K": Block(256, _layout(_D, _DMIN, ("scales", "u1", 12), ("q", "u1", 128)), _q4_k),
    "Q5_K": Block(256, _layout(_D, _DMIN, ("scales", "u1", 12), ("h", "u1", 32), ("q", "u1", 128)), _q5_k),
    "Q6_K": Block(256, _layout(("q", "u1", 128), ("h", "u1", 64), ("scales", "i1", 16), _D), _q6_k),
    "IQ4_NL": Block(32, _layout(_D, ("q", "u1", 16)), _iq4_nl),
    "IQ4_XS": Block(256, _layout(_D, ("high", "<u2"), ("low", "u1", 4), ("q", "u1", 128)), _iq4_xs),
}
