"""The study's runner: which commands a run needs, and what the table has after a real one."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

FILE = Path(__file__).parents[1] / "examples" / "study" / "study.py"
EVALUATE = [{"suite": "ppl", "lengths": "32", "tokens": 64}, {"suite": "fidelity", "lengths": "32", "tokens": 64}]


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_runner", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_runner"] = module
    spec.loader.exec_module(module)
    return module


def study_of(runner: ModuleType, output: Path, runs: dict, evaluations: list | None = None) -> object:
    output.mkdir(exist_ok=True)
    given = argparse.Namespace(
        model="M", data="D", valid_data="V", output=str(output), items="I", collect=None, limit_minutes=None
    )
    return runner.Study(runs, {"method": "yarn"}, evaluations or [], given)


def test_each_kind_of_run_has_its_commands(runner: ModuleType, tmp_path: Path) -> None:
    runs: dict = {"native": {"method": "native"}, "untrained": {"steps": 0, "yarn_beta_fast": 12.0}, "a": {"steps": 3}}
    evaluations = [{"suite": "ppl"}, {"suite": "choice", "data": ["choice={items}/x.jsonl", "y"]}]
    study = study_of(runner, tmp_path / "out", runs, evaluations)
    words = {name: [words[2:] for _, words in study.commands(name)] for name in runs}
    assert [command[0] for command in words["native"]] == ["mlx_linearard.evaluate"] * 2
    assert words["native"][0][1:5] == ["--model", "native=M", "--out", str(tmp_path / "out" / "native.json")]
    assert words["native"][0][5:] == ["--data", "V", "--suite", "ppl"]
    assert words["native"][1][5:] == ["--data", "choice=I/x.jsonl", "--data", "y", "--suite", "choice"]
    scale = ["mlx_linearard.convert", "scale", "M", str(tmp_path / "out" / "untrained")]
    assert words["untrained"][0] == [*scale, "--method", "yarn", "--factor", "4.0", "--yarn-beta-fast", "12.0"]
    assert words["a"][0][:3] == ["mlx_linearard.distill", "--config", str(runner.RECIPE)]
    assert words["a"][0][-4:] == ["--method", "yarn", "--steps", "3"]
    assert words["a"][1][2] == f"a={tmp_path / 'out' / 'a' / 'model'}"
    runs["native"]["evaluate"] = [{"suite": "far"}]
    (only,) = (words[2:] for _, words in study.commands("native"))
    assert only[5:] == ["--data", "V", "--suite", "far"]


def test_a_failed_training_is_not_evaluated_and_is_tried_again(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(runner, tmp_path / "out", {"a": {"steps": 3}}, [{"suite": "ppl"}])
    called, statuses = [], iter([2, 0, 0])

    def call(name: str, words: list[str]) -> int:
        called.append(words[2])
        return next(statuses)

    monkeypatch.setattr(study, "call", call)
    study.make("a")
    assert called == ["mlx_linearard.distill"]
    study.make("a")
    study.make("a")
    assert called[1:] == ["mlx_linearard.distill", "mlx_linearard.evaluate"], "what is finished is not repeated"


def study_file(folder: Path, runs: dict) -> Path:
    file = folder / "study.yaml"
    shared = {
        "dtype": "float32",
        "seq_len": 32,
        "grad_accum": 1,
        "lora_rank": 4,
        "eval_tokens": 64,
        "eval_lengths": "32",
    }
    file.write_text(yaml.safe_dump({"shared": shared, "evaluate": EVALUATE, "runs": runs}, sort_keys=False))
    return file


def call(model_dir: Path, text: Path, study: Path, folder: Path, *words: str) -> str:
    data = ["--model", str(model_dir), "--data", str(text), "--valid-data", str(text), "--study", str(study)]
    places = ["--output", str(folder / "out"), "--collect", str(folder / "small")]
    done = subprocess.run(
        [sys.executable, str(FILE), *data, *places, *words], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


@pytest.mark.slow
def test_a_study_fills_its_table_and_continues(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    runs = {"native": {"method": "native"}, "untrained": {"steps": 0}, "trained": {"steps": 4, "long_weight": 0.2}}
    study = study_file(tmp_path, runs)
    stopped = call(model_dir, text_file, study, tmp_path, "--limit-minutes", "0")
    assert "Stopped" in stopped and "finished" not in stopped
    printed = call(model_dir, text_file, study, tmp_path, "--jobs", "3")
    assert printed.count("finished") == 8 and "exit status" not in printed
    with (tmp_path / "small" / "study.csv").open(encoding="utf-8") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(runs)
    assert float(rows["native"]["fidelity kl@32"]) == 0.0 < float(rows["untrained"]["fidelity kl@32"])
    assert all(float(row["ppl perplexity@32 stderr"]) > 0 for row in rows.values())
    assert [row["method"] for row in rows.values()] == ["native", "yarn", "yarn"]
    assert rows["trained"]["long_weight"] == "0.2" and rows["trained"]["training_tokens"] == str(4 * (32 + 288))
    assert "long" in json.loads((tmp_path / "small" / "trained.metrics.jsonl").read_text().splitlines()[0])
    again = call(model_dir, text_file, study, tmp_path)
    assert "finished" not in again and "exit status" not in again
