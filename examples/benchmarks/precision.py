"""How exact the relation loss and attention are: ours and the dense definitions, both compared with float64.

    python examples/benchmarks/precision.py --lengths 97 513 1000

Errors are relative; the error of a gradient is that of its norm. CUDA and M5 compute float32 products as TF32
unless MLX_ENABLE_TF32=0 is set in the environment; the table names the setting.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from relation import draw, write_csv

from mlx_linearard.doctor.measuring import file_name
from mlx_linearard.machine import describe
from mlx_linearard.ops.attention import attention
from mlx_linearard.ops.relation import relation_kl, relation_kl_dense

COLUMNS = (
    "what",
    "dtype",
    "length",
    "kl",
    "loss_error",
    "loss_error_dense",
    "gradient_error",
    "gradient_error_dense",
)
NOISES = (0.5, 1e-2)  # difference between teacher and student: a large and a small KL


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def relative(got: mx.array, want: np.ndarray) -> float:
    return float(np.linalg.norm(float64(got) - want) / np.linalg.norm(want))


def softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def exact_relation(x: mx.array, y: mx.array) -> tuple[float, np.ndarray]:
    """Loss and gradient of the relation loss in float64."""
    x, y = float64(x), float64(y)
    seen = np.tril(np.ones((x.shape[2], x.shape[2]), bool))
    p_s, p_t = (softmax(np.where(seen, v @ v.swapaxes(-1, -2) * v.shape[-1] ** -0.5, -np.inf)) for v in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(seen & (p_t > 0), p_t * (np.log(p_t) - np.log(p_s)), 0)
    rows = x.shape[1] * x.shape[2]
    error = (p_s - p_t) / rows
    return terms.sum() / rows, x.shape[-1] ** -0.5 * (error + error.swapaxes(-1, -2)) @ x


def exact_attention(q: mx.array, k: mx.array, v: mx.array, c: mx.array) -> list[np.ndarray]:
    """Output and gradients of causal attention in float64."""
    q, k, v, c = map(float64, (q, k, v, c))
    scale = q.shape[-1] ** -0.5
    seen = np.tril(np.ones((q.shape[2], q.shape[2]), bool))
    p = softmax(np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf))
    out = p @ v
    d_scores = p * (c @ v.swapaxes(-1, -2) - (c * out).sum(-1, keepdims=True))
    transposed = d_scores.swapaxes(-1, -2)
    return [out, scale * d_scores @ k, scale * transposed @ q, p.swapaxes(-1, -2) @ c]


def relation_rows(args: argparse.Namespace, dtype: mx.Dtype, length: int) -> Iterator[dict]:
    shape = (1, args.heads, length, args.head_dim)
    workspace = args.workspace * 2**20
    for noise in NOISES:
        x, y = (mx.random.normal(shape, key=mx.random.key(i)) for i in range(2))
        x, y = x.astype(dtype), (x + noise * y).astype(dtype)
        want, want_gradient = exact_relation(x, y)

        def errors(function: Callable, x=x, y=y, want=want, want_gradient=want_gradient) -> tuple[float, float]:
            loss, gradient = mx.value_and_grad(function)(x, y)
            return abs(loss.item() - want) / want, relative(gradient, want_gradient)

        ours = errors(lambda x, y: relation_kl(x, y, workspace_bytes=workspace))
        dense = errors(relation_kl_dense)
        yield {"what": f"relation, noise {noise:g}", "kl": want} | paired(ours, dense)


def attention_rows(args: argparse.Namespace, dtype: mx.Dtype, length: int) -> Iterator[dict]:
    shape = (1, args.heads, length, args.head_dim)
    inputs = [mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i in range(4)]
    want = exact_attention(*inputs)
    scale = args.head_dim**-0.5

    def errors(function: Callable) -> tuple[float, float]:
        (out,), gradients = mx.vjp(function, inputs[:3], inputs[3:])
        return relative(out, want[0]), max(relative(g, w) for g, w in zip(gradients, want[1:], strict=True))

    workspace = args.workspace * 2**20
    ours = errors(lambda q, k, v: attention(q, k, v, scale=scale, mask="causal", workspace_bytes=workspace))
    dense = errors(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal"))
    yield {"what": "attention", "kl": ""} | paired(ours, dense)


def paired(ours: tuple[float, float], dense: tuple[float, float]) -> dict:
    return dict(zip(COLUMNS[4:], (ours[0], dense[0], ours[1], dense[1]), strict=True))


def panels(rows: list[dict]) -> dict:
    """Gradient errors against length, one panel per dtype."""
    result = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines: dict[str, tuple[list, list]] = {}
        for row in (r for r in rows if r["dtype"] == dtype):
            for name, key in ((row["what"], COLUMNS[6]), (f"{row['what']}, dense", COLUMNS[7])):
                xs, ys = lines.setdefault(name, ([], []))
                xs.append(row["length"])
                ys.append(row[key])
        result[dtype] = ("relative error of the gradient", lines)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[97, 256, 513, 1000])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--workspace", type=int, default=16, metavar="MIB", help="workspace in MiB, small so that there are many tiles"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse()
    tf32 = os.environ.get("MLX_ENABLE_TF32", "default")
    about = f"{describe()}; mlx {mx.__version__}; H={args.heads} D={args.head_dim}; MLX_ENABLE_TF32 {tf32}"
    print(about)
    rows = []
    for dtype in args.dtypes:
        for length in args.lengths:
            for kind in (relation_rows, attention_rows):
                for row in kind(args, getattr(mx, dtype), length):
                    row |= {"dtype": dtype, "length": length}
                    row = {key: f"{row[key]:.3g}" if isinstance(row[key], float) else row[key] for key in COLUMNS}
                    rows.append(row)
                    print(
                        "  ".join(f"{row[key]!s:>{22 if key == 'what' else 10}}" for key in COLUMNS),
                        flush=True,
                    )
    stem = f"precision-{file_name(describe())}" + ("-tf32-off" if tf32 == "0" else "")
    write_csv(args.out / f"{stem}.csv", COLUMNS, rows, about)
    numbers = [row | {key: float(row[key]) for key in COLUMNS[4:]} for row in rows]
    draw(args.out / f"{stem}.png", panels(numbers), about)


if __name__ == "__main__":
    main()
