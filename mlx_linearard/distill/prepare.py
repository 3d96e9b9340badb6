"""From the options to a run that is ready to start: `make_plan` needs no weights, `load` loads them.

Neither writes a file. The processes of a shared run meet once in each of the two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import DistillConfig, read_yaml
from ..convert.default_model import default_model
from ..data import Blocks, Tokenizer, hash_of
from ..distributed.ranks import ALONE, Ranks
from ..distributed.watchdog import BEGIN
from ..errors import UserError
from ..evaluate.held_out import Fidelity, measure
from ..files import RunDir
from ..machine import Machine, describe, machine_of_speed, measure_machine, on_gpu, set_limits
from ..models.adapters import drop_rows
from ..models.directory import resolve
from ..models.pair import Pair, load_pair
from ..models.tokenizer import tokenizer_of
from ..models.trees import named_arrays
from ..models.weights import check_finite, hash_of_model, weight_files
from . import checkpoint
from .amounts import Amount
from .best import reference_length, score
from .listener import Listener
from .long import LongPart
from .long_text import LongBlocks
from .objective import Objective
from .place import check_not_in_use, check_output
from .plan import Plan, attention_choice, fit_long_part, inspect_model, objective_of, plan_run, trained_layers
from .sizing import Sizing
from .step import Schedule, TrainState
from .text import Text, read_text

# Options that may change when a run is resumed. A change of any other option makes another run.
FREE_ON_RESUME = {
    "output",
    "steps",
    "tokens",
    "save_every",
    "eval_every",
    "eval_tokens",
    "eval_lengths",
    "workspace",
    "recompute",
    "memory_limit",
    "cache_limit",
    "wired_limit",
    "resume",
    "overwrite",
    "dry_run",
    "force",
    "compare",
    "model",
    "data",
    "valid_data",
    "data_tokens",
    "keep",
    "patience",
    "keep_checkpoints",
    "report_to",
    "project_name",
}


@dataclass(frozen=True)
class Job:
    """A run that is ready to start: everything is checked and loaded, and nothing is written yet."""

    config: DistillConfig
    sizing: Sizing
    machine: Machine
    pair: Pair
    objective: Objective
    schedule: Schedule
    text: Text
    blocks: Blocks
    identity: dict[str, Any]  # the facts that a checkpoint must have in common with this run
    ranks: Ranks = ALONE
    long: LongPart | None = None
    _saving: threading.Lock = field(default_factory=threading.Lock)

    @property
    def run(self) -> RunDir:
        return RunDir(self.config.output)

    @property
    def workspace_bytes(self) -> int:
        return self.config.workspace << 20

    @property
    def reference(self) -> int:
        """The length of the windows on which states are compared."""
        return reference_length(self.text.held_out, self.pair.native_window)

    @property
    def measured_on(self) -> str:
        """A hash of the weights, the scaling and the held-out windows: rows of different hashes are not comparable."""
        scaling = [self.identity[name] for name in ("model", "method", "factor", "yarn_beta_fast", "yarn_beta_slow")]
        return f"{hash_of(*self.text.held_out.values())}-{hashlib.sha256(repr(scaling).encode()).hexdigest()[:16]}"

    @property
    def measured_with(self) -> list[Any]:
        """Everything that the rows of native and scaled depend on, to the last digit."""
        states = [path.stat() for path in weight_files(self.pair.path)]
        files = [[state.st_size, state.st_mtime_ns] for state in states]
        machine = [describe(), version("mlx"), os.environ.get("MLX_ENABLE_TF32", ""), self.workspace_bytes]
        return ["held-out", self.measured_on, files, self.config.dtype, machine]

    @property
    def compared_on(self) -> str:
        """A hash of the windows on which states are compared."""
        return hash_of(self.text.held_out[self.reference])

    def score(self, row: Fidelity) -> float:
        """The score of a student's row, in nats; lower is better (see `best.score`)."""
        return score(row, self.config.objective, self.reference)

    def measure(self, state: TrainState) -> Fidelity:
        """The row of a state, on the windows on which states are compared."""
        self.pair.set_parameters(state.parameters)
        held_out = {self.reference: self.text.held_out[self.reference]}
        return measure(self.pair, held_out, native=False, workspace_bytes=self.workspace_bytes)[1]

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint; returns its directory."""
        with self._saving:
            return checkpoint.save(self.run.checkpoints, state, self.identity, self.config.keep_checkpoints)

    def save_if_missing(self, state: TrainState) -> None:
        """Write a checkpoint unless there is one of this step; may be called from another thread."""
        with self._saving:
            if not self.has_checkpoint(state.step):
                checkpoint.save(self.run.checkpoints, state, self.identity, self.config.keep_checkpoints)

    def has_checkpoint(self, step: int) -> bool:
        return checkpoint.path_of(self.run.checkpoints, step).exists()

    def how_to_continue(self) -> str:
        """How a user continues this run after one of its processes is lost."""
        again = "continue with the same command and --resume"
        if saved := checkpoint.list_checkpoints(self.run.checkpoints):
            return f"the state after step {checkpoint.step_of(saved[-1])} is in {saved[-1]}: {again}"
        if self.run.config.exists():
            return f"no step was saved: {again}"
        return BEGIN if self.ranks.leads else f"the first process has what is saved: {again}"


# ---------------------------------------------------------------------------------------------------
# The plan


def make_plan(
    config: DistillConfig,
    machine: Machine | None = None,
    *,
    listener: Listener | None = None,
    ranks: Ranks = ALONE,
) -> Plan:
    """Check everything that can be checked without the weights, choose the sizes, and report the plan.

    Args:
        machine: the machine to plan for; by default this one, whose speed is measured.

    Raises:
        UserError: the options, the output directory or the model are wrong, or the run does not fit the machine.
    """
    listener = listener or Listener()
    with ranks.meeting():
        sizes = _sizes_of_output(config) if ranks.leads else {}
        config = with_sizes(config, ranks.from_first(sizes))
        set_limits(memory_limit=config.memory_limit, cache_limit=config.cache_limit, wired_limit=config.wired_limit)
        path = _model_path(config, listener, ranks)
        inspected = inspect_model(config, path)
        attention = None if machine else attention_choice(config, inspected)
        plan = plan_run(config, inspected, machine or _measured_machine(config, ranks), ranks, attention)
        for line in plan.lines():
            listener.say(line)
        plan.check()
    return plan


def _sizes_of_output(config: DistillConfig) -> dict[str, Any]:
    """The sizes with which a resumed run began, {} for a new run; UserError if --output cannot be used."""
    run = RunDir(config.output)
    check_output(config, run)
    check_not_in_use(config, run.root)
    return read_yaml(run.config) if config.resume and run.config.exists() else {}


def with_sizes(config: DistillConfig, sizes: Mapping[str, Any]) -> DistillConfig:
    """`config` with the sizes that it leaves open taken from `sizes`.

    A resumed run keeps its sizes and its learning rate, although the machine may be busier now and look slower, or
    another version would choose otherwise.
    """
    names = ["seq_len", "grad_accum", "eval_tokens", "learning_rate", "long_weight", "long_seq_len"] + (
        [] if config.tokens else ["steps"]
    )
    return dataclasses.replace(
        config, **{name: sizes[name] for name in names if getattr(config, name) is None and name in sizes}
    )


def _model_path(config: DistillConfig, listener: Listener, ranks: Ranks) -> Path:
    """The model directory. The first rank downloads the model, then the others find it in the cache."""
    if not ranks.leads:
        ranks.wait()
    path = resolve(config.model) if config.model else default_model(progress=listener.say)
    if ranks.leads:
        ranks.wait()
    return path


def _measured_machine(config: DistillConfig, ranks: Ranks) -> Machine:
    """This machine. All ranks use the speed of the first one, so that all choose the same sizes."""
    dtype = mx.float32
    if on_gpu():
        dtype = getattr(mx, "float16" if config.dtype == "auto" else config.dtype)
    if ranks.size == 1:
        return measure_machine(dtype)
    speed = ranks.from_first(measure_machine(dtype).gflops if ranks.leads else 0.0)
    return machine_of_speed(speed, 1 if mx.cuda.is_available() else ranks.on_this_host)


# ---------------------------------------------------------------------------------------------------
# The job


def load(plan: Plan, *, listener: Listener | None = None, ranks: Ranks = ALONE, text: Text | None = None) -> Job:
    """Load the weights and the text, and build the objective and the schedule.

    Args:
        text: the tokens of an earlier job with the same options, which saves reading them again.

    Raises:
        UserError: the weights or the text are wrong, or this rank would not train the same as the first rank.
    """
    listener = listener or Listener()
    with ranks.meeting():
        job = _load(plan, listener, ranks, text)
        _check_identity(job, ranks.from_first(job.identity))
    return job


def _load(plan: Plan, listener: Listener, ranks: Ranks, text: Text | None) -> Job:
    text = text or read_text(plan, tokenizer_of(plan.path, plan.native), listener)
    plan = with_long_text(plan, text, listener)
    config, sizing = plan.config, plan.sizing
    pair = load_pair(
        plan.path,
        method=config.method,
        factor=config.factor,
        yarn_beta_fast=config.yarn_beta_fast,
        yarn_beta_slow=config.yarn_beta_slow,
        fine_tune_type=config.fine_tune_type,
        lora_rank=config.lora_rank,
        lora_scale=config.lora_scale,
        lora_dropout=config.lora_dropout,
        adapt_layers=lambda model: range(trained_layers(config, objective_of(config, model), len(model.layers))),
        dtype=plan.dtype,
        seed=config.seed,
    )
    check_finite(dict(named_arrays(pair.teacher.parameters())), plan.path)
    share = ranks.share(sizing.grad_accum, sizing.batch_size)
    if share.parts > 1:
        drop_rows(pair.student, share.part, share.parts)
    for line in amount_of(text, sizing).lines(sizing):
        listener.say(line)
    return Job(
        config=config,
        sizing=sizing,
        machine=plan.machine,
        pair=pair,
        objective=plan.objective(pair.student),
        schedule=_schedule(config, sizing),
        text=text,
        blocks=blocks_of(config, sizing, text),
        identity=_identity(config, sizing, plan.path, text),
        ranks=ranks,
        long=long_part_of(plan, text, pair.tokenizer),
    )


def _schedule(config: DistillConfig, sizing: Sizing) -> Schedule:
    return Schedule(
        steps=sizing.steps,
        batch_size=config.batch_size,
        grad_accum=sizing.grad_accum,
        learning_rate=sizing.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        seed=config.seed,
    )


def _check_identity(job: Job, first: dict[str, Any]) -> None:
    """UserError if this rank would not train the same as the first rank."""
    own = json.loads(json.dumps(job.identity))
    if different := checkpoint.differences(first, own, first.keys() | own.keys()):
        raise UserError(
            f"process {job.ranks.rank} would not train the same as the first process: {different}; give all "
            "processes the same files"
        )


def _identity(config: DistillConfig, sizing: Sizing, path: Path, text: Text) -> dict[str, Any]:
    """The facts that a checkpoint must have in common with this run, so that the run can resume from it."""
    fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
    return {
        **fixed,
        "seq_len": sizing.seq_len,
        "grad_accum": sizing.grad_accum,
        "learning_rate": sizing.learning_rate,
        "model": hash_of_model(path),
        "data": hash_of(text.training),
        "first_token": text.first,
        **({"long_seq_len": sizing.long_seq_len} if sizing.long_seq_len else {}),
        **({"long_data": hash_of(text.long)} if text.long is not None else {}),
    }


# ---------------------------------------------------------------------------------------------------
# The text


def with_long_text(plan: Plan, text: Text, listener: Listener) -> Plan:
    """The plan with a long part for which there is text; says what it changes."""
    fitted, line = fit_long_part(plan, len(text.training if text.long is None else text.long))
    if line:
        listener.say(line)
    return fitted


def long_part_of(plan: Plan, text: Text, tokenizer: Tokenizer) -> LongPart | None:
    """The long part of a step, None without one; UserError if the long text is too short for one block."""
    if (sizes := plan.sizing.long) is None:
        return None
    tokens = text.training if text.long is None else text.long
    blocks = LongBlocks.of(tokens, sizes.text, plan.config.seed, text.long_starts, text.first)
    return LongPart.of(plan.config, sizes, blocks, plan.attention, plan.kept_of_long)


def blocks_of(config: DistillConfig, sizing: Sizing, text: Text) -> Blocks:
    """Training blocks; UserError if they are fewer than a batch."""
    blocks = Blocks(text.training, sizing.seq_len, config.seed, text.first, text.answers)
    if blocks.count < config.batch_size:
        raise UserError(
            f"the training text makes {blocks.count} blocks of {sizing.seq_len} tokens, too few for one batch of "
            f"{config.batch_size}: give more text with --data"
        )
    return blocks


def amount_of(text: Text, sizing: Sizing) -> Amount:
    """How much text was read."""
    return Amount(len(text.training), len(text.held_out[sizing.eval_lengths[0]]))
