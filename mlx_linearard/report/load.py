"""Reads a run directory for the report: results.json, held_out.json, metrics.jsonl and config.yaml.

A missing file is left out. A broken file is a UserError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import OBJECTIVES, objectives_of
from ..errors import UserError
from ..files import RunDir, read_yaml, reading
from ..results.fields import Field, exists, shown
from ..results.records import Pieces, Step, read_pieces, read_steps
from ..results.rows import RESTORED, Results
from ..results.store import read_results
from ..results.verdict import Measured


@dataclass(frozen=True)
class RunFacts(Measured):
    """Everything that the report knows of a run directory, checked.

    steps: of a run. curves: of a comparison, the steps of each objective's run.
    """

    root: Path = Path()
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    curves: Mapping[str, Sequence[Step]] = field(default_factory=dict)


def read_run(root: str | Path) -> RunFacts:
    """The facts of a run directory, finished or under way.

    Raises UserError if `root` is not a run directory, or if one of its files is broken.
    """
    run = RunDir(root)
    with reading(root):
        if not run.root.is_dir():
            raise UserError(f"{root} is not a directory: give the --output of a distillation")
    if not any(exists(path) for path in (run.config, run.metrics, run.results)):
        raise UserError(f"{root} holds no run: neither {run.config.name}, {run.metrics.name} nor {run.results.name}")
    config = read_config(run.config)
    objectives = _objectives(run.config, config)
    runs = {name: RunDir(run.root / name) for name in objectives}
    return RunFacts(
        _results([run.results, run.before, *(own.before for own in runs.values())]),
        objectives,
        _pieces(run, runs),
        run.root,
        config,
        read_steps(run.metrics),
        {name: read_steps(own.metrics) for name, own in runs.items()},
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """config.yaml as it is, with options of other versions too; {} if there is no such file."""
    if not exists(path):
        return {}
    value = read_yaml(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold `option: value` lines, not a {type(value).__name__}")
    return {str(key): entry for key, entry in value.items()}


def _objectives(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The objectives of a comparison. Each is the name of a folder, so other names are refused."""
    objectives = objectives_of(config.get("compare"))
    for name in objectives:
        if name not in OBJECTIVES:
            Field(path, "compare").fail(f"must name objectives ({', '.join(OBJECTIVES)}), not {shown(name)}")
    return objectives


def _results(paths: Sequence[Path]) -> Results:
    """The first results that have a row."""
    return next((results for path in paths if (results := read_results(path)).rows), Results())


def _pieces(run: RunDir, runs: Mapping[str, RunDir]) -> dict[str, Pieces]:
    """held_out.json; in a comparison native and scaled of the first run that has them, and each objective's model."""
    pieces = read_pieces(run.held_out)
    for name, own in runs.items():
        models = read_pieces(own.held_out)
        pieces = {**models, **pieces}
        if RESTORED in models:
            pieces[name] = models[RESTORED]
    if runs:
        pieces.pop(RESTORED, None)
    return pieces
