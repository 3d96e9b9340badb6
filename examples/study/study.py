"""Run a study: several settings of one model on one text, and a CSV with a row for each.

    python examples/study/study.py --model DIR --data train.jsonl.xz --valid-data valid.jsonl.xz --output study

A study is a YAML file with three parts: `shared`, the options of `distill` that all runs have beside
examples/recipe.yaml; `runs`, a name for each run and its own options; and `evaluate`, the options of each call of
`evaluate` on the finished model, the most important first. A run's own `evaluate` replaces these calls.
`method: native` measures the model as it is, and `steps: 0` the scaled model without training.

--jobs runs that many side by side on one device; their times are then not comparable. The CSV is written as each
command ends. A second call continues: what is finished is not repeated. --limit-minutes asks what still runs to save
and stop, so that a later call can go on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipe.yaml"
SAVING = 45  # seconds that a command has to save after it was asked to stop

SCALING = ("method", "factor", "yarn_beta_fast", "yarn_beta_slow")
UNIMPORTANT = {
    "model",
    "data",
    "valid_data",
    "long_data",
    "output",
    "resume",
    "overwrite",
    "dry_run",
    "force",
    "compare",
}

Options = dict[str, Any]


@dataclass
class Study:
    """The parts of a study, the paths of this call, and the commands that run now."""

    runs: dict[str, Options]
    shared: Options
    evaluations: list[Options]
    given: argparse.Namespace
    deadline: float | None = None
    stopped: bool = False
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def options(self, name: str) -> Options:
        """The options of a run, without its evaluations."""
        return {key: value for key, value in {**self.shared, **self.runs[name]}.items() if key != "evaluate"}

    def folder(self, name: str) -> Path:
        """The run directory or the scaled model of a run."""
        return Path(self.given.output) / name

    def file(self, name: str, suffix: str) -> Path:
        """A small file beside the runs."""
        return Path(self.given.output) / f"{name}{suffix}"

    def make(self, name: str) -> None:
        """Train and evaluate one run, as far as this has not been done and time allows."""
        for label, words in self.commands(name):
            if self.is_done(name, words):
                continue
            status = self.call(name, words)
            if status is None:
                return
            print(f"{name}: {label} {'finished' if status == 0 else f'has exit status {status}'}", flush=True)
            if status == 0:
                self.note(name, words)
            self.write()
            if status and label == "training":
                print(f"{name}: see {self.file(name, '.log')}", flush=True)
                return

    def commands(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """(label, words) of each command of a run, in order."""
        options, given, folder = self.options(name), self.given, self.folder(name)
        model = folder / "model"
        if options.get("method") == "native":
            model = Path(given.model)
        elif options.get("steps") == 0:
            model = folder
            scaled = {**read_yaml(RECIPE), **options}
            scaling = {key: scaled[key] for key in SCALING if key in scaled}
            yield "scaling", command("convert", "scale", given.model, str(folder), *flags(scaling))
        else:
            data = {"model": given.model, "data": given.data, "valid_data": given.valid_data, "output": folder}
            yield "training", command("distill", "--config", str(RECIPE), *flags({**data, **options}))
        for evaluation in self.runs[name].get("evaluate", self.evaluations):
            wanted = {"data": [given.valid_data], **evaluation}
            wanted["data"] = [str(source).format(items=given.items) for source in wanted["data"]]
            if "fidelity" in str(wanted["suite"]).split(","):
                wanted["reference"] = given.model
            place = ["--model", f"{name}={model}", "--out", str(self.file(name, ".json"))]
            yield f"suite {wanted['suite']}", command("evaluate", *place, *flags(wanted))

    def call(self, name: str, words: list[str]) -> int | None:
        """The exit status of a command whose output goes to the run's log; None if there was no time for it."""
        if "mlx_linearard.distill" in words and (self.folder(name) / "config.yaml").exists():
            words = [*words, "--resume"]
        with self.file(name, ".log").open("a", encoding="utf-8") as log:
            with self.lock:
                if self.stopped:
                    return None
                # A session of its own: Ctrl-C at the terminal reaches this process alone, which passes it on once.
                process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
                self.running.add(process)
            status = process.wait()
        with self.lock:
            self.running.discard(process)
        return None if self.stopped and status else status

    def stop(self) -> None:
        """Ask all commands to save and stop; end those that do not."""
        with self.lock:
            self.stopped = True
            running = list(self.running)
        for process in running:
            process.send_signal(signal.SIGINT)
        end = time.monotonic() + SAVING
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            if process.poll() is None:
                process.kill()

    # What is finished is noted by command, so a changed evaluation is made again, and a changed training refused.

    def noted(self, name: str) -> list[list[str]]:
        file = self.file(name, ".done")
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    def is_done(self, name: str, words: list[str]) -> bool:
        return words[1:] in self.noted(name)

    def note(self, name: str, words: list[str]) -> None:
        self.file(name, ".done").write_text(json.dumps([*self.noted(name), words[1:]]), encoding="utf-8")

    # The table

    def write(self) -> None:
        """Write study.csv, and copy it and the small files of all runs to --collect."""
        with self.lock:
            rows = {name: (self.described(name), figures) for name in self.runs if (figures := self.figures(name))}
            heads = [list(dict.fromkeys(key for row in rows.values() for key in row[part])) for part in (0, 1)]
            place = Path(self.given.output) / "study.csv"
            with place.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["run", *heads[0], *heads[1]])
                writer.writeheader()
                writer.writerows({"run": name, **options, **figures} for name, (options, figures) in rows.items())
            if self.given.collect:
                self.collect(place)

    def described(self, name: str) -> Options:
        """The options on which a run's figures depend: those of its config.yaml if it was trained."""
        resolved, options = self.folder(name) / "config.yaml", {**read_yaml(RECIPE), **self.options(name)}
        if options["method"] == "native":
            return {"method": "native"}
        if options.get("steps") == 0:
            return {key: options[key] for key in SCALING if key in options} | {"steps": 0}
        options = read_yaml(resolved) if resolved.exists() else options
        return {key: value for key, value in options.items() if key not in UNIMPORTANT}

    def figures(self, name: str) -> Options:
        """The figures of a run; {} before it has any."""
        folder, figures = self.folder(name), dict[str, Any]()
        if results := read_json(folder / "results.json"):
            run = results.get("run", {})
            keys = ("training_tokens", "skipped_steps", "exported_step", "seconds", "machine")
            figures |= {key: run.get(key) for key in keys}
            figures["peak_memory_gb"] = max(
                map(float, metric(folder / "metrics.jsonl", "peak_memory_gb")), default=None
            )
        for entry in read_json(self.file(name, ".json")).values():
            if isinstance(entry, dict):
                figures |= suites(entry)
        return figures

    def collect(self, table: Path) -> None:
        target = Path(self.given.collect)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, target)
        for name in self.runs:
            for file in (self.file(name, ".json"), self.file(name, ".log")):
                if file.exists():
                    shutil.copy(file, target)
            if (lines := self.folder(name) / "metrics.jsonl").exists():
                shutil.copy(lines, target / f"{name}.metrics.jsonl")


