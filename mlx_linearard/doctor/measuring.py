"""Time and peak memory of functions of mlx arrays, as the benchmarks measure them."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from ..ops.relation import relation_kl


def fastest(function: Callable, inputs: list[mx.array], repeats: int, held: int) -> tuple[float, float]:
    """(seconds of the fastest run, peak MiB beyond inputs and `held` bytes of results).

    One more run comes first, because it may compile. Its time counts only if `repeats` is 0.
    """
    mx.eval(inputs)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    times = []
    for _ in range(1 + repeats):
        mx.synchronize()
        start = time.perf_counter()
        results = function(*inputs)
        mx.eval(results)
        mx.synchronize()
        times.append(time.perf_counter() - start)
        del results
    return min(times[1:] or times), (mx.get_peak_memory() - before - held) / 2**20


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal numbers, (B, H, T, D), made head by head: together they would need many times their own memory."""
    batch, heads, length, dim = shape
    parts = []
    for key in mx.random.split(mx.random.key(seed), heads):
        parts.append(mx.random.normal((batch, 1, length, dim), key=key).astype(dtype))
        mx.eval(parts[-1])
    joined = mx.concatenate(parts, axis=1)
    mx.eval(joined)
    return joined


def student_and_teacher(shape: tuple[int, ...], dtype: mx.Dtype) -> list[mx.array]:
    """Two arrays (B, H, T, D) whose relations are alike, as a student's and a teacher's are."""
    student, noise = (normal(shape, dtype, seed) for seed in range(2))
    teacher = (student + 0.5 * noise).astype(dtype)
    mx.eval(teacher)
    return [student, teacher]


def relation_loss(workspace_bytes: int) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """(student, teacher) -> the relation loss and its gradient."""

    def loss_and_gradient(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        return mx.value_and_grad(lambda x: relation_kl(x, y, workspace_bytes=workspace_bytes))(x)

    return loss_and_gradient


def file_name(name: str) -> str:
    """`name` as the stem of a file."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split())
