"""The names of mlx_lm.lora's options: those that mean the same as one of ours, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

# mlx-lm's name -> ours. The flags are hidden in --help.
SAME = {
    "iters": "steps",
    "max_seq_length": "seq_len",
    "steps_per_eval": "eval_every",
    "grad_accumulation_steps": "grad_accum",
}
LORA = {"rank": "lora_rank", "scale": "lora_scale", "dropout": "lora_dropout"}  # in `lora_parameters`

# mlx-lm's name -> what to use instead. The flags are refused, the entries of a file are named.
OTHER = {
    "num_layers": "every layer that the loss reaches is trained; --layers chooses those whose relations are matched",
    "adapter_path": "give --output DIR; the adapters are then in DIR/adapters",
    "steps_per_report": "every step is a line of metrics.jsonl",
    "val_batches": "give --eval-tokens, the held-out tokens per length",
    "test": "mlx_linearard.evaluate measures a finished run",
    "test_batches": "mlx_linearard.evaluate --tokens says how much text is measured",
    "optimizer": "the optimizer is AdamW, with --learning-rate and --weight-decay",
    "optimizer_config": "the optimizer is AdamW, with --learning-rate and --weight-decay",
    "lr_schedule": "the learning rate follows a cosine after --warmup steps",
    "train": "distill always trains",
    "grad_checkpoint": "give --recompute all; by default only what does not fit is computed again",
    "resume_adapter_file": "a run continues with --resume, from its own checkpoints",
    "clear_cache_threshold": "give --cache-limit",
    "trust_remote_code": "no code of a model is run",
    "hf_dataset": "give --data hf:NAME[:CONFIG][@SPLIT]",
}
# Values of these that change nothing, so that nobody needs to read of them.
IDLE = {
    "train": (True,),
    "test": (False,),
    "grad_checkpoint": (True, False),
    "optimizer": ("adam", "adamw"),  # without weight decay both are the same
    "trust_remote_code": (False,),
    "clear_cache_threshold": (0,),
}
REFUSED = ("hf_dataset", "resume_adapter_file")  # without them, another model would be trained, or on other data


def translated(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Options with mlx-lm's names under ours. UserError if one is given under both.

    mlx-lm counts forward passes as iterations, so iterations are divided by the passes of a step, if both are given.
    """
    options = dict(given)
    passes, iters = options.get("grad_accumulation_steps"), options.get("iters")
    if type(passes) is int and type(iters) is int and passes > 0:
        options["iters"] = max(1, iters // passes)
    for theirs, ours in SAME.items():
        if theirs not in options:
            continue
        if ours in options:
            raise UserError(f"{place}{theirs} and {ours} are the same option: give one of them")
        options[ours] = options.pop(theirs)
    return options


def from_mlx_lm(path: str | Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a YAML file with mlx_lm.lora's names under ours, and a note for each that has no equal.

    Other files come back as they are. Raises UserError for an option without which the file would mean another run.
    """
    known = {*SAME, *OTHER, "lora_parameters"}
    if not known & options.keys():
        return dict(options), []
    kept = {name: value for name, value in options.items() if name not in OTHER and name != "lora_parameters"}
    kept = {name: value for name, value in kept.items() if name not in SAME or value is not None}
    notes = []
    for name in OTHER.keys() & options.keys():
        value = options[name]
        if value is None or value in IDLE.get(name, ()) or (name == "optimizer_config" and not _any(value)):
            continue
        if name in REFUSED:
            raise UserError(f"{path}: {name} is not read: {OTHER[name]}")
        notes.append(f"{path}: {name} is not used: {OTHER[name]}")
    if "iters" in kept and not {"grad_accum", "grad_accumulation_steps"} & kept.keys():
        kept["grad_accum"] = 1  # mlx-lm's default; ours would make more passes per step
    lora, more = _lora(path, options.get("lora_parameters"))
    return translated({**kept, **lora}, f"{path}: "), sorted(notes) + more


def _any(value: Any) -> bool:
    return any(value.values()) if isinstance(value, dict) else value is not None


def _lora(path: str | Path, parameters: Any) -> tuple[dict[str, Any], list[str]]:
    """Ours of `lora_parameters`, and the notes on its other entries."""
    if parameters is None:
        return {}, []
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: lora_parameters must hold `name: value` lines, such as rank, scale and dropout")
    notes = []
    for name in sorted(map(str, parameters.keys() - LORA.keys())):
        reason = "the q, k and v projections are trained" if name == "keys" else "only rank, scale and dropout are read"
        notes.append(f"{path}: lora_parameters.{name} is not used: {reason}")
    return {ours: parameters[theirs] for theirs, ours in LORA.items() if theirs in parameters}, notes
