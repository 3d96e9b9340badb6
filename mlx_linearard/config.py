"""Every option of a distillation once: type, default, help and check. Flags, YAML and help texts come from it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .cli import Parser
from .errors import UserError
from .rope import METHODS

OBJECTIVES = ("relation", "logits", "relation+logits", "ce")
FINE_TUNE_TYPES = ("lora", "dora", "full")
NORMALIZATIONS = ("heads", "paper-code")
KEEPS = ("best", "last")
DTYPES = ("auto", "float32", "bfloat16", "float16")

Check = Callable[[Any], str | None]  # the complaint, or None where the value is fine


def _positive(value: Any) -> str | None:
    return None if value > 0 else "must be above 0"


def _not_negative(value: Any) -> str | None:
    return None if value >= 0 else "must not be negative"


def _fraction(value: Any) -> str | None:
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


def _above_one(value: Any) -> str | None:
    return None if value > 1 else "must be above 1: a factor of 1 extends nothing"


def _one_of(choices: Sequence[str]) -> Check:
    def check(value: Any) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}"

    return check


def _layers(value: str) -> str | None:
    if value in ("last", "all") or all(part.strip().isdigit() for part in value.split(",")):
        return None
    return "must be last, all, or layer numbers such as 0,5,11"


def _relations(value: str) -> str | None:
    if value and set(value) <= set("qkv") and len(set(value)) == len(value):
        return None
    return "must name relations among q, k and v, each once, such as qkv or qk"


def objectives_of(compare: Any) -> tuple[str, ...]:
    """The objectives of `--compare a,b`, or of that line of a config.yaml, in order; () for none."""
    return tuple(filter(None, (part.strip() for part in str(compare or "").split(","))))


def _several_objectives(value: str) -> str | None:
    names = [part.strip() for part in value.split(",")]
    if len(names) > 1 and len(set(names)) == len(names) and set(names) <= set(OBJECTIVES):
        return None
    return f"must name two or more of {', '.join(OBJECTIVES)}, each once, with commas between them"


def _lengths(value: str) -> str | None:
    if value == "auto" or all(part.strip().isdigit() and int(part) > 1 for part in value.split(",")):
        return None
    return "must be auto or token counts above 1, such as 2048,16384"


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    group: str = "run",
) -> Any:
    """A dataclass field that carries all there is to know of an option."""
    if choices is not None:
        check = _one_of(choices)
        metavar = metavar or "|".join(choices)
    metadata = {"help": help, "check": check, "metavar": metavar, "group": group}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DistillConfig:
    """The options of `mlx_linearard.distill`. None means: chosen for the model, the data and the machine."""

    model: str | None = option(
        None,
        "a local mlx-lm or Hugging Face directory, or a hub repository; without it SmolLM2-135M-Instruct",
        metavar="PATH_OR_REPO",
        group="model and data",
    )
    data: str | None = option(
        None,
        "training text: a .txt, a folder of .txt, a .jsonl with a `text` field (each optionally .gz or .xz), "
        "or hf:NAME; without it the prose of this Python's own documentation",
        metavar="PATH_OR_DATASET",
        group="model and data",
    )
    valid_data: str | None = option(
        None,
        "held-out text, in the same forms; without it the last part of --data",
        metavar="PATH_OR_DATASET",
        group="model and data",
    )
    data_tokens: int = option(
        16_000_000,
        "read at most this many tokens of --data",
        check=_positive,
        metavar="N",
        group="model and data",
    )
    output: str = option("linearard-run", "the run directory to write", metavar="DIR")
    method: str = option("linear", "how RoPE is scaled", choices=METHODS, group="window")
    factor: float = option(
        4.0, "how many times longer the window becomes", check=_above_one, metavar="X", group="window"
    )
    objective: str = option(
        "relation",
        "what is distilled: attention relations (LinearARD), the teacher's logits, both, or plain "
        "next-token cross-entropy",
        choices=OBJECTIVES,
        group="objective",
    )
    compare: str | None = option(
        None,
        "train each of these objectives on the same tokens from the same start, each in a run of its own below "
        "--output, and weigh them in one report; `restored` is the first of them",
        check=_several_objectives,
        metavar="OBJECTIVE,OBJECTIVE",
        group="objective",
    )
    layers: str = option(
        "last", "layers whose relations are matched: last, all or 0,5,11", check=_layers, group="objective"
    )
    relations: str = option("qkv", "which relations are matched", check=_relations, group="objective")
    normalization: str = option(
        "heads",
        "divide each relation by its own number of heads, or all by the query heads as the paper's code does",
        choices=NORMALIZATIONS,
        group="objective",
    )
    relation_weight: float = option(1.0, "weight of the relation loss", check=_positive, metavar="W", group="objective")
    logits_weight: float = option(
        1.0, "weight of the logits loss in relation+logits", check=_positive, metavar="W", group="objective"
    )
    seq_len: int | None = option(
        None,
        "tokens a block; at most the model's native window",
        check=_positive,
        metavar="T",
        group="training",
    )
    batch_size: int = option(1, "blocks a forward pass", check=_positive, metavar="N", group="training")
    grad_accum: int | None = option(
        None,
        "forward passes a step, of all processes together; by default as many as make about 8192 tokens",
        check=_positive,
        metavar="N",
        group="training",
    )
    steps: int | None = option(None, "optimizer steps", check=_positive, metavar="N", group="training")
    tokens: int | None = option(
        None, "training tokens, instead of --steps", check=_positive, metavar="N", group="training"
    )
    learning_rate: float = option(3e-4, "peak learning rate of AdamW", check=_positive, metavar="LR", group="training")
    warmup: int = option(4, "warm-up steps", check=_not_negative, metavar="N", group="training")
    weight_decay: float = option(0.0, "AdamW's weight decay", check=_not_negative, metavar="W", group="training")
    clip: float = option(
        5.0,
        "clip the gradient's norm to this; 0 turns clipping off",
        check=_not_negative,
        metavar="NORM",
        group="training",
    )
    lora_rank: int = option(64, "rank of the adapters", check=_positive, metavar="R", group="training")
    lora_scale: float = option(
        2.0, "scale of the adapters (alpha / rank)", check=_positive, metavar="S", group="training"
    )
    lora_dropout: float = option(0.0, "dropout before the adapters", check=_fraction, metavar="P", group="training")
    fine_tune_type: str = option(
        "lora",
        "what is trained of q, k and v: low-rank adapters, DoRA adapters, or the projections themselves",
        choices=FINE_TUNE_TYPES,
        group="training",
    )
    seed: int = option(0, "seed of adapters, data order and dropout", check=_not_negative, metavar="N")
    save_every: int = option(50, "steps between checkpoints; 0 saves only the last", check=_not_negative, metavar="N")
    eval_every: int = option(
        0,
        "steps between evaluations on held-out text; 0 evaluates at the ends only",
        check=_not_negative,
        metavar="N",
    )
    keep: str = option(
        "best",
        "which state is exported: the best on held-out text, by KL to the teacher (with objective ce by perplexity), "
        "among the start, what --eval-every evaluated and the end; or the last",
        choices=KEEPS,
    )
    patience: int = option(
        0,
        "stop after this many evaluations in a row without improvement; 0 never does",
        check=_not_negative,
        metavar="N",
    )
    keep_checkpoints: int = option(2, "how many checkpoints stay, beside the best", check=_positive, metavar="N")
    eval_tokens: int | None = option(None, "held-out tokens a length", check=_positive, metavar="N")
    eval_lengths: str = option(
        "auto",
        "lengths at which perplexity is measured; auto is the block length, and on a GPU also twice the native window",
        check=_lengths,
        metavar="T,T",
    )
    dtype: str = option(
        "auto",
        "of the frozen weights in memory; auto is float32 on a CPU, the model's own elsewhere",
        choices=DTYPES,
    )
    workspace: int = option(256, "MB that tiles of scores may take", check=_positive, metavar="MB")
    memory_limit: int | None = option(
        None,
        "MB of arrays beyond which mlx waits for work to finish and frees its cache",
        check=_positive,
        metavar="MB",
    )
    cache_limit: int | None = option(None, "MB that mlx may keep for reuse", check=_not_negative, metavar="MB")
    wired_limit: int | None = option(
        None, "MB that stay in memory whatever else runs (Apple GPUs)", check=_positive, metavar="MB"
    )
    resume: bool = option(False, "go on from the last checkpoint in --output")
    overwrite: bool = option(False, "replace a run that --output already holds")
    dry_run: bool = option(False, "print the plan (data, steps, memory) and stop, without loading the weights")
    force: bool = option(False, "run although the plan needs more memory than the machine has")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, check = getattr(self, item.name), item.metadata["check"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{flag(item.name)} {value}: must be a finite number")
            if value is not None and check and (complaint := check(value)):
                raise UserError(f"--{flag(item.name)} {value}: {complaint}")
        if self.steps is not None and self.tokens is not None:
            raise UserError("--steps and --tokens say the same thing twice: give one of them")
        if self.patience and not self.eval_every:
            raise UserError(f"--patience {self.patience} counts evaluations: give --eval-every as well")
        if self.compare and self.objective != "relation":
            raise UserError("--compare and --objective both say what is distilled: give one of them")
        if self.resume and self.overwrite:
            raise UserError("--resume goes on with a run and --overwrite replaces it: give one of them")


def flag(name: str) -> str:
    """The spelling of an option on the command line, without its dashes."""
    return name.replace("_", "-")


def _type_of(item: dataclasses.Field[Any]) -> type:
    """The plain type of a field, with `| None` taken off."""
    hint = typing.get_type_hints(DistillConfig)[item.name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not type(None))
    return typing.cast(type, hint)


def parser() -> argparse.ArgumentParser:
    """The command line of `distill`, made from DistillConfig. Absent flags are absent from the namespace."""
    made = Parser(
        "mlx_linearard.distill",
        "Extend a model's context window and restore what that costs, by distilling the frozen native model. "
        "Without any option it runs a real demonstration sized to this machine. Several processes share a run "
        "where mlx.launch starts it: `mlx.launch -n 2 -- python -m mlx_linearard.distill ...` on one machine, or "
        "`mlx.launch --hostfile hosts.json -- ...` on several; each makes its part of every step's --grad-accum times "
        "--batch-size blocks, the result is that of one process, and only the first one writes.",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("-c", "--config", metavar="FILE.yaml", help="options from a file; flags win over it")
    options = dataclasses.fields(DistillConfig)
    for name in dict.fromkeys(item.metadata["group"] for item in options):
        group = made.add_argument_group(name)
        for item in options:
            if item.metadata["group"] == name:
                _add_flag(group, item)
    return made


def _add_flag(group: Any, item: dataclasses.Field[Any]) -> None:
    kind, help_ = _type_of(item), item.metadata["help"].replace("%", "%%")
    if kind is bool:
        group.add_argument(f"--{flag(item.name)}", action="store_true", help=help_, default=argparse.SUPPRESS)
        return
    if item.default is not None:
        help_ = f"{help_} (default: {item.default})"
    group.add_argument(
        f"--{flag(item.name)}",
        type=kind,
        help=help_,
        metavar=item.metadata["metavar"],
        default=argparse.SUPPRESS,
    )


def parse(arguments: Sequence[str] | None = None) -> DistillConfig:
    """The configuration of a command line: a flag wins over --config's file, which wins over the default."""
    given = vars(parser().parse_args(arguments))
    path = given.pop("config", None)
    return DistillConfig(**{**(read_yaml(path) if path else {}), **given})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, checked by name and type; UserError names the nearest option there is."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must hold `option: value` lines, not a {type(loaded).__name__}")
    return {str(key).replace("-", "_"): _checked(path, str(key), value) for key, value in loaded.items()}


def _checked(path: str | Path, key: str, value: Any) -> Any:
    known = {item.name: item for item in dataclasses.fields(DistillConfig)}
    name = key.replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see mlx_linearard.distill --help"
        raise UserError(f"--config {path}: there is no option {one_word(key)}{hint}")
    kind = _type_of(known[name])
    if value is None and known[name].default is None:
        return None
    if kind is str and name in ("layers", "eval_lengths", "compare") and isinstance(value, int | list):
        value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = _number(value)  # YAML 1.1 reads 3e-4 as a word
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"--config {path}: {name} must be a {kind.__name__}, not {one_word(value)}")
    return value


def _number(value: int | str) -> Any:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def one_word(value: Any) -> str:
    """A value quoted for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_yaml(config: DistillConfig) -> str:
    """The configuration as a YAML file that `--config` reads back to the same."""
    body = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    for passing in ("resume", "overwrite", "dry_run", "force"):
        body.pop(passing)
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)
