"""The planned memory and time of the recipes in this folder, from the planner that every run uses.

    python examples/recipes/plan.py            # print them
    python examples/recipes/plan.py --write    # and put them into the recipes' comments

shapes.json holds the sizes from each model's config.json. The plan reads a directory of that shape whose weight file
is a header with nothing behind it, so nothing is downloaded. The time is for an Apple GPU at SPEED; what a machine
reaches, `python -m mlx_linearard.doctor` measures. The memory is the least that a run needs (`--recompute all`); by
default a run keeps more in memory, and is faster, where the machine has it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_linearard.config import DistillConfig, read_yaml
from mlx_linearard.distill.plan import Plan, inspect_model, plan_run
from mlx_linearard.machine import Machine
from mlx_linearard.progress import duration

FOLDER = Path(__file__).parent
SPEED = 10_000.0  # GFLOP/s of a matrix product in bfloat16
PLANNED = "# Planned:"
DTYPES = {mx.bfloat16: "BF16", mx.float32: "F32", mx.uint32: "U32"}


def shape_of(recipe: Path) -> dict[str, Any]:
    """The config of a recipe's model."""
    shapes: dict[str, dict[str, Any]] = json.loads((FOLDER / "shapes.json").read_text())
    return shapes[read_yaml(recipe)["model"]]


def empty_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model directory of this shape whose weights take no room on the disk: all are zero."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    header, end = {}, 0
    for name, array in tree_flatten(model.parameters()):
        header[name] = {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def plan_of(recipe: Path, folder: Path) -> Plan:
    """The plan of a recipe for an Apple GPU; `folder` is where the empty model is made."""
    options = DistillConfig(**{**read_yaml(recipe), "recompute": "all"})
    machine = Machine("an Apple GPU", gpu=True, memory=1 << 40, gflops=SPEED)
    return plan_run(options, inspect_model(options, empty_model(folder, shape_of(recipe))), machine)


def planned(plan: Plan) -> str:
    """The comment in a recipe."""
    return (
        f"{PLANNED} {plan.memory.total / 1e9:.1f} GB of memory or more; {duration(plan.sizing.times.total)} at "
        f"{SPEED / 1000:.0f} TFLOP/s (mlx_linearard.doctor says what your machine reaches)."
    )


def main() -> None:
    for recipe in sorted(FOLDER.glob("*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            line = planned(plan_of(recipe, Path(folder) / "model"))
        print(f"{recipe.name}: {line}")
        if "--write" in sys.argv[1:]:
            lines = recipe.read_text().splitlines()
            recipe.write_text("".join(f"{line if old.startswith(PLANNED) else old}\n" for old in lines))


if __name__ == "__main__":
    main()
