"""This machine and its speed: the sizes of a run depend on them, and results name the machine."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import UserError, one_line

SLOW_BLAS_GFLOPS = 20.0  # the Linux wheel's own BLAS reaches 3 to 5, OpenBLAS on two cores about 200
OPENBLAS = "/usr/lib/{machine}-linux-gnu/openblas-pthread/libopenblas.so.0"  # of Debian and Ubuntu


@dataclass(frozen=True)
class Machine:
    """The default device: its name, whether it is a GPU, and its measured matrix speed."""

    name: str
    gpu: bool
    memory: int  # bytes
    gflops: float  # speed of a square matrix product in the working dtype
    limit: int = 0  # bytes that a run may take; 0: all of `memory`

    @property
    def usable(self) -> int:
        """Bytes that a run may take."""
        return self.limit or self.memory

    @property
    def hint(self) -> str | None:
        """How to make a slow machine fast; None if nothing is known to help."""
        if self.gpu or platform.system() != "Linux" or self.gflops > SLOW_BLAS_GFLOPS:
            return None
        library = OPENBLAS.format(machine=platform.machine())
        install = "" if Path(library).exists() else "install libopenblas0-pthread and "
        return (
            f"matrix products run at {self.gflops:.0f} GFLOP/s on mlx's built-in BLAS; OpenBLAS is about 40 times "
            f"faster: {install}type LD_PRELOAD={library} before the command"
        )


def describe() -> str:
    """The device's name, for results: 'Apple M3 Max', 'NVIDIA H200', or the processor and its core count."""
    info = mx.device_info()
    if on_gpu():
        return str(info.get("device_name", "GPU"))
    return f"{_processor()} ({_cores()} cores, CPU)"


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def measure_machine(dtype: mx.Dtype = mx.float32) -> Machine:
    """The default device with its speed, measured in about a tenth of a second."""
    gflops = _speed(4096 if on_gpu() else 256, dtype)
    if not on_gpu() and gflops > SLOW_BLAS_GFLOPS / 2:  # a fast BLAS shows its speed in larger products only
        gflops = _speed(768, dtype)
    return machine_of_speed(gflops)


def _speed(size: int, dtype: mx.Dtype) -> float:
    """GFLOP/s of square matrix products of this size, the best of three."""
    a = mx.random.normal((size, size)).astype(dtype)
    mx.eval(a, a @ a)
    return 2 * size**3 / min(_timed(a) for _ in range(3)) / 1e9


def machine_of_speed(gflops: float, sharing: int = 1) -> Machine:
    """The default device with a given speed. Its memory is divided by the number of processes that share it."""
    gpu = on_gpu()
    info: dict[str, Any] = mx.device_info()
    memory = _device_memory(info) if gpu else _system_memory()
    working_set = int(info.get("max_recommended_working_set_size", 0)) if gpu else 0  # Apple GPUs
    return Machine(describe(), gpu, memory // sharing, gflops, working_set // sharing)


def free_memory() -> int:
    """Bytes that new arrays may take now; on a CUDA device without those that other programs hold."""
    usable = machine_of_speed(0).usable
    info: dict[str, Any] = mx.device_info() if on_gpu() else {}
    free = int(info.get("free_memory", usable)) + mx.get_cache_memory()
    return max(0, min(usable - mx.get_active_memory(), free))


def _timed(a: mx.array) -> float:
    start = time.perf_counter()
    mx.eval(a @ a)
    return time.perf_counter() - start


def _device_memory(info: dict[str, Any]) -> int:
    """The GPU's memory in bytes, under either name that mlx's backends use; the system's memory if unknown."""
    return int(info.get("memory_size", 0) or info.get("total_memory", 0)) or _system_memory()


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_gpu() -> bool:
    """Whether new operations run on a GPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def set_limits(
    *, memory_limit: int | None = None, cache_limit: int | None = None, wired_limit: int | None = None
) -> None:
    """Set mlx's limits in MiB, from --memory-limit, --cache-limit and --wired-limit; None changes nothing.

    Raises UserError for a wired limit without Metal or above the limit of macOS.
    """
    if wired_limit is not None and not mx.metal.is_available():
        raise UserError(f"--wired-limit {wired_limit}: only Metal wires memory: leave the option out on this machine")
    if memory_limit is not None:
        mx.set_memory_limit(memory_limit << 20)
    if cache_limit is not None:
        mx.set_cache_limit(cache_limit << 20)
    if wired_limit is not None:
        try:
            mx.set_wired_limit(wired_limit << 20)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--wired-limit {wired_limit}: {one_line(error)}; give a smaller limit, or raise the system's limit "
                "with sudo sysctl iogpu.wired_limit_mb"
            ) from None
