"""Checkpoints: all that a resumed run needs, written whole or not at all, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..distributed.ranks import Ranks
from ..errors import UserError, one_line
from ..files import new_directory, read_json, write_json
from ..models.adapters import Leaves
from ..models.trees import named_arrays
from .guard import Guard
from .step import Best, Snapshot, TrainState

ARRAYS, FACTS = "state.safetensors", "state.json"
KEPT = 2
MARGIN = 1 << 18  # bytes that names, facts and directories take beside the arrays
_NAME = re.compile(r"step-(\d{7})")


def save(folder: Path, state: TrainState, identity: dict[str, Any], kept: int = KEPT) -> Path:
    """Write checkpoint `step-N` into `folder`; returns its directory. The newest `kept` and the best one stay.

    `identity` says which run this is (model, data, options); `load` refuses another one. UserError where the
    disk has no room for it: the earlier checkpoints are then as they were.
    """
    target = path_of(folder, state.step)
    arrays = dict(named_arrays(_tree(state)))
    need = sum(array.nbytes for array in arrays.values()) + MARGIN
    facts = {**_facts(state), "identity": identity}
    with new_directory(target, overwrite=True, need=need) as temporary:
        mx.save_safetensors(str(temporary / ARRAYS), arrays)
        write_json(temporary / FACTS, facts)
    _prune(folder, kept, state.best)
    return target


def _facts(state: TrainState) -> dict[str, Any]:
    """What is no array of a checkpoint, as JSON."""
    return {
        "step": state.step,
        "guard": state.guard.as_json(),
        "best": None if state.best is None else dataclasses.asdict(state.best),
    }


def _tree(state: TrainState) -> dict[str, Any]:
    """The arrays of a checkpoint. `good` is there where it is another state: also what a rollback needs is kept."""
    tree = {"parameters": state.parameters, "optimizer": state.optimizer.state}
    if state.good.parameters is not state.parameters:
        tree["good"] = {"parameters": state.good.parameters, "optimizer": state.good.optimizer}
    return tree


def _prune(folder: Path, kept: int, best: Best | None) -> None:
    for old in found(folder)[:-kept]:
        if best is None or old != path_of(folder, best.step):
            shutil.rmtree(old, ignore_errors=True)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"step-{step:07d}"


def step_of(path: Path) -> int:
    """After how many steps a checkpoint was made, by its name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name))


def load(path: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Put a checkpoint into `state`. UserError names what differs where it belongs to another run."""
    facts = read_facts(path)
    saved = facts["identity"]
    if different := differences(saved, identity, saved.keys() | identity.keys()):
        raise UserError(f"{path} belongs to another run: {different}")
    _fill(path, state, _arrays(path))
    state.step, state.guard, state.best = facts["step"], facts["guard"], facts["best"]


def spread(state: TrainState, ranks: Ranks) -> None:
    """Make the state of every rank that of the first one, bit for bit."""
    facts = ranks.from_first(lambda: {**_facts(state), "two": state.good.parameters is not state.parameters})
    one = {"parameters": state.parameters, "optimizer": state.optimizer.state}
    good = {"parameters": state.good.parameters, "optimizer": state.good.optimizer}
    arrays = ranks.of_first({**one, "good": good} if facts["two"] else one)
    if ranks.leads:
        return
    kept = arrays["good"] if facts["two"] else arrays
    state.good = Snapshot(kept["parameters"], kept["optimizer"])
    state.parameters, state.optimizer.state = arrays["parameters"], dict(arrays["optimizer"])
    state.step, state.guard = facts["step"], Guard.from_json(facts["guard"])
    state.best = None if facts["best"] is None else Best(**facts["best"])


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """'a was 1 and is 2; ...' for each of `names` that differs; empty where none does."""
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    )


def parameters(path: Path, state: TrainState) -> list[Leaves]:
    """The trained arrays alone of a checkpoint of this run; `state` says what they look like."""
    arrays = _arrays(path)
    wanted = dict(named_arrays({"parameters": state.parameters}))
    _check_arrays(path, wanted, {name: array for name, array in arrays.items() if name.startswith("parameters.")})
    return _from(arrays, state.parameters, "parameters")


def read_facts(path: Path) -> dict[str, Any]:
    """state.json, checked, with the guard's state and the best evaluation made of it."""
    facts = read_json(path / FACTS)
    try:
        step, best = facts["step"], facts["best"]
        if type(step) is not int or step < 0 or not isinstance(facts["identity"], dict):
            raise ValueError("no step, or no identity")
        facts["guard"] = Guard.from_json(facts["guard"])
        facts["best"] = None if best is None else _best(best)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path / FACTS} is not a checkpoint's: start again with --overwrite") from None
    return facts


def _best(value: Any) -> Best:
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
        raise UserError(f"{path / ARRAYS} cannot be read: {one_line(error)}; start again with --overwrite") from None
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
    bad = sorted(
        name for name in wanted.keys() | arrays.keys()
        if name not in wanted or name not in arrays or wanted[name].shape != arrays[name].shape
        or wanted[name].dtype != arrays[name].dtype
    )  # fmt: skip
    if bad:
        raise UserError(f"{path / ARRAYS} does not fit this run: {', '.join(bad[:8])}; start again with --overwrite")


def _from(arrays: Any, like: Any, name: str) -> Any:
    """A tree shaped as `like` with the arrays of the same names; keys of `like` may hold dots themselves."""
    if isinstance(like, dict):
        return {key: _from(arrays, value, f"{name}.{key}") for key, value in like.items()}
    if isinstance(like, list):
        return [_from(arrays, value, f"{name}.{i}") for i, value in enumerate(like)]
    return arrays[name]
