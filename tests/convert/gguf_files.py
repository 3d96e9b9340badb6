"""Writes GGUF files by the specification, without the reader under test and without mlx's own."""

import struct

import numpy as np

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q6_K": 14, "IQ3_S": 21, "BF16": 30}
ZEROS = {"Q6_K": 210, "IQ3_S": 110}  # types that are written as zeros: bytes per 256 values


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


class Raw(bytes):
    """A metadata value as bytes: its type's number and its content."""


def value(item):
    if isinstance(item, Raw):
        return bytes(item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    kind, code = (6, "f") if isinstance(item[0], float) else (5, "i")
    return struct.pack("<IIQ", 9, kind, len(item)) + struct.pack(f"<{len(item)}{code}", *item)


def encode(array, kind):
    """An array's bytes as ggml stores them, by the textbook rounding of each type."""
    flat = np.asarray(array, dtype=np.float32).reshape(-1)
    if kind == "F32":
        return flat.tobytes()
    if kind == "F16":
        return flat.astype(np.float16).tobytes()
    if kind == "BF16":
        return (flat.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    out = b""
    for block in flat.reshape(-1, 32):
        if kind == "Q8_0":
            d = np.float16(np.abs(block).max() / 127)
            quants = np.clip(np.round(block / max(np.float32(d), 1e-9)), -127, 127).astype(np.int8)
            out += d.tobytes() + quants.tobytes()
            continue
        if kind == "Q4_0":
            d = np.float16(np.abs(block).max() / 7)
            quants, head = np.round(block / max(np.float32(d), 1e-9)) + 8, d.tobytes()
        else:
            low = np.float16(block.min())
            d = np.float16((block.max() - np.float32(low)) / 15)
            quants = np.round((block - np.float32(low)) / max(np.float32(d), 1e-9))
            head = d.tobytes() + low.tobytes()
        quants = np.clip(quants, 0, 15).astype(np.uint8)
        out += head + (quants[:16] | quants[16:] << 4).tobytes()
    return out


def write(path, metadata, tensors, alignment=32):
    """tensors: name -> (array, type)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(string(key) + value(item) for key, item in metadata.items())
    body = b""
    for name, (array, kind) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        header += string(name) + struct.pack("<I", array.ndim)
        header += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        header += struct.pack("<IQ", TYPES[kind], len(body))
        body += b"\0" * (array.size // 256 * ZEROS[kind]) if kind in ZEROS else encode(array, kind)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + body)
    return path
