"""mlx's own limits, as the options of a run ask for them. They hold for the whole process."""

from __future__ import annotations

import mlx.core as mx

from .config import DistillConfig
from .errors import UserError, one_line


def set_limits(config: DistillConfig) -> None:
    """Apply --memory-limit, --cache-limit and --wired-limit; what is not asked for stays as mlx has it.

    Raises UserError for a wired limit where there is no Metal, or above what macOS allows.
    """
    if config.wired_limit is not None and not mx.metal.is_available():
        raise UserError(f"--wired-limit {config.wired_limit}: only Metal wires memory: leave it out on this machine")
    if config.memory_limit is not None:
        mx.set_memory_limit(config.memory_limit << 20)
    if config.cache_limit is not None:
        mx.set_cache_limit(config.cache_limit << 20)
    if config.wired_limit is not None:
        try:
            mx.set_wired_limit(config.wired_limit << 20)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--wired-limit {config.wired_limit}: {one_line(error)}; give less, or raise the system's own limit "
                "with sudo sysctl iogpu.wired_limit_mb"
            ) from None
