"""Number types: the names of safetensors, the names that --dtype accepts, and mlx's types."""

from __future__ import annotations

import mlx.core as mx

# safetensors' names of the types that mlx holds.
DTYPES: dict[str, mx.Dtype] = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The names that --dtype accepts, as mlx-lm spells them.
FLOATS: dict[str, mx.Dtype] = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
HALVES = ("float16", "bfloat16")
