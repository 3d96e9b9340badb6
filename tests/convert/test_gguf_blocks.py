"""Every block type against ggml's own loops, written out value by value as in ggml-quants.c."""

import numpy as np
import pytest
from mlx_linearard.convert.gguf_blocks import BLOCKS

F = np.float32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(data, at):
    return F(np.frombuffer(bytes(data[at : at + 2]), "<f2")[0])


def signed(byte):
    return byte - 256 if byte > 127 else byte


def q5(data, quants, offset):
    bits = int.from_bytes(bytes(data[quants - 4 : quants]), "little")
    low = [(data[quants + j] & 0xF) | (bits >> j & 1) << 4 for j in range(16)]
    high = [(data[quants + j] >> 4) | (bits >> j + 16 & 1) << 4 for j in range(16)]
    return [F(code - offset) for code in low + high]


def q5_0(data):
    return [code * half(data, 0) for code in q5(data, 6, 16)]


def q5_1(data):
    return [code * half(data, 0) + half(data, 2) for code in q5(data, 8, 0)]


def q2_k(data):
    scales, quants, d, dmin = data[:16], data[16:80], half(data, 80), half(data, 82)
    values, group = [], 0
    for start in (0, 32):
        for shift in (0, 2, 4, 6):
            for part in (0, 16):
                scale, minimum = d * F(scales[group] & 0xF), dmin * F(scales[group] >> 4)
                group += 1
                values += [scale * F(quants[start + part + i] >> shift & 3) - minimum for i in range(16)]
    return values


def q3_k(data):
    mask, quants, packed, d = data[:32], data[32:96], data[96:108], half(data, 108)
    scales = []
    for j in range(16):
        low = packed[j] & 0xF if j < 8 else packed[j - 8] >> 4
        scales.append((low | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32)
    values, group, bit = [], 0, 0
    for start in (0, 32):
        for shift in (0, 2, 4, 6):
            for part in (0, 16):
                scale = d * F(scales[group])
                group += 1
                for i in range(part, part + 16):
                    code = (quants[start + i] >> shift & 3) - (0 if mask[i] >> bit & 1 else 4)
                    values.append(scale * F(code))
            bit += 1
    return values


def six_bits(packed, j):
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (
        packed[j + 4] & 0xF | packed[j - 4] >> 6 << 4,
        packed[j + 4] >> 4 | packed[j] >> 6 << 4,
    )


def q45_k(data, high, quants):
    d, dmin, packed = half(data, 0), half(data, 2), data[4:16]
    values = []
    for j in range(8):
        scale, minimum = six_bits(packed, j)
        for i in range(32):
            code = quants[j // 2 * 32 + i] >> 4 * (j % 2) & 0xF
            code |= (high[i] >> j & 1) << 4 if high is not None else 0
            values.append(d * F(scale) * F(code) - dmin * F(minimum))
    return values


def q4_k(data):
    return q45_k(data, None, data[16:144])


def q5_k(data):
    return q45_k(data, data[16:48], data[48:176])


def q6_k(data):
    low, high, scales, d = data[:128], data[128:192], data[192:208], half(data, 208)
    values = [F(0)] * 256
    for n in range(2):
        for i in range(32):
            a, b, top = low[64 * n + i], low[64 * n + i + 32], high[32 * n + i]
            codes = (a & 0xF | (top & 3) << 4, b & 0xF | (top >> 2 & 3) << 4)
            codes += (a >> 4 | (top >> 4 & 3) << 4, b >> 4 | (top >> 6 & 3) << 4)
            for part, code in enumerate(codes):
                scale = d * F(signed(scales[8 * n + 2 * part + i // 16]))
                values[128 * n + 32 * part + i] = scale * F(code - 32)
    return values


def iq4_nl(data):
    d, quants = half(data, 0), data[2:18]
    return [d * F(IQ4[q & 0xF]) for q in quants] + [d * F(IQ4[q >> 4]) for q in quants]


def iq4_xs(data):
    d, high, low, quants = half(data, 0), data[2] | data[3] << 8, data[4:8], data[8:136]
    values = []
    for j in range(8):
        scale = d * F(((low[j // 2] >> 4 * (j % 2) & 0xF) | (high >> 2 * j & 3) << 4) - 32)
        part = quants[16 * j : 16 * j + 16]
        values += [scale * F(IQ4[q & 0xF]) for q in part] + [scale * F(IQ4[q >> 4]) for q in part]
    return values


# the independent loop, the bytes of a block, and where its float16 numbers are
TYPES = {
    "Q5_0": (q5_0, 22, (0,)),
    "Q5_1": (q5_1, 24, (0, 2)),
    "Q2_K": (q2_k, 84, (80, 82)),
    "Q3_K": (q3_k, 110, (108,)),
    "Q4_K": (q4_k, 144, (0, 2)),
    "Q5_K": (q5_k, 176, (0, 2)),
    "Q6_K": (q6_k, 210, (208,)),
    "IQ4_NL": (iq4_nl, 18, (0,)),
    "IQ4_XS": (iq4_xs, 136, (0,)),
}


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_dequantized_bit_for_bit(kind):
    loop, size, halves = TYPES[kind]
    block = BLOCKS[kind]
    assert block.layout.itemsize == size
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (3, size), dtype=np.uint8)
    for at in halves:  # any other bytes may be NaN
        data[:, at : at + 2] = random.normal(0, 1, (3, 1)).astype("<f2").view(np.uint8)
    expected = np.array([loop([int(byte) for byte in row]) for row in data], np.float32)
    found = block.values(data.reshape(-1).view(block.layout))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
