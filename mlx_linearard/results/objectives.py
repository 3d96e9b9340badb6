"""One results.json for several runs that differ in their objective only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import UserError
from ..files import RunDir
from .records import read_pieces, read_steps, training_of
from .rows import HELD_OUT, NATIVE, RESTORED, SCALED, Results, Row, RunInfo
from .statistics import compare_objectives
from .store import read_results


def combine_runs(runs: Mapping[str, RunDir], first: str) -> Results:
    """The results of the finished runs in `runs`, by objective; empty if there is none.

    The rows are native, scaled (both from the first run in `runs`), one for each objective, and `restored`, which
    repeats the row of the objective `first` if that is finished. Raises UserError if a run is not complete.
    """
    if not runs:
        return Results()
    results = {name: read_results(run.results) for name, run in runs.items()}
    pieces = {name: read_pieces(run.held_out) for name, run in runs.items()}
    for name, run in runs.items():
        if not {NATIVE, SCALED, RESTORED} <= results[name].rows.keys() & pieces[name].keys():
            raise UserError(f"{run.root} is not a finished run: remove it, and train {name} again with --resume")
    whole, measured = next(iter(results.values())), next(iter(pieces.values()))
    rows = {
        name: replace(results[name].rows[RESTORED], training=training_of(read_steps(run.metrics)))
        for name, run in runs.items()
    }
    models = {NATIVE: measured[NATIVE], SCALED: measured[SCALED], **{name: pieces[name][RESTORED] for name in runs}}
    return Results(
        {
            **{name: whole.rows[name] for name in (NATIVE, SCALED)},
            **({RESTORED: rows[first]} if first in rows else {}),
            **rows,
        },
        {HELD_OUT: compare_objectives(models, list(runs))},
        run=_shared_info(whole.run or RunInfo(), rows),
    )


def _shared_info(own: RunInfo, rows: Mapping[str, Row]) -> RunInfo:
    """What is true of all runs, with the tokens of the longest and the time of all."""
    trained = [row.training for row in rows.values() if row.training]
    return RunInfo(
        method=own.method,
        factor=own.factor,
        native_window=own.native_window,
        training_tokens=max(training.tokens for training in trained),
        seconds=round(sum(training.seconds for training in trained), 1),
        machine=own.machine,
        versions=own.versions,
    )
