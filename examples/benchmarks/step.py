"""One training step: peak memory and tokens/s against length, beside mlx-lm's own LoRA training.

    python examples/benchmarks/step.py                          # SmolLM2-135M, T = 1024 ... 8192
    python examples/benchmarks/step.py --shape llama-3-8b --lengths 4096,8192 --series last
    python examples/benchmarks/step.py --turns 3 --lengths 1024 --series last,mlx-lm --recompute all,feed-forward

Each series runs in its own process, so that no series counts the memory of another. `last` and `all` match the
relations of the last layer or of all layers; `logits`, `relation+logits` and `ce` are the other objectives.
`mlx-lm` is the training loop of mlx_lm.lora with --grad-checkpoint: the same adapters, model, length and optimizer,
on the next-token loss, with mlx as that command runs it. Peak memory is mlx's own counter and includes the weights.
Where speeds vary from minute to minute, --turns repeats all series one after another: the table shows every turn, and
the pictures the medians.
The exponent is the slope of log(peak - weights) over log(T).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_linearard.cli import run_command
from mlx_linearard.config import DTYPES, RECOMPUTES
from mlx_linearard.doctor.measuring import file_name
from mlx_linearard.doctor.series import SERIES, Work, in_own_process


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        model = prepare_model(options, Path(scratch))
        rows = [
            {**row, "turn": turn}
            for turn in range(1, options.turns + 1)
            for name in options.series
            for recompute in (options.recompute if name != "mlx-lm" else options.recompute[:1])
            for row in run_series(options, model, name, recompute)
        ]
    report(rows, Path(options.out))


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number


def lengths(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of an option that takes some of the `known` names."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"{text}: must be names of {', '.join(known)}, separated by commas")
        return found

    return names


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a model directory (default: SmolLM2-135M-Instruct); --shape uses only its tokenizer"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="measure random 4-bit weights of this shape")
    parser.add_argument("--lengths", type=lengths, default="1024,2048,4096,8192")
    parser.add_argument(
        "--series", type=names_of(SERIES), default="last,all,mlx-lm", help=f"names of {', '.join(SERIES)}"
    )
    parser.add_argument("--turns", type=count, default=1, help="how often all series are measured, in turns")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one step to warm up")
    parser.add_argument("--workspace", type=int, default=256, help="MB for tiles and chunks")
    parser.add_argument(
        "--memory-limit", type=int, default=None, metavar="MB", help="the --memory-limit of distill, not for mlx-lm"
    )
    parser.add_argument(
        "--recompute",
        type=names_of(RECOMPUTES),
        default="all",
        help="the --recompute of distill for every series, or several, separated by commas",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES[1:], help="of the weights in memory (default: the dtype of the files)"
    )
    parser.add_argument("--out", default="examples/benchmarks/results")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------
# Models

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "rms_norm_eps": 1e-5, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


def prepare_model(options: argparse.Namespace, scratch: Path) -> Path:
    """The model directory to measure: the user's, SmolLM2's, or random weights of a shape with its tokenizer."""
    from mlx_linearard.convert.default_model import default_model

    from mlx_linearard.models.directory import check_model_dir

    model = Path(options.model) if options.model else default_model()
    check_model_dir(model)  # a mistake is reported once, not by each series
    return random_quantized(SHAPES[options.shape], scratch / options.shape, model) if options.shape else model


def random_quantized(config: dict[str, Any], folder: Path, tokenizer_from: Path) -> Path:
    """A 4-bit model directory with random codes, scaled so that activations stay in range."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    folder.mkdir(parents=True)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        if array.dtype == mx.uint32:
            value = mx.random.randint(0, 2**31 - 1, array.shape).astype(mx.uint32)
        elif name.endswith("scales"):
            value = mx.full(array.shape, 0.02 / 4.6, mx.bfloat16)  # codes 0 ... 15 have a deviation of 4.6
        elif name.endswith("biases"):
            value = mx.full(array.shape, -7.5 * 0.02 / 4.6, mx.bfloat16)
        else:
            value = mx.ones(array.shape, mx.bfloat16)
        mx.eval(value)
        weights[name] = value
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    quantization = {"group_size": 64, "bits": 4, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization": quantization}))
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


# ---------------------------------------------------------------------------------------------------
# Series


def run_series(options: argparse.Namespace, model: Path, name: str, recompute: str) -> list[dict[str, Any]]:
    """One series in a process of its own; its rows, also those before a failure."""
    work = Work(
        series=name,
        model=str(model),
        name=options.shape or model.name,
        lengths=tuple(options.lengths),
        steps=options.steps,
        workspace=options.workspace << 20,
        dtype=options.dtype,
        memory_limit=options.memory_limit,
        recompute=recompute,
    )
    rows = []
    for row in in_own_process(work):
        if note := row.get("note"):
            print(f"{name} T={row['length']}: {note}", file=sys.stderr, flush=True)
            continue
        rows.append(row)
        speed = f"{row['peak_mb']:.0f} MB, {row['tokens_per_second']:.0f} tokens/s"
        print(f"{line_of(row)} T={row['length']}: {speed}", file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------
# Report


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log(peak - weights) over log(T), by least squares."""
    xs = [math.log(r["length"]) for r in rows]
    ys = [math.log(max(r["peak_mb"] - r["weights_mb"], 1e-3)) for r in rows]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Print a table, write a CSV, draw a picture."""
    from relation import draw

    if not rows:
        sys.exit("nothing was measured")
    for name in dict.fromkeys(map(line_of, rows)):
        own = [r for r in rows if line_of(r) == name]
        print(f"\n{name}: exponent {exponent(own):.2f} on {own[0]['machine']}, {own[0]['model']}")
        for r in own:
            memory = f"peak {r['peak_mb']:>8.0f} MB  (weights {r['weights_mb']:.0f})"
            print(f"  T={r['length']:>6}  {memory}  {r['tokens_per_second']:>9.0f} tokens/s")
    folder.mkdir(parents=True, exist_ok=True)
    kind = "step-turns" if rows[-1]["turn"] > 1 else "step"
    stem = f"{kind}-{file_name(rows[0]['model'])}-{file_name(rows[0]['machine'])}"
    with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwrote {folder / stem}.csv")
    draw(folder / f"{stem}.png", panels(rows), f"one training step, {rows[0]['model']}, {rows[0]['machine']}")


LINES = {
    "last": "relations, last layer",
    "all": "relations, all layers",
    "ce": "cross-entropy",
    "mlx-lm": "mlx_lm.lora --grad-checkpoint",
}


def line_of(row: dict[str, Any]) -> str:
    """The name of a row's line: its series and, if it keeps activations, what it computes again."""
    name = LINES.get(row["series"], row["series"])
    return name if row["recompute"] in ("", "all") else f"{name}, recompute {row['recompute']}"


def panels(rows: list[dict[str, Any]]) -> dict[str, tuple[str, dict[str, tuple[list[int], list[float]]]]]:
    """Memory and speed against length, a line for each series."""

    def lines(key: str, unit: float) -> dict[str, tuple[list[int], list[float]]]:
        drawn = {}
        for name in dict.fromkeys(map(line_of, rows)):  # all series, so that each keeps its colour
            own = [r for r in rows if line_of(r) == name and r[key]]
            xs = list(dict.fromkeys(r["length"] for r in own))
            drawn[name] = xs, [unit * statistics.median(r[key] for r in own if r["length"] == x) for x in xs]
        return drawn

    both = {"peak memory": ("GB", lines("peak_mb", 1e-3)), "speed": ("tokens/s", lines("tokens_per_second", 1))}
    return {title: panel for title, panel in both.items() if any(ys for _, ys in panel[1].values())}


if __name__ == "__main__":
    sys.exit(run_command(main))
