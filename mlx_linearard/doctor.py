"""Command: prints what this machine is, how fast it is, and whether the loss is exact on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from .cli import Parser, run_command
from .convert.default_model import cache_directory
from .errors import UserError
from .machine import measure_machine
from .ops.relation import relation_kl

PACKAGES = ("mlx-linearard", "mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")
SETTINGS = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME", "LD_PRELOAD", "MLX_ENABLE_TF32")

# Largest allowed relative error of loss and gradient: in float32, and with the TF32 products of some GPUs.
EXACT, TF32 = 1e-4, 2e-2


def examine() -> dict[str, Any]:
    """Everything that the command prints, as JSON values. Takes a few seconds."""
    machine = measure_machine()
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": platform.platform(),
        "device": machine.name,
        "memory_gb": round(machine.memory / 1e9, 1),
        "matmul_gflops": round(machine.gflops, 1),
        "exp_ns": round(_exp_ns(), 3),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "model_cache": _model_cache(),
        "self_test": self_test(machine.gpu),
        "hint": machine.hint,
    }


def _model_cache() -> str:
    try:
        return str(cache_directory())
    except UserError as error:
        return f"none: {error}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _exp_ns() -> float:
    """Nanoseconds per exponential in a large array."""
    x = mx.random.normal((4_000_000,))
    mx.eval(x, mx.exp(x))
    start = time.perf_counter()
    mx.eval(mx.exp(x))
    return (time.perf_counter() - start) / x.size * 1e9


def self_test(gpu: bool, length: int = 193, heads: int = 3, dim: int = 64) -> dict[str, Any]:
    """Compare relation loss and gradient of random vectors, in many tiles, with numpy in float64."""
    shape = (1, heads, length, dim)
    student, teacher = (mx.random.normal(shape, key=mx.random.key(i)) for i in (0, 1))
    loss, gradient = mx.value_and_grad(lambda x: relation_kl(x, teacher, workspace_bytes=200_000))(student)
    expected_loss, expected_gradient = _float64(np.array(student), np.array(teacher))
    loss_error = abs(float(np.array(loss)) - expected_loss) / expected_loss
    difference = np.linalg.norm(np.array(gradient).astype(np.float64) - expected_gradient)
    gradient_error = float(difference / np.linalg.norm(expected_gradient))
    allowed = TF32 if gpu and os.environ.get("MLX_ENABLE_TF32") != "0" else EXACT
    return {
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "allowed": allowed,
        "passed": bool(max(loss_error, gradient_error) <= allowed),
    }


def _float64(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """The definition for x and y, both (1, H, T, D): the mean KL of the rows, and its gradient in x."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    log_s, log_t = _log_relations(x), _log_relations(y)
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    rows = x.shape[1] * x.shape[2]
    loss = np.where(p_t > 0, p_t * (log_t - np.where(p_t > 0, log_s, 0.0)), 0.0).sum() / rows
    error = (p_s - p_t) / rows
    return float(loss), x.shape[-1] ** -0.5 * (error + error.swapaxes(-1, -2)) @ x


def _log_relations(x: np.ndarray) -> np.ndarray:
    length = x.shape[2]
    scores = x @ x.swapaxes(-1, -2) * x.shape[-1] ** -0.5
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -1e300)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def _lines(report: dict[str, Any]) -> list[str]:
    test = report["self_test"]
    lines = [
        f"{name:<16} {value if value is not None else 'not installed'}" for name, value in report["versions"].items()
    ]
    lines += [
        f"system           {report['system']}",
        f"device           {report['device']}, {report['memory_gb']} GB",
        f"speed            {report['matmul_gflops']} GFLOP/s in matrix products, {report['exp_ns']} ns per exponential",
        f"model cache      {report['model_cache']}",
        *(f"{name:<16} {value}" for name, value in report["settings"].items()),
        f"self-test        loss off by {test['loss_error']:.1e}, gradient by {test['gradient_error']:.1e} of float64 "
        f"(allowed {test['allowed']:.0e}): {'passed' if test['passed'] else 'FAILED'}",
    ]
    return [*lines, f"hint             {report['hint']}"] if report["hint"] else lines


def run(arguments: Sequence[str] | None = None) -> int:
    """The command's body; status 1 if the self-test fails."""
    parser = Parser(
        "mlx_linearard.doctor", "Print what this machine is, how fast it is, and whether the loss is exact on it."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)))
    return 0 if report["self_test"]["passed"] else 1


def main() -> None:
    """Entry point of `mlx_linearard.doctor`."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
