"""Time and peak memory of the relation loss and of attention, compared with the dense definitions.

    python examples/benchmarks/relation.py --lengths 512 1024 2048 --heads 2 --head-dim 64

Each line is one forward and backward pass. `extra` is the peak memory beyond inputs, outputs and gradients.
Writes a CSV, and a picture if matplotlib is installed, both named after the machine.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_linearard.doctor.measuring import fastest, file_name, normal, relation_loss, student_and_teacher
from mlx_linearard.machine import describe
from mlx_linearard.ops.attention import attention
from mlx_linearard.ops.relation import relation_kl_dense

COLUMNS = ("what", "length", "heads", "head_dim", "dtype", "workspace_mib", "seconds", "extra_mib", "note")
SKIPPED_BEYOND = 0.6  # the part of the device's memory that a dense rival may need; above it the rival is skipped


def device_memory() -> int:
    """Bytes of memory that the device can use."""
    info = mx.device_info()
    for key in ("total_memory", "max_recommended_working_set_size", "memory_size"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cases(args: argparse.Namespace, length: int) -> Iterator[tuple[str, Callable, list[mx.array], int, float]]:
    """For one length: (name, function, inputs, bytes of the results, bytes that the function is known to need)."""
    dtype, shape = getattr(mx, args.dtype), (1, args.heads, length, args.head_dim)
    x, y = student_and_teacher(shape, dtype)
    c = normal(shape, dtype, 2)
    workspace = args.workspace * 2**20
    scores = 4 * args.heads * length**2

    def dense(x, y):
        return mx.value_and_grad(lambda x: relation_kl_dense(x, y))(x)

    def attend(x, y, c):
        scale = args.head_dim**-0.5
        (out,), grads = mx.vjp(
            lambda q, k, v: attention(q, k, v, scale=scale, mask="causal", workspace_bytes=workspace),
            [x, y, c],
            [c],
        )
        return [out, *grads]

    def attend_mlx(x, y, c):
        scale = args.head_dim**-0.5
        (out,), grads = mx.vjp(
            lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal"),
            [x, y, c],
            [c],
        )
        return [out, *grads]

    yield "relation_kl", relation_loss(workspace), [x, y], x.nbytes, 0
    yield "relation_kl dense", dense, [x, y], x.nbytes, 8 * scores
    yield "attention", attend, [x, y, c], 4 * x.nbytes, 0
    yield "attention of mlx", attend_mlx, [x, y, c], 4 * x.nbytes, 4 * scores


def run(args: argparse.Namespace) -> Iterator[dict]:
    """The rows of the table, one after another."""
    memory = device_memory() * SKIPPED_BEYOND
    for length in args.lengths:
        for name, function, inputs, held, needed in cases(args, length):
            row = dict.fromkeys(COLUMNS, "")
            row |= {"what": name, "length": length, "heads": args.heads, "head_dim": args.head_dim}
            row |= {"dtype": args.dtype, "workspace_mib": "" if needed else args.workspace}
            if args.only and args.only not in name:
                continue
            if needed > memory:
                row["note"] = f"skipped: needs about {needed / 2**30:.0f} GiB, {memory / 2**30:.0f} GiB allowed"
            elif needed and length > args.longest_dense:
                row["note"] = f"skipped: beyond --longest-dense {args.longest_dense}"
            else:
                try:
                    repeats = args.repeats if length <= 32768 else min(args.repeats, 1)
                    seconds, extra = fastest(function, inputs, repeats, held)
                    row |= {"seconds": round(seconds, 5), "extra_mib": round(extra, 1)}
                except (RuntimeError, MemoryError) as error:
                    row["note"] = f"failed: {str(error).splitlines()[0][:80]}"
            yield row


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict], about: str) -> None:
    """Write `rows` as CSV; the first line is a comment with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {about}\n")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def draw(path: Path, panels: dict[str, tuple[str, dict[str, tuple[list, list]]]], title: str) -> None:
    """Draw one log-log panel per name: (label of y, {line: (xs, ys)}). Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'mlx-linearard[plot]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Plain numbers, 20000 and not 2e+04, on the ticks that have room for a label."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axis, (name, (label, lines)) in zip(axes[0], panels.items(), strict=True):
        for line, (xs, ys) in lines.items():
            axis.plot(xs, ys, marker="o", label=line)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label, title=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        for set_formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            set_formatter(Plain(minor_thresholds=(2, 0.4)))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    named = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(named.values(), named.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(3, len(named)))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(f"wrote {path}")


def panels(rows: list[dict]) -> dict:
    """Memory and time against length, one line per function."""
    measured = [row for row in rows if row["seconds"] != ""]

    def lines(key: str) -> dict:
        names = dict.fromkeys(row["what"] for row in measured)
        return {
            name: (
                [r["length"] for r in measured if r["what"] == name],
                [max(r[key], 1e-3) for r in measured if r["what"] == name],
            )
            for name in names
        }

    return {
        "memory beyond inputs and results": ("MiB", lines("extra_mib")),
        "forward and backward": ("seconds", lines("seconds")),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--workspace", type=int, default=256, metavar="MIB", help="workspace in MiB")
    parser.add_argument("--longest-dense", type=int, default=8192, help="longest length for the dense rivals")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs up to 32768 tokens, one beyond; 0: only the first run"
    )
    parser.add_argument("--only", default="", help="measure only the functions with this text in their name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    args = parse()
    about = f"{describe()}; mlx {mx.__version__}; B=1 H={args.heads} D={args.head_dim} {args.dtype}"
    print(about)
    print(f"{'what':20} {'tokens':>7} {'seconds':>9} {'extra MiB':>10}")
    rows = []
    for row in run(args):
        rows.append(row)
        print(
            f"{row['what']:20} {row['length']:7} {row['seconds']:>9} {row['extra_mib']:>10} {row['note']}",
            flush=True,
        )
    stem = f"relation-{file_name(describe())}-{args.workspace}mib"
    write_csv(args.out / f"{stem}.csv", COLUMNS, rows, about)
    draw(args.out / f"{stem}.png", panels(rows), about)


if __name__ == "__main__":
    main()
