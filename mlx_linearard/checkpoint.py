"""Checkpoints: all that a resumed run needs, written whole or not at all, and refused where it does not fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import UserError, one_line
from .files import new_directory, read_json, write_json
from .trainer import TrainState
from .trees import named_arrays

ARRAYS, FACTS = "state.safetensors", "state.json"
KEPT = 2
_NAME = re.compile(r"step-(\d{7})")


def save(folder: Path, state: TrainState, identity: dict[str, Any]) -> Path:
    """Write checkpoint `step-N` into `folder` and keep the newest `KEPT`; returns its directory.

    `identity` says which run this is (model, data, options); `load` refuses another one.
    """
    target = folder / f"step-{state.step:07d}"
    arrays = dict(named_arrays({"parameters": state.parameters, "optimizer": state.optimizer.state}))
    with new_directory(target, overwrite=True) as temporary:
        mx.save_safetensors(str(temporary / ARRAYS), arrays)
        write_json(temporary / FACTS, {"step": state.step, "identity": identity})
    for old in found(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name))


def load(path: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Put a checkpoint into `state`. UserError names what differs where it belongs to another run."""
    facts = read_json(path / FACTS)
    if (
        not isinstance(facts, dict)
        or not isinstance(facts.get("identity"), dict)
        or not isinstance(facts.get("step"), int)
    ):
        raise UserError(f"{path / FACTS} is not a checkpoint's: start again with --overwrite")
    saved = facts["identity"]
    different = [
        f"{name} was {saved.get(name)!r} and is {identity.get(name)!r}"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    ]
    if different:
        raise UserError(f"{path} belongs to another run: {'; '.join(different)}")
    try:
        arrays = mx.load(str(path / ARRAYS))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path / ARRAYS} cannot be read: {one_line(error)}; start again with --overwrite") from None
    _fill(path, state, arrays)
    state.step = facts["step"]


def _fill(path: Path, state: TrainState, arrays: Any) -> None:
    wanted = dict(named_arrays({"parameters": state.parameters, "optimizer": state.optimizer.state}))
    bad = sorted(
        name for name in wanted.keys() | arrays.keys()
        if name not in wanted or name not in arrays or wanted[name].shape != arrays[name].shape
    )  # fmt: skip
    if bad:
        raise UserError(f"{path / ARRAYS} does not fit this run: {', '.join(bad[:8])}; start again with --overwrite")
    state.parameters = _from(arrays, state.parameters, "parameters")
    state.optimizer.state = _from(arrays, state.optimizer.state, "optimizer")
    mx.eval(state.parameters, state.optimizer.state)


def _from(arrays: Any, like: Any, name: str) -> Any:
    """A tree shaped as `like` with the arrays of the same names; keys of `like` may hold dots themselves."""
    if isinstance(like, dict):
        return {key: _from(arrays, value, f"{name}.{key}") for key, value in like.items()}
    if isinstance(like, list):
        return [_from(arrays, value, f"{name}.{i}") for i, value in enumerate(like)]
    return arrays[name]
