"""Checkpoints: everything that a resumed run needs, written completely or not at all, with a checksum.

A checkpoint is a directory `step-NNNNNNN` with two files: `state.safetensors` holds the trained arrays and the
optimizer's moments, `state.json` the step, the guard, the best evaluation, the run's identity and the checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..distributed.ranks import Ranks
from ..errors import UserError, one_line
from ..files import disk_errors, new_directory, read_json, write_json
from ..models.adapters import Leaves
from ..models.trees import named_arrays
from .guard import Guard
from .step import Best, Snapshot, TrainState

ARRAYS, FACTS = "state.safetensors", "state.json"
KEPT = 2
MARGIN = 1 << 18  # bytes for names, facts and directories beside the arrays
_NAME = re.compile(r"step-(\d{7,})", re.ASCII)


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or whose contents have changed since it was written."""


# ---------------------------------------------------------------------------------------------------
# Names


def path_of(folder: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` steps."""
    return folder / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was made, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def list_all(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, and the damaged ones that were set aside."""
    return [*list_checkpoints(folder), *(p for p in folder.glob("damaged-step-*") if p.is_dir())]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


# ---------------------------------------------------------------------------------------------------
# Writing


def save(folder: Path, state: TrainState, identity: dict[str, Any], kept: int = KEPT) -> Path:
    """Write the checkpoint of `state` into `folder`; the newest `kept` checkpoints and the best one are kept.

    Args:
        identity: the facts that identify the run (model, data, options); `load` refuses a checkpoint of another run.
    Returns:
        The checkpoint's directory.
    Raises:
        UserError: the disk has no room; the earlier checkpoints are then unchanged.
    """
    target = path_of(folder, state.step)
    arrays = dict(named_arrays(_tree(state)))
    need = sum(array.nbytes for array in arrays.values()) + MARGIN
    facts = {**_facts(state), "identity": identity}
    with new_directory(target, overwrite=True, need=need, marker=False) as temporary:
        mx.save_safetensors(str(temporary / ARRAYS), arrays)
        write_json(temporary / FACTS, {**facts, "checksum": _checksum(facts, temporary / ARRAYS)})
    _prune(folder, kept, state.best)
    return target


def _facts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are not arrays, as JSON."""
    return {
        "step": state.step,
        "guard": state.guard.as_json(),
        "best": None if state.best is None else _best_as_json(state.best),
    }


def _tree(state: TrainState) -> dict[str, Any]:
    """The arrays of a state. `good`, to which the guard may return, is included if it differs from the state."""
    tree = {"parameters": state.parameters, "optimizer": state.optimizer.state}
    if state.good.parameters is not state.parameters:
        tree["good"] = {"parameters": state.good.parameters, "optimizer": state.good.optimizer}
    return tree


def _checksum(facts: Mapping[str, Any], arrays: Path) -> str:
    """SHA-256 of the facts and of the file of arrays, in hexadecimal."""
    with arrays.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _prune(folder: Path, kept: int, best: Best | None) -> None:
    for old in list_checkpoints(folder)[:-kept]:
        if best is None or old != path_of(folder, best.step):
            shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Reading


def load_newest(folder: Path, state: TrainState, identity: dict[str, Any]) -> list[str]:
    """Put the newest checkpoint that is undamaged into `state`; without any checkpoint `state` stays as it is.

    Damaged checkpoints that are newer get the name `damaged-step-NNNNNNN`, so that the run can write its own.

    Returns:
        One line about each damaged checkpoint.
    Raises:
        UserError: every checkpoint is damaged, or the newest undamaged one belongs to another run.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for path in reversed(list_checkpoints(folder)):
        try:
            load(path, state, identity)
        except DamagedCheckpoint as error:
            damaged[path] = error
        else:
            return [f"{error}; it is now {_set_aside(path).name}" for path, error in damaged.items()]
    if damaged:
        newest = next(iter(damaged.values()))
        raise UserError(
            f"--resume: every checkpoint in {folder} is damaged ({newest}): restore one from a copy, or start again "
            "with --overwrite"
        )
    return []


def _set_aside(path: Path) -> Path:
    target = path.with_name(f"damaged-{path.name}")
    with disk_errors(target):
        if target.is_dir():
            shutil.rmtree(target)
        return path.replace(target)


def load(path: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Put a checkpoint into `state`.

    Raises:
        DamagedCheckpoint: a file is missing, unreadable or changed.
        UserError: the checkpoint belongs to another run; the message names the differences.
    """
    facts = read_facts(path)
    saved = facts["identity"]
    if different := differences(saved, identity, saved.keys() | identity.keys()):
        raise UserError(f"{path} belongs to another run: {different}")
    arrays = _arrays(path)
    _fill(path, state, arrays)
    state.step, state.guard, state.best = facts["step"], facts["guard"], facts["best"]


def parameters(path: Path, state: TrainState) -> list[Leaves]:
    """The trained arrays of a checkpoint of this run; they have the names and shapes of those of `state`."""
    read_facts(path)
    arrays = _arrays(path)
    wanted = dict(named_arrays({"parameters": state.parameters}))
    _check_arrays(path, wanted, {name: array for name, array in arrays.items() if name.startswith("parameters.")})
    return _from(arrays, state.parameters, "parameters")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """'a was 1 and is 2; ...' for each of `names` that differs; '' if none does."""
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    )


def read_facts(path: Path) -> dict[str, Any]:
    """state.json, checked, with `guard` and `best` as objects; DamagedCheckpoint if either file has changed."""
    try:
        facts = read_json(path / FACTS)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from None
    try:
        checksum = facts.pop("checksum")
        if checksum != _checksum(facts, path / ARRAYS):
            raise DamagedCheckpoint(f"{path} is damaged: its contents do not have the checksum that was written")
        step, best = facts["step"], facts["best"]
        if type(step) is not int or step < 0 or not isinstance(facts["identity"], dict):
            raise ValueError("no step, or no identity")
        facts["guard"] = Guard.from_json(facts["guard"])
        facts["best"] = None if best is None else _best(best)
    except OSError as error:
        raise DamagedCheckpoint(f"{path / ARRAYS} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise DamagedCheckpoint(f"{path / FACTS} is not the state of a run") from None
    return facts


def _best_as_json(best: Best) -> dict[str, Any]:
    """The best evaluation; an infinite score is null, because JSON has no infinity."""
    return {**dataclasses.asdict(best), "score": best.score if math.isfinite(best.score) else None}


def _best(value: Any) -> Best:
    value = {**value, "score": math.inf if value["score"] is None else value["score"]}
    counts = [value[name] for name in ("step", "misses", "evaluated")]
    if not all(type(count) is int and count >= 0 for count in counts) or type(value["score"]) is not float:
        raise ValueError("not an evaluation")
    if not isinstance(value["text"], str):
        raise ValueError("not an evaluation")
    return Best(**value)


def _arrays(path: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(path / ARRAYS))
    except (RuntimeError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{path / ARRAYS} cannot be read: {one_line(error)}") from None
    assert isinstance(loaded, dict)
    return loaded


def _fill(path: Path, state: TrainState, arrays: dict[str, mx.array]) -> None:
    one = {"parameters": state.parameters, "optimizer": state.optimizer.state}
    two = any(name.startswith("good.") for name in arrays)
    _check_arrays(path, dict(named_arrays({**one, "good": one} if two else one)), arrays)
    state.parameters = _from(arrays, state.parameters, "parameters")
    state.good = Snapshot(
        _from(arrays, state.parameters, "good.parameters") if two else state.parameters,
        _from(arrays, state.optimizer.state, "good.optimizer" if two else "optimizer"),
    )
    state.optimizer.state = _from(arrays, state.optimizer.state, "optimizer")
    mx.eval(state.parameters, state.optimizer.state, state.good.parameters, state.good.optimizer)


def _check_arrays(path: Path, wanted: dict[str, mx.array], arrays: dict[str, mx.array]) -> None:
    wrong = sorted(
        name
        for name in wanted.keys() | arrays.keys()
        if name not in wanted
        or name not in arrays
        or wanted[name].shape != arrays[name].shape
        or wanted[name].dtype != arrays[name].dtype
    )
    if wrong:
        raise UserError(f"{path / ARRAYS} belongs to another run: {', '.join(wrong[:8])} differ in shape or dtype")


def _from(arrays: Any, like: Any, name: str) -> Any:
    """A tree of the structure of `like`, with the arrays of the same names (keys of `like` may hold dots)."""
    if isinstance(like, dict):
        return {key: _from(arrays, value, f"{name}.{key}") for key, value in like.items()}
    if isinstance(like, list):
        return [_from(arrays, value, f"{name}.{i}") for i, value in enumerate(like)]
    return arrays[name]


# ---------------------------------------------------------------------------------------------------
# Between ranks


def send_state(state: TrainState, ranks: Ranks) -> None:
    """Make the state of every rank equal to the first rank's, bit for bit, but only it has the best evaluation."""
    two = state.good.parameters is not state.parameters
    facts: dict[str, Any] = ranks.from_first({"step": state.step, "guard": state.guard.as_json(), "two": two})
    one = {"parameters": state.parameters, "optimizer": state.optimizer.state}
    good = {"parameters": state.good.parameters, "optimizer": state.good.optimizer}
    arrays = ranks.arrays_from_first({**one, "good": good} if facts["two"] else one)
    if ranks.leads:
        return
    kept = arrays["good"] if facts["two"] else arrays
    state.good = Snapshot(kept["parameters"], kept["optimizer"])
    state.parameters, state.optimizer.state = arrays["parameters"], dict(arrays["optimizer"])
    state.step, state.guard = facts["step"], Guard.from_json(facts["guard"])
