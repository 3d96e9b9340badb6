"""The memory plan against mlx's measured peak, for six configurations, and three with a long part.

    python examples/benchmarks/memory_plan.py                                  # SmolLM2-135M and a made-up model
    python examples/benchmarks/memory_plan.py --model DIR --lengths 1024,4096 --dtype bfloat16

The made-up model has random weights, 16 layers of width 1024, 8 query heads and 2 key heads of 128, and a
vocabulary of 32000; a 4-bit copy of it is the sixth configuration. The other three add a block of long text, four
times as long as the longer length (--long-objective), to a step of the shorter one. Each configuration makes three
training steps in its own process: the third step holds everything that a step can hold (weights and moments now, and
those before the last update). Peak memory is mlx's own counter. The exit status is 1 if a plan is off by more than
15 %.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from step import lengths

from mlx_linearard.cli import run_command
from mlx_linearard.config import DTYPES, LONG_OBJECTIVES, OBJECTIVES, RECOMPUTES
from mlx_linearard.doctor.measuring import file_name

ALLOWED = 0.15
STEPS = 3
WIDE: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "rms_norm_eps": 1e-5, "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def main() -> int:
    options = arguments()
    if options.child:
        child(json.loads(options.child))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measured(work) for work in configurations(options, Path(scratch))]
    return report(rows, Path(options.out))


def two_lengths(text: str) -> list[int]:
    numbers = lengths(text)
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text}: must be two lengths, as in 512,1024")
    return numbers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the directory of SmolLM2-135M-Instruct (default: cache or hub)")
    parser.add_argument("--lengths", type=two_lengths, default="512,1024", help="two lengths, the shorter first")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights in memory")
    parser.add_argument("--objective", choices=OBJECTIVES, default="relation", help="the objective of the step")
    parser.add_argument("--long-objective", choices=LONG_OBJECTIVES, help="of the long parts (ce, longce, ce+recall)")
    parser.add_argument("--recompute", choices=RECOMPUTES, default="auto", help="the --recompute of distill")
    parser.add_argument("--workspace", type=int, default=256, help="MB for tiles and chunks")
    parser.add_argument("--out", default="examples/benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def configurations(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Two models, two lengths, the last layer and all layers, a 4-bit base, and long parts."""
    from mlx_linearard.convert.default_model import default_model

    from mlx_linearard.models.directory import check_model_dir

    smol = Path(options.model) if options.model else default_model()
    check_model_dir(smol)  # a mistake is reported before any file is made
    wide, small = (random_model(scratch / name, smol, bits) for name, bits in (("wide-246m", None), ("wide-4bit", 4)))
    short, long = options.lengths
    only, with_relations = options.long_objective, "relation" in options.objective
    chosen: list[tuple[Path, int, str, str | None]] = [
        (smol, short, "last", None),
        (smol, long, "last", None),
        (smol, long, "all", None),
        (wide, long, "last", None),
        (wide, short, "all", None),
        (small, short, "last", None),
        (smol, short, "last", only or "ce"),
        (smol, short, "last", only or "ce+recall"),
        (wide, short, "last", only or "longce"),
    ]
    return [
        {
            "path": str(path),
            "seq_len": length,
            "dtype": options.dtype,
            "workspace": options.workspace,
            "objective": options.objective,
            "recompute": options.recompute,
            **({"layers": layers} if with_relations else {}),
            **({"long_objective": term, "long_seq_len": 4 * long} if term else {}),
            "long_weight": 0.2 if term else 0.0,
        }
        for path, length, layers, term in chosen
        if with_relations or layers == "last"
    ]


def random_model(folder: Path, tokenizer_from: Path, bits: int | None) -> Path:
    """A model directory with random weights in bfloat16, quantized if `bits` is given."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.utils import quantize_model, save_model

    config = dict(WIDE)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if bits:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
    folder.mkdir()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer_from.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def measured(work: dict[str, Any]) -> dict[str, Any]:
    """One configuration, in its own process."""
    process = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(work)], stdout=subprocess.PIPE, text=True, check=True
    )
    row = json.loads(process.stdout.splitlines()[-1])
    print(
        f"{row['model']:<24} T={row['length']:<6} {row['layers']:<5} {row['long']:<16} "
        f"planned {row['planned_mb']:>8.1f} MB, "
        f"measured {row['measured_mb']:>8.1f} MB: {row['ratio']:.3f}  ({row['moment']})",
        flush=True,
    )
    return row


def child(work: dict[str, Any]) -> None:
    """Plan, train, and print both figures as one JSON line."""
    import mlx.core as mx
    import numpy as np

    from mlx_linearard.config import DistillConfig
    from mlx_linearard.distill.long import LongPart
    from mlx_linearard.distill.long_text import LongBlocks
    from mlx_linearard.distill.plan import inspect_model, objective_of, plan_run, trained_layers
    from mlx_linearard.distill.step import Schedule, TrainState, train_step
    from mlx_linearard.machine import Machine, describe, on_gpu
    from mlx_linearard.models.pair import load_pair

    path = Path(work.pop("path"))
    config = DistillConfig(model=str(path), grad_accum=1, **work)
    run = plan_run(config, inspect_model(config, path), Machine(describe(), on_gpu(), 1 << 40, 1.0))
    plan = run.memory
    pair = load_pair(
        path,
        method=config.method,
        factor=config.factor,
        lora_rank=config.lora_rank,
        dtype=run.dtype,
        adapt_layers=lambda model: range(trained_layers(config, objective_of(config, model), len(model.layers))),
    )
    objective = run.objective(pair.student)
    schedule = Schedule(1000, 1, 1, 1e-4, 0, 0.0, 5.0, 0)
    state = TrainState.start(pair, schedule)
    long = None
    if sizes := run.sizing.long:
        text = np.random.default_rng(0).integers(0, 1000, sizes.seq_len + 1).astype(np.int32)
        blocks = LongBlocks.of(text, sizes.text, 0, np.zeros(1, np.int64))
        long = LongPart.of(config, sizes, blocks, run.attention, run.kept_of_long)
    peak = 0
    for _ in range(STEPS):
        tokens = mx.random.randint(0, 1000, (1, run.sizing.seq_len + 1))
        mx.eval(tokens)
        peak = max(peak, train_step(pair, objective, schedule, state, [tokens], long=long).peak_memory)
    parts = ("weights", "adapters", "optimizer", "activations", "workspace")
    print(
        json.dumps(
            {
                "machine": describe(),
                "mlx": mx.__version__,
                "model": path.name,
                "dtype": run.dtype or "file's",
                "objective": config.objective,
                "recompute": config.recompute,
                "length": config.seq_len,
                "layers": config.layers,
                "long": f"{config.long_objective} {sizes.seq_len}" if sizes else "",
                "workspace_limit_mb": config.workspace,
                "planned_mb": round(plan.total / 1e6, 1),
                "measured_mb": round(peak / 1e6, 1),
                "ratio": round(plan.total / peak, 4),
                "moment": plan.moment,
                **{f"{name}_mb": round(getattr(plan, name) / 1e6, 1) for name in parts},
            }
        )
    )


def report(rows: list[dict[str, Any]], folder: Path) -> int:
    """Write a CSV named after the machine; returns 1 if a plan is off by too much."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"memory-plan-{file_name(rows[0]['machine'])}.csv"
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {file}")
    off = [row for row in rows if abs(row["ratio"] - 1) > ALLOWED]
    for row in off:
        print(
            f"off by {row['ratio'] - 1:+.0%}: {row['model']} T={row['length']} {row['layers']} {row['long']}",
            file=sys.stderr,
        )
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
