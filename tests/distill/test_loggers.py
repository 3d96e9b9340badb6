"""--report-to: every number reaches its logger, a resumed run repeats none, and a logger's failure ends no run."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import metrics, small

from mlx_linearard.cli import run_command
from mlx_linearard.distill import loggers
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.distill.listener import Listener
from mlx_linearard.distill.run import distill
from mlx_linearard.errors import UserError

FLAGS = ["--seq-len", "32", "--grad-accum", "1", "--lora-rank", "4", "--eval-tokens", "64"]


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_number_and_a_resumed_run_repeats_none(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = small(model_dir, text_file, tmp_path / "run", steps=3, eval_every=2, report_to="csv")
    assert distill(config) is not None
    identity = (tmp_path / "run" / "logs" / "id").read_text()
    result = distill(dataclasses.replace(config, steps=5, resume=True))
    assert result is not None
    rows = rows_of(tmp_path / "run")
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 2, 3, 4, 5]
    for row, line in zip([row for row in rows if row["train/loss"]], metrics(tmp_path / "run"), strict=True):
        assert float(row["train/loss"]) == line["loss"] and float(row["train/grad_norm"]) == line["grad_norm"]
    by_name = {
        name: [int(row["step"]) for row in rows if row[f"{name}/perplexity@32"]] for name in ("scaled", "native")
    }
    assert by_name == {"scaled": [0], "native": [0]}
    assert [int(row["step"]) for row in rows if row["evaluation/kl"]] == [2, 4]
    assert float(rows[-1]["restored/kl"]) == result.restored.kl and rows[-1]["step"] == "5"
    assert (tmp_path / "run" / "logs" / "id").read_text() == identity


def test_overwrite_starts_new_logs(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = small(model_dir, text_file, tmp_path / "run", steps=1, report_to="csv")
    assert distill(config) is not None
    assert distill(dataclasses.replace(config, overwrite=True, report_to=None)) is not None
    assert not (tmp_path / "run" / "logs").exists()


def test_a_comparison_logs_each_objective(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    flags = ["--model", str(model_dir), "--data", str(text_file), "--output", str(tmp_path / "out"), *FLAGS]
    assert command([*flags, "--steps", "1", "--compare", "logits,ce", "--report-to", "csv"]) == 0
    assert all(rows_of(tmp_path / "out" / name)[-1]["restored/perplexity@32"] for name in ("logits", "ce"))


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--compare", "relation,ce"]])
@pytest.mark.parametrize("name", sorted(loggers.PACKAGES))
def test_a_missing_package_is_one_line_before_any_work(
    tmp_path: Path, name: str, more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    flags = ["--model", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--report-to", f"csv,{name}", *more]
    assert run_command(lambda: command(flags)) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.endswith(f"pip install {name}\n")
    assert f"--report-to {name} needs the package {name}" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", ["", "csv,csv", "mlflow", "csv;wandb"])
def test_an_unknown_logger_is_named(names: str) -> None:
    with pytest.raises(UserError, match="must name some of csv, tensorboard, wandb, swanlab, trackio"):
        small(Path("m"), Path("t"), Path("o"), report_to=names)


class Said(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Breaks:
    """A logger whose connection is lost after a few numbers."""

    shown = "nowhere"

    def __init__(self, place: loggers.Place) -> None:
        self.left = 3

    def log(self, values: loggers.Values, step: int) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("the connection\nis lost")

    def close(self) -> None:
        raise AssertionError("it has failed already")


def test_a_logger_that_fails_ends_no_run(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "csv", Breaks)
    said = Said()
    assert distill(small(model_dir, text_file, tmp_path / "run", steps=3, report_to="csv"), said) is not None
    assert said.lines.count("nothing more is reported to csv: the connection is lost") == 1
    assert len(metrics(tmp_path / "run")) == 3


def test_a_logger_that_cannot_start_is_one_line(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_account(place: loggers.Place) -> loggers.Logger:
        raise RuntimeError("log in\nfirst")

    monkeypatch.setitem(loggers.LOGGERS, "csv", no_account)
    with pytest.raises(UserError, match="--report-to csv cannot start: log in first; leave it out"):
        distill(small(model_dir, text_file, tmp_path / "run", steps=3, report_to="csv"))


# ---------------------------------------------------------------------------------------------------
# The real packages (extras of their names)


@pytest.mark.slow
def test_tensorboard_reads_our_events(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = small(model_dir, text_file, run, steps=3, eval_every=2, save_every=2, report_to="tensorboard")
    assert distill(config) is not None
    result = distill(dataclasses.replace(config, steps=5, resume=True))
    assert result is not None
    read = EventAccumulator(str(run / "logs"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    for event, line in zip(read.Scalars("train/loss"), metrics(run), strict=True):
        assert event.value == pytest.approx(line["loss"], rel=1e-6)  # events hold float32
    assert [event.step for event in read.Scalars("evaluation/kl")] == [2, 4]
    assert read.Scalars("restored/kl")[-1].value == pytest.approx(result.restored.kl, rel=1e-6)
    assert {"train/tokens_per_second", "scaled/perplexity@32", "native/agreement"} <= set(read.Tags()["scalars"])


def run_offline(model: Path, text: Path, run: Path, name: str, **environment: str) -> None:
    """A run in a process of its own: the packages keep threads and processes, and hook into the exit."""
    words = ["--model", str(model), "--data", str(text), "--output", str(run), *FLAGS, "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "mlx_linearard.distill", *words, "--report-to", name, "--project-name", "tiny"],
        env={**os.environ, "HOME": str(run.parent / "home"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"reporting to {name}: " in done.stdout and "nothing more is reported" not in done.stdout
    assert "Traceback" not in done.stderr


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes, LevelDB's log format of 32 KiB blocks."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is empty
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # complete, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_runs_offline(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    run = tmp_path / "run"
    run_offline(model_dir, text_file, run, "wandb", WANDB_MODE="offline")
    (file,) = (run / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    losses = []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        losses += [json.loads(items["train/loss"])] if "train/loss" in items else []
    assert losses == [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_trackio_runs_offline(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "trackio"
    run_offline(model_dir, text_file, run, "trackio", TRACKIO_DIR=str(folder))
    database = sqlite3.connect(folder / "tiny.db")
    rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step, id")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_swanlab_runs_offline(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_offline(model_dir, text_file, run, "swanlab", SWANLAB_MODE="offline")
    (file,) = (run / "logs" / "swanlog").glob("run-*/*.swanlab")
    assert b"train/loss" in file.read_bytes()
