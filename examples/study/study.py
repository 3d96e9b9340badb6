"""Run a study: several settings of one model on one text, and a CSV with a row for each.

    python examples/study/study.py --model DIR --data train.jsonl.xz --valid-data valid.jsonl.xz --output study

Each run is the command line's own: `distill --config examples/recipe.yaml` with the options of its row in study.yaml,
then `evaluate --run` if suites are asked for. Finished runs are not repeated. `--parallel` starts several runs at
the same time on one device; their times are then not comparable.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipe.yaml"


def command(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", f"mlx_linearard.{name}", *words]


def flags(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def run_one(name: str, options: dict[str, Any], given: argparse.Namespace) -> None:
    """Distil and evaluate one setting; its output goes to a log beside its run."""
    run = Path(given.output) / name
    steps = [] if (run / "model").is_dir() else [command("distill", "--config", str(RECIPE), "--output", str(run))]
    if steps:
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        data = ["--model", given.model, "--data", given.data, "--valid-data", given.valid_data]
        steps[0] += [*data, "--eval-lengths", given.eval_lengths, *flags(options), *resume]
    if given.suites:
        suites = ["--suite", given.suites, "--data", given.valid_data, *given.evaluate]
        steps.append(command("evaluate", "--run", str(run), *suites))
    with (Path(given.output) / f"{name}.log").open("a", encoding="utf-8") as log:
        for step in steps:
            status = subprocess.run(step, stdout=log, stderr=log, check=False).returncode
            if status:
                print(f"{name}: exit status {status}, see {log.name}", flush=True)
                return
    print(f"{name}: finished", flush=True)


def rows(names: list[str], output: Path) -> list[dict[str, Any]]:
    """A row per finished run, and native and scaled once, from each results.json."""
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        file = output / name / "results.json"
        if not file.exists():
            continue
        results = json.loads(file.read_text(encoding="utf-8"))
        method = results.get("run", {}).get("method", "")
        for label in ("native", "scaled", "restored"):
            if row := results.get(label):
                shown = {"native": "native", "scaled": f"untrained {method}", "restored": name}[label]
                table.setdefault(shown, {"run": shown, **cells(row)})
    return list(table.values())


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """Perplexity by length, KL, top-1 agreement, and every metric of every suite with its standard error."""
    found = {f"perplexity@{length}": value for length, value in row.get("perplexity", {}).items()}
    found |= {"kl": row.get("kl"), "agreement": row.get("agreement")}
    for suite, entry in row.items():
        if isinstance(entry, dict) and "metrics" in entry:
            for metric, value in entry["metrics"].items():
                found[f"{suite} {metric}"] = value["value"]
                found[f"{suite} {metric} stderr"] = value["stderr"]
    return found


def write(table: list[dict[str, Any]], path: Path) -> None:
    heads = list(dict.fromkeys(head for row in table for head in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, heads)
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory or hub repository")
    parser.add_argument("--data", required=True, help="training text")
    parser.add_argument("--valid-data", required=True, help="held-out text")
    parser.add_argument("--output", required=True, help="a folder for the runs, their logs and study.csv")
    parser.add_argument("--study", default=str(HERE / "study.yaml"), help="the runs")
    parser.add_argument("--only", help="names of the runs to make, separated by commas")
    parser.add_argument("--eval-lengths", default="2048,16384,32768")
    parser.add_argument("--suites", default="", help="suites of `evaluate` to run on every model, such as far,ruler")
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("evaluate", nargs="*", help="further flags of `evaluate`, after --")
    given = parser.parse_args()
    study = yaml.safe_load(Path(given.study).read_text(encoding="utf-8"))
    names = given.only.split(",") if given.only else list(study)
    if unknown := [name for name in names if name not in study]:
        parser.error(f"--only {unknown[0]}: not in {given.study}; choose from {', '.join(study)}")
    Path(given.output).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.parallel) as pool:
        list(pool.map(lambda name: run_one(name, study[name], given), names))
    table = rows(names, Path(given.output))
    write(table, Path(given.output) / "study.csv")
    print(f"Written to {Path(given.output) / 'study.csv'}: {len(table)} rows")


if __name__ == "__main__":
    main()