def suites(row: Options) -> Options:
    """Every metric of every suite of a model with its standard error."""
    found: Options = {}
    for suite, entry in row.items():
        if isinstance(entry, dict) and "metrics" in entry:
            for name, value in entry["metrics"].items():
                found[f"{suite} {name}"] = value["value"]
                found[f"{suite} {name} stderr"] = value["stderr"]
    return found


def read_yaml(path: Path) -> Options:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> Options:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def metric(path: Path, name: str) -> list[Any]:
    """One number of each step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)[name] for line in lines]


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"mlx_linearard.{name}", *words]


def flags(options: Options) -> list[str]:
    """Options as flags; a list is a flag given several times."""
    words: list[str] = []
    for key, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{key.replace('_', '-')}", str(item)]
    return words


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory or hub repository")
    parser.add_argument("--data", required=True, help="training text")
    parser.add_argument("--valid-data", required=True, help="held-out text, for all suites without data of their own")
    parser.add_argument("--items", default="", help="a folder that replaces {items} in the data of the study")
    parser.add_argument("--output", required=True, help="a folder for the runs, their results and logs, and study.csv")
    parser.add_argument("--collect", help="a folder that gets a copy of study.csv and of the small files of each run")
    parser.add_argument("--study", default=str(HERE / "study.yaml"), help="the study (study.yaml)")
    parser.add_argument("--only", help="names of the runs to make, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument("--limit-minutes", type=float, help="after this time, save and stop")
    return parser


def read_study(path: Path) -> tuple[dict[str, Options], Options, list[Options]]:
    """(runs, shared options, evaluations) of a study file."""
    study = read_yaml(path)
    return {name: options or {} for name, options in study["runs"].items()}, study["shared"], study["evaluate"]


def main() -> None:
    parser = arguments()
    given = parser.parse_args()
    runs, shared, evaluations = read_study(Path(given.study))
    names = given.only.split(",") if given.only else list(runs)
    if unknown := [name for name in names if name not in runs]:
        parser.error(f"--only {unknown[0]}: not in {given.study}; choose from {', '.join(runs)}")
    Path(given.output).mkdir(parents=True, exist_ok=True)
    study = Study(runs, shared, evaluations, given)
    if given.limit_minutes is not None:
        timer = threading.Timer(60 * given.limit_minutes, study.stop)
        timer.daemon = True
        timer.start()
    pool = ThreadPoolExecutor(given.jobs)
    try:
        list(pool.map(study.make, names))
    except KeyboardInterrupt:
        study.stop()
    pool.shutdown()
    study.write()
    print(f"{'Stopped: the same command continues. ' if study.stopped else ''}See {Path(given.output) / 'study.csv'}")


if __name__ == "__main__":
    main()
