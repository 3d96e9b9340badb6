"""A distillation from its configuration to its run directory: plan, measure, train, export, verify."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .. import __version__
from ..config import DistillConfig, read_yaml, to_yaml
from ..convert.default_model import default_model
from ..data import Blocks, Tokenizer, hash_of, python_prose, read_documents, split, tokenize, windows
from ..distributed.ranks import ALONE, Ranks, joined
from ..errors import UserError
from ..evaluate.held_out import Fidelity, measure
from ..export.fuse import write_adapters, write_base, write_fused
from ..export.verify import Verified, student_logits, verify_export
from ..files import RunDir, disk_errors, existing_parent, new_file, read_config, read_json, sweep, write_json
from ..machine import Machine, machine_of_speed, measure_machine, on_gpu, set_limits
from ..models.adapters import drop_rows
from ..models.directory import resolve
from ..models.pair import load_pair
from ..models.tokenizer import tokenizer_of
from ..report.content import write_report
from . import checkpoint
from .job import Job, Listener
from .loop import train_run
from .outline import Outline, objective_of, outline
from .plan import Sizing
from .step import Schedule, TrainState

VERIFY_TOKENS = 64

# Options that may differ when a run is resumed; all others make another run of it.
FREE_ON_RESUME = {
    "output", "steps", "tokens", "save_every", "eval_every", "eval_tokens", "eval_lengths", "workspace",
    "memory_limit", "cache_limit", "wired_limit", "resume", "overwrite", "dry_run", "force", "compare", "model",
    "data", "valid_data", "data_tokens", "keep", "patience", "keep_checkpoints",
}  # fmt: skip


Text = tuple[np.ndarray, dict[int, np.ndarray]]  # training tokens (N,), held-out windows by length
Rows = tuple[Fidelity, Fidelity]  # native, scaled


@dataclass(frozen=True)
class Result:
    """What `distill` returns: where the run lies, and the rows of its table."""

    run: RunDir
    native: Fidelity
    scaled: Fidelity
    restored: Fidelity
    export: Verified
    seconds: float
    exported_step: int  # the step whose state `restored` is; 0 is the start
    steps: int  # done
    skipped: int  # of them, by the guard


def distill(config: DistillConfig, listener: Listener | None = None, ranks: Ranks | None = None) -> Result | None:
    """Run a whole distillation (the contract's main path); None after a dry run, and at other ranks than the first.

    Processes that mlx.launch has started share it; `ranks` where they know each other already. Only the first
    of them writes and tells its listener.
    Raises UserError for a user's mistake, before anything is written; KeyboardInterrupt after saving; LostProcess,
    where that could be also after saving, when another process has ended.
    """
    if ranks is None:
        with joined() as ranks:
            return distill(config, listener, ranks)
    listener = (ranks.leads and listener) or Listener()
    started = time.perf_counter()
    if config.compare:
        raise UserError("--compare asks for several runs: call compare_objectives, which makes them")
    if config.dry_run:
        plan_only(config, listener, ranks)
        return None
    return execute(prepare(config, listener, ranks=ranks), listener, started)


def plan_only(config: DistillConfig, listener: Listener, ranks: Ranks = ALONE) -> None:
    """Check all that can be checked without the weights, and tell the plan; the start of the text is read."""
    _, config, found = _outlined(config, listener, ranks)
    few = dataclasses.replace(config, data_tokens=min(config.data_tokens, _enough(config, found.sizing)))

    def check() -> None:
        text = _tokens(few, tokenizer_of(found.path, found.native), found.sizing, listener)
        _blocks(config, found.sizing, text[0])

    ranks.each(check)


def _enough(config: DistillConfig, sizing: Sizing) -> int:
    """Tokens of text that make a batch and a held-out window, with the fifth that is held out."""
    return 10 * (sizing.seq_len * config.batch_size + max(sizing.eval_lengths) + 1)


def prepare(config: DistillConfig, listener: Listener, text: Text | None = None, ranks: Ranks = ALONE) -> Job:
    """Check and load everything, and tell the plan; nothing is written. `text` saves reading it again.

    Raises UserError for a user's mistake.
    """
    run, config, found = _outlined(config, listener, ranks)
    job = ranks.each(lambda: _load(config, run, found, listener, text, ranks))
    first = ranks.from_first(lambda: job.identity)
    ranks.each(lambda: _check_identity(job, first))
    return job


def _outlined(config: DistillConfig, listener: Listener, ranks: Ranks = ALONE) -> tuple[RunDir, DistillConfig, Outline]:
    """The run's directory, its options with the sizes of a resumed run, and its outline, told; UserError where it
    cannot be, or does not fit the machine."""
    run = RunDir(config.output)
    config = with_sizes(config, ranks.from_first(lambda: _output_sizes(config, run)))

    def model() -> Path:
        set_limits(memory_limit=config.memory_limit, cache_limit=config.cache_limit, wired_limit=config.wired_limit)
        return resolve(config.model) if config.model else default_model(progress=listener.say)

    path = ranks.in_turn(model)
    measure = _measurement(config, path, ranks)

    def plan() -> Outline:
        found = outline(config, path, measure, ranks)
        for line in found.lines():
            listener.say(line)
        found.check(config)
        return found

    return run, config, ranks.each(plan)


def _output_sizes(config: DistillConfig, run: RunDir) -> dict[str, Any]:
    """The sizes that a resumed run began with; {} for another. UserError where the run's place is none."""
    _check_output(config, run)
    return read_sizes(run) if config.resume else {}


def _measurement(config: DistillConfig, path: Path, ranks: Ranks) -> Callable[[], Machine]:
    """What tells of the machine. Ranks have one speed between them, that of the first, so that all size alike."""
    dtype = "float16" if config.dtype == "auto" else config.dtype

    def measure() -> Machine:
        return measure_machine(getattr(mx, dtype) if on_gpu() else mx.float32)

    if ranks.size == 1:
        return measure
    speed = ranks.from_first(lambda: outline(config, path, measure, ranks).machine.gflops)
    return lambda: machine_of_speed(speed, 1 if mx.cuda.is_available() else ranks.beside)


def _check_identity(job: Job, first: dict[str, Any]) -> None:
    """UserError where this rank would train something else than the first."""
    own = json.loads(json.dumps(job.identity))
    if different := checkpoint.differences(first, own, first.keys() | own.keys()):
        raise UserError(
            f"process {job.ranks.rank} would train something else than the first one: {different}; give all the "
            "same files"
        )


def read_sizes(run: RunDir) -> dict[str, Any]:
    """The options of a run that is resumed, as it resolved them; {} where it never came so far."""
    return read_yaml(run.config) if run.config.exists() else {}


def with_sizes(config: DistillConfig, sizes: Mapping[str, Any]) -> DistillConfig:
    """`config` with what it leaves open as `sizes` has it: the machine may be busier than it was, and look slower."""
    names = ["seq_len", "grad_accum", "eval_tokens"] + ([] if config.tokens else ["steps"])
    return dataclasses.replace(
        config, **{name: sizes[name] for name in names if getattr(config, name) is None and name in sizes}
    )


# ---------------------------------------------------------------------------------------------------
# Before anything is written


def _check_output(config: DistillConfig, run: RunDir) -> None:
    if run.comparison.exists():
        raise UserError(f"--output {run.root} holds a comparison: give --compare as well, or choose another directory")
    holds = run.config.exists() or run.checkpoints.exists()
    check_place(config, run.root, "run", holds=holds, missing="checkpoint to go on from")


def check_place(config: DistillConfig, root: Path, kind: str, *, holds: bool, missing: str) -> None:
    """UserError where `root` is no place for a `kind`. `holds`: whether it has one; `missing`: what --resume needs."""
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {root} is a file: choose a directory")
    if config.resume and not holds:
        raise UserError(f"--resume: {root} holds no {missing}")
    if holds and not (config.resume or config.overwrite):
        raise UserError(
            f"--output {root} already holds a {kind}: pass --resume to go on with it, --overwrite to replace it"
        )
    if root.is_dir() and any(root.iterdir()) and not holds:
        raise UserError(f"--output {root} exists and is not a {kind}: choose another directory")
    if not config.dry_run:
        _probe(root)


def _probe(target: Path) -> None:
    """UserError where `target` cannot be made or written; leaves nothing behind."""
    parent = existing_parent(target)
    if not parent.is_dir():
        raise UserError(f"--output {target}: {parent} is not a directory; choose another place")
    probe = parent / f".linearard-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise UserError(f"--output {target} cannot be written ({error.strerror}): choose another place") from None


def _load(
    config: DistillConfig, run: RunDir, found: Outline, listener: Listener, text: Text | None, ranks: Ranks
) -> Job:
    path, sizing = found.path, found.sizing
    pair = load_pair(
        path, method=config.method, factor=config.factor, fine_tune_type=config.fine_tune_type,
        lora_rank=config.lora_rank, lora_scale=config.lora_scale, lora_dropout=config.lora_dropout,
        adapt_layers=lambda model: range(objective_of(config, model).last_layer(len(model.layers)) + 1),
        dtype=found.dtype, seed=config.seed,
    )  # fmt: skip
    share = ranks.share(sizing.grad_accum, sizing.batch_size)
    if share.parts > 1:
        drop_rows(pair.student, share.part, share.parts)
    objective = objective_of(config, pair.student)
    train_tokens, held_out = text or _tokens(config, pair.tokenizer, sizing, listener)
    blocks = _blocks(config, sizing, train_tokens)
    schedule = Schedule(
        sizing.steps, config.batch_size, sizing.grad_accum, config.learning_rate, config.warmup,
        config.weight_decay, config.clip, config.seed,
    )  # fmt: skip
    return Job(
        config, pair, objective, schedule, blocks, held_out, run, sizing, found.machine,
        _identity(config, sizing, path, train_tokens), ranks,
    )  # fmt: skip


def _blocks(config: DistillConfig, sizing: Sizing, tokens: np.ndarray) -> Blocks:
    """Training blocks; UserError where they are fewer than a batch."""
    blocks = Blocks(tokens, sizing.seq_len, config.seed)
    if blocks.count < config.batch_size:
        raise UserError(
            f"the training text makes {blocks.count} blocks of {sizing.seq_len} tokens, too few for one batch of "
            f"{config.batch_size}: give more text with --data"
        )
    return blocks


def _tokens(config: DistillConfig, tokenizer: Tokenizer, sizing: Sizing, listener: Listener) -> Text:
    documents = read_documents(config.data) if config.data else python_prose()
    listener.say(f"reading {config.data or 'the prose of this Python'}")
    stream = tokenize(documents, tokenizer, limit=config.data_tokens)
    if config.valid_data:
        held = tokenize(read_documents(config.valid_data), tokenizer, limit=config.data_tokens)
    else:
        stream, held = split(stream, 2 * max(sizing.eval_tokens, max(sizing.eval_lengths) + 1))
    cut = {n: windows(held, n, max(1, sizing.eval_tokens // n)) for n in sizing.eval_lengths}
    if not len(cut[sizing.eval_lengths[0]]):
        raise UserError(
            f"the held-out text has {len(held)} tokens, too few for one block of {sizing.eval_lengths[0]}: give more "
            "text with --data or --valid-data, or a shorter --seq-len"
        )
    return stream, {n: w for n, w in cut.items() if len(w)}


def _identity(config: DistillConfig, sizing: Sizing, path: Path, tokens: np.ndarray) -> dict[str, Any]:
    """What a checkpoint must agree on to be gone on from."""
    fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
    weights = [f"{p.name}:{p.stat().st_size}" for p in sorted(path.glob("model*.safetensors"))]
    model = json.dumps([read_config(path), weights], sort_keys=True).encode()
    return {
        **fixed,
        "seq_len": sizing.seq_len,
        "grad_accum": sizing.grad_accum,
        "model": hashlib.sha256(model).hexdigest()[:16],
        "data": hash_of(tokens),
    }


# ---------------------------------------------------------------------------------------------------
# The run


def execute(job: Job, listener: Listener, started: float, before: Rows | None = None) -> Result | None:
    """Measure, train, export, verify and report. `before` is native and scaled where they are measured already.

    Of several ranks only the first does more than train; the others come back after the last step, with None.
    Raises KeyboardInterrupt after saving, where somebody asked to stop.
    """
    state = TrainState.start(job.pair, job.schedule)
    with job.ranks.on_loss(job.way_on):
        job.ranks.from_first(lambda: _begin(job, state, listener))
        checkpoint.spread(state, job.ranks)
        rows: list[Rows] = []
        job.ranks.from_first(lambda: rows.append(_first_measure(job, listener, before)))
        train_run(job, state, rows[0][1] if rows else None, listener)
    return _finish(job, state, *rows[0], listener, started) if rows else None


def _begin(job: Job, state: TrainState, listener: Listener) -> None:
    """Put the last checkpoint of a run that is resumed into `state`, and open the run's directory."""
    sweep(job.run.checkpoints)
    saved = checkpoint.found(job.run.checkpoints) if job.config.resume else []
    if saved:  # a run that was stopped before its first checkpoint begins again
        checkpoint.load(saved[-1], state, job.identity)
        listener.say(f"resuming after step {state.step} of {job.schedule.steps}")
    _open_run(job, state)


def _finish(
    job: Job, state: TrainState, native: Fidelity, scaled: Fidelity, listener: Listener, started: float
) -> Result:
    """What comes after the last step."""
    restored, exported_step = _chosen(job, state, scaled, listener)
    verified = _export(job, listener)
    rows = {"native": native, "scaled": scaled, "restored": restored}
    seconds = time.perf_counter() - started
    write_json(job.run.held_out, {name: row.pieces for name, row in rows.items()})
    result = Result(
        job.run, native, scaled, restored, verified, seconds, exported_step, state.step, state.guard.skipped
    )
    _write_results(job, rows, result)
    write_report(job.run.root)
    verified.check(job.run.model)  # after the results and the report, which do not depend on the export
    return result


def _told(listener: Listener, label: str) -> Callable[[int, int], None]:
    return lambda done, total: listener.progress(label, done, total)


def _open_run(job: Job, state: TrainState) -> None:
    """Make the directory, and drop from it what an earlier run, or the steps after the checkpoint, left."""
    run = job.run
    with disk_errors(run.root):
        run.root.mkdir(parents=True, exist_ok=True)
        if not job.config.resume:
            for old in checkpoint.found(run.checkpoints):
                shutil.rmtree(old)
            for file in (
                run.metrics, run.results, run.report, run.report_markdown, run.before, run.evaluations, run.held_out,
            ):  # fmt: skip
                file.unlink(missing_ok=True)
            if run.items.is_dir():
                shutil.rmtree(run.items)
        resolved = dataclasses.replace(
            job.config, seq_len=job.sizing.seq_len, grad_accum=job.sizing.grad_accum, steps=job.schedule.steps,
            tokens=None, eval_tokens=job.sizing.eval_tokens,
            model=str(job.pair.path),
        )  # fmt: skip
        with new_file(run.config) as file:
            file.write_text(to_yaml(resolved), encoding="utf-8")
        run.checkpoints.mkdir(exist_ok=True)
        sweep(run.root)
        for file in (run.metrics, run.evaluations):
            _truncate(file, state.step)
    write_base(job.pair, run.base)


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to `step`: those after the checkpoint will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with new_file(path) as file:
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _first_measure(job: Job, listener: Listener, before: Rows | None) -> Rows:
    """Native and scaled, before training (the adapters add nothing yet); read back where a run is resumed."""
    if job.config.resume and (saved := read_before(job.run)) and saved[0].perplexity.keys() == job.held_out.keys():
        return saved
    native, scaled = before or measure(
        job.pair, job.held_out, native=True, workspace_bytes=job.workspace_bytes,
        progress=_told(listener, "measuring native and scaled"),
    )  # fmt: skip
    write_json(job.run.held_out, {"native": native.pieces, "scaled": scaled.pieces})
    write_json(job.run.before, {"native": native.as_json(), "scaled": scaled.as_json()})
    return native, scaled


def read_before(run: RunDir) -> tuple[Fidelity, Fidelity] | None:
    """Native and scaled as a run measured them; None where it has not."""
    if not run.before.exists() or not run.held_out.exists():
        return None
    rows, pieces = read_json(run.before), read_json(run.held_out)
    native, scaled = (Fidelity.from_json(rows[name], pieces[name]) for name in ("native", "scaled"))
    return native, scaled


def _chosen(job: Job, state: TrainState, scaled: Fidelity, listener: Listener) -> tuple[Fidelity, int]:
    """Put the state that --keep asks for into the student; its row and its step."""
    job.pair.set_parameters(state.parameters)
    row, best = _restored(job, listener), state.best
    if job.config.keep == "last" or best is None or job.score(row) <= best.score:
        return row, state.step
    listener.say(f"the state after step {best.step} is better than the last on held-out text, and is exported")
    job.pair.set_parameters(checkpoint.parameters(checkpoint.path_of(job.run.checkpoints, best.step), state))
    return (_restored(job, listener) if best.step else scaled), best.step


def _restored(job: Job, listener: Listener) -> Fidelity:
    return measure(
        job.pair, job.held_out, native=False, workspace_bytes=job.workspace_bytes,
        progress=_told(listener, "measuring restored"),
    )[1]  # fmt: skip


def _export(job: Job, listener: Listener) -> Verified:
    """Write adapters and fused model, then load the model as mlx-lm does and compare; a difference is only noted."""
    run, pair = job.run, job.pair
    listener.say("exporting")
    sample = next(iter(job.held_out.values()))[0][:VERIFY_TOKENS]
    expected = student_logits(pair.student, sample)
    note = {"model": str(run.base), "linearard": {"method": job.config.method, "factor": job.config.factor}}
    write_adapters(pair, run.adapters, note)
    write_fused(pair, run.model)
    del pair.teacher, pair.student
    verified = verify_export(run.model, sample, expected)
    if verified.note:
        listener.say(f"verifying the export: {verified.note}")
    return verified


def _write_results(job: Job, rows: dict[str, Fidelity], result: Result) -> None:
    write_json(
        job.run.results,
        {
            **{name: row.as_json() for name, row in rows.items()},
            "export": dataclasses.asdict(result.export),
            "run": {
                "method": job.config.method,
                "factor": job.config.factor,
                "objective": job.config.objective,
                "native_window": job.pair.native_window,
                "training_tokens": job.sizing.tokens_per_step * result.steps,
                "steps": result.steps,
                "skipped_steps": result.skipped,
                "exported_step": result.exported_step,
                "seconds": round(result.seconds, 1),
                "machine": job.machine.name,
                "processes": job.ranks.size,
                "versions": {"mlx_linearard": __version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")},
            },
        },
    )
