"""mlx-linearard: longer context windows for RoPE language models on Apple Silicon, restored by distillation.

The main path as functions: `load_pair`, `distill`, `export`; the parts that are useful alone: `relation_kl`,
`relation_kl_dense`, `attention`, `scale_rope`. `Listener` receives the events of a run, `Result` is what `distill`
returns, and a user's mistake is a `UserError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .config import DistillConfig
    from .distill.compare import compare_objectives
    from .distill.listener import Listener
    from .distill.run import Result, distill
    from .errors import UserError
    from .export.formats import export
    from .models.pair import load_pair
    from .ops.attention import attention
    from .ops.relation import relation_kl, relation_kl_dense
    from .rope import scale_rope

__version__ = "0.1.0"

# Where each public name is defined. A name is loaded at its first use, so importing the package is fast.
_HOMES = {
    "DistillConfig": "config",
    "Listener": "distill.listener",
    "Result": "distill.run",
    "UserError": "errors",
    "attention": "ops.attention",
    "compare_objectives": "distill.compare",
    "distill": "distill.run",
    "export": "export.formats",
    "load_pair": "models.pair",
    "relation_kl": "ops.relation",
    "relation_kl_dense": "ops.relation",
    "scale_rope": "rope",
}

__all__ = [
    "DistillConfig",
    "Listener",
    "Result",
    "UserError",
    "attention",
    "compare_objectives",
    "distill",
    "export",
    "load_pair",
    "relation_kl",
    "relation_kl_dense",
    "scale_rope",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
