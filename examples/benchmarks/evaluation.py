"""Time of the evaluation suites: multiple choice, last words, pass keys, RULER, in batches or one sequence at a time.

    python examples/benchmarks/evaluation.py --model DIR --items hellaswag.jsonl piqa.jsonl --text novels.jsonl

Each line is one set of items, or one RULER task list at one length. Without --model it measures the default model.
Lengths beyond the model's window are measured too, because only the time matters here. Writes a CSV named after the
machine and the model. `passes` counts forward passes, and `shapes` those with sizes of tokens and cache that
the process had not seen before. With --profile, the functions that take most time are printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_linearard.convert.default_model import default_model
from relation import write_csv

from mlx_linearard.doctor.measuring import file_name
from mlx_linearard.evaluate import Subject, load_subject, open_directory, run_suite
from mlx_linearard.evaluate.api import choice_suite, last_word_suite, passkey_suite, ruler_suite
from mlx_linearard.evaluate.suites.items import name_of
from mlx_linearard.evaluate.suites.suite import Suite
from mlx_linearard.machine import describe

COLUMNS = (
    *("suite", "items", "tokens", "batch_size", "seconds", "prompts_seconds", "passes", "shapes", "peak_gb"),
    *("metric", "value"),
)
TASKS = "niah_single_2,niah_multikey_1,niah_multivalue,niah_multiquery,vt"


class Counts:
    """The forward passes of a model, and their different shapes, counted at its first layer."""

    def __init__(self, layer: Any) -> None:
        self.passes, self.shapes = 0, set[tuple[int, ...]]()
        counts, own = self, type(layer)

        class Counted(own):  # type: ignore[misc, valid-type]
            def __call__(self, hidden: mx.array, *arguments: Any, **keywords: Any) -> Any:
                counts.passes += 1
                caches = (a for a in (*arguments, *keywords.values()) if hasattr(a, "update_and_fetch"))
                held = getattr(next(caches, None), "keys", None)
                counts.shapes.add((*hidden.shape[:2], 0 if held is None else held.shape[2]))
                return super().__call__(hidden, *arguments, **keywords)

        layer.__class__ = Counted


def suites(subject: Subject, given: argparse.Namespace) -> Iterator[Suite]:
    for source in given.items:
        if "lambada" in name_of(source):
            yield last_word_suite([source], limit=given.limit)
        else:
            yield choice_suite(source, limit=given.limit, name=f"choice/{name_of(source)}")
    if not given.text:
        return
    directory, tasks = subject.directory, given.tasks.split(",")
    for length in map(int, given.lengths.split(",")):
        yield ruler_suite(directory, given.text, lengths=(length,), tasks=tasks, samples=given.samples)
        if given.keys:
            yield passkey_suite(directory, given.text, lengths=(length,), samples=given.keys)


def measure(
    subject: Subject, counts: Counts, suite: Suite, profile: cProfile.Profile | None, prompts: bool
) -> dict[str, object]:
    """One line of the table. `prompts_seconds`: the time to make the prompts of passkey and ruler, alone."""
    passes, shapes = counts.passes, len(counts.shapes)
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    with profile or contextlib.nullcontext():
        entry, records = run_suite(subject, suite, window=1 << 30)
    seconds = time.perf_counter() - start
    metric, value = next(iter(entry["metrics"].items()))
    items = list(suite.items(subject.directory, 1 << 30))
    start = time.perf_counter()
    for item in items if prompts and suite.name in ("passkey", "ruler") else ():
        getattr(suite, "prompt" if suite.name == "passkey" else "sample")(subject.directory, *item.content)
    making = time.perf_counter() - start
    length = f"@{items[0].cost}" if suite.name in ("passkey", "ruler") else ""
    return {
        "suite": suite.name + length,
        "items": len(records),
        "tokens": sum(item.cost for item in items),
        "batch_size": subject.batch_size or "auto",
        "seconds": round(seconds, 2),
        "prompts_seconds": round(making, 2),
        "passes": counts.passes - passes,
        "shapes": len(counts.shapes) - shapes,
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
        "metric": metric,
        "value": round(value["value"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="a directory or a hub repository (the default model)")
    add("--items", nargs="*", default=[], help="JSONL files or hf:NAME of choice; a name with lambada is last words")
    add("--text", nargs="*", default=[], help="text for pass keys and RULER")
    add("--limit", type=int, default=500, help="items per set")
    add("--lengths", default="4096,16384,30000")
    add("--tasks", default=TASKS)
    add("--samples", type=int, default=20, help="of each RULER task and length")
    add("--keys", type=int, default=3, help="pass keys per depth and length; 0: none")
    add("--dtype", default="auto")
    add("--batch-size", type=int, help="sequences measured together (sized to the machine); 1: one at a time")
    add("--chunk", type=int, help="tokens per forward pass (sized to the machine)")
    add("--profile", action="store_true", help="print where the time goes")
    add("--no-prompts", action="store_true", help="do not time the making of prompts alone")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    directory = open_directory(given.model or default_model())
    start = time.perf_counter()
    subject = load_subject(directory, dtype=given.dtype, chunk=given.chunk, batch_size=given.batch_size)
    counts = Counts(subject.model.layers[0])
    print(f"the weights {time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for suite in suites(subject, given):
        profile = cProfile.Profile() if given.profile else None
        rows.append(measure(subject, counts, suite, profile, not given.no_prompts))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(f"in all {sum(row['seconds'] for row in rows):.1f} s, without the start of the program")
    stem = f"evaluation-{file_name(directory.label)}-{file_name(describe())}"
    stem += f"-batch-{given.batch_size}" if given.batch_size else ""
    about = f"{describe()}; mlx {mx.__version__}; {directory.label}, {given.dtype}"
    write_csv(given.out / f"{stem}.csv", COLUMNS, rows, about)


if __name__ == "__main__":
    main()
