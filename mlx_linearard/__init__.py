"""mlx-linearard: longer context windows for RoPE language models on Apple Silicon, restored by distillation.

The main path as functions: `load_pair`, `distill`, `export`; the parts that stand alone: `relation_kl`,
`relation_kl_dense`, `attention`, `scale_rope`.
"""

from __future__ import annotations

import importlib
from typing import Any

from .attention import attention
from .relation import relation_kl, relation_kl_dense
from .rope import scale_rope

__version__ = "0.1.0"

# These bring models and tokenizers with them, so they load when first asked for.
_HOMES = {
    "load_pair": "pair",
    "DistillConfig": "config",
    "distill": "run",
    "compare_objectives": "comparing",
    "export": "exporting",
}

__all__ = [
    "DistillConfig",
    "attention",
    "compare_objectives",
    "distill",
    "export",
    "load_pair",
    "relation_kl",
    "relation_kl_dense",
    "scale_rope",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
