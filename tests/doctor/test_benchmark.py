"""`doctor --benchmark`: every figure is measured or has a note that says why not, within the time it is given."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models import llama

from mlx_linearard.doctor import __main__ as command
from mlx_linearard.doctor import benchmark, checks, series
from mlx_linearard.doctor.series import Work
from mlx_linearard.errors import UserError
from mlx_linearard.machine import Machine

MACHINE = Machine("Apple M9 (test)", False, 16 << 30, 100.0)
FACTS = {
    **dict.fromkeys(benchmark.FACTS), "device": MACHINE.name, "memory_gb": 16.0, "versions": {"mlx": "1.2.3"},
    "settings": {"HF_HOME": "/home/a-user"},
}  # fmt: skip


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.TransformerBlock, "__call__", llama.TransformerBlock.__call__)  # mlx-lm checkpoints all
    monkeypatch.setattr(benchmark, "in_own_process", series.rows)


def run(model: Path, seconds: float = 100.0, said: list[str] | None = None, **options: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"loss_lengths": (32, 64), "step_lengths": (16, 32), **options}
    say = (lambda _: None) if said is None else said.append
    return benchmark.benchmark(MACHINE, FACTS, model, say=say, seconds=seconds, **sizes)


def test_everything_is_measured(in_this_process: None, model_dir: Path) -> None:
    said: list[str] = []
    found = run(model_dir, said=said)
    assert [row["length"] for row in found["loss"]] == [32, 64] and not benchmark.notes(found)
    names = [(row["series"], row["length"]) for row in found["step"]]
    assert names == [(name, length) for name in ("last", "logits", "mlx-lm") for length in (16, 32)]
    assert all(row["tokens_per_second"] > 0 and row["peak_mb"] > row["weights_mb"] > 0 for row in found["step"])
    assert all(row["seconds"] > 0 and row["extra_mb"] >= 0 for row in found["loss"])
    assert len(said) == 8 and "tokens/s" in said[-1]
    assert "settings" not in found  # a user publishes the file, and settings hold paths


def test_the_table_is_markdown_with_one_row(in_this_process: None, model_dir: Path) -> None:
    found = run(model_dir)
    lines = benchmark.table(found)
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| machine | mlx | loss 32 | loss 64 | last 16 | last 32 | logits 16 |")
    assert "mlx_lm.lora 32" in lines[0] and lines[2].startswith("| Apple M9 (test), 16 GB | 1.2.3 |")


@pytest.mark.parametrize(
    ("row", "cell"),
    [
        ({"series": "loss", "seconds": 0.01464, "extra_mb": 260.0}, "14.6 ms, 0.26 GB"),
        ({"series": "loss", "seconds": 12.345, "extra_mb": 5.0}, "12.3 s, 0.01 GB"),
        ({"series": "last", "tokens_per_second": 24_912.3, "peak_mb": 930.0}, "24912 tokens/s, 0.93 GB"),
        ({"series": "mlx-lm", "tokens_per_second": 8.34, "peak_mb": 5040.0}, "8.3 tokens/s, 5.04 GB"),
        ({"series": "last", "note": "skipped"}, "not measured"),
    ],
)
def test_a_cell_says_time_or_speed_and_memory(row: dict[str, Any], cell: str) -> None:
    assert benchmark.cell(row) == cell


def test_every_chip_has_a_row_in_the_collection(in_this_process: None, model_dir: Path) -> None:
    """docs/measured.md has the columns that the command prints for the real lengths."""
    lengths = {"loss": benchmark.LOSS_LENGTHS, **dict.fromkeys(benchmark.STEP_SERIES, benchmark.STEP_LENGTHS)}
    rows = {name: [{"series": name, "length": n, "note": "-"} for n in lengths[name]] for name in lengths}
    steps = [row for name in benchmark.STEP_SERIES for row in rows[name]]
    head, rule, _ = benchmark.table({**FACTS, "loss": rows["loss"], "step": steps})
    text = (Path(__file__).parents[2] / "docs" / "measured.md").read_text(encoding="utf-8")
    assert f"{head}\n{rule}\n" in text
    chips = [f"Apple M{number}{kind}" for number in range(1, 5) for kind in ("", " Pro", " Max")]
    assert all(f"\n| {chip} |" in text or f"\n| {chip}, " in text for chip in chips)


def test_what_would_take_too_long_is_skipped_with_a_note(in_this_process: None, model_dir: Path) -> None:
    found = run(model_dir, seconds=0.0)
    missing = benchmark.notes(found)
    assert len(missing) >= 7 and all("skipped: it would take about" in line for line in missing)
    assert benchmark.table(found)[2].count("not measured") == len(missing)


def test_a_longer_step_is_skipped_if_the_shorter_one_was_slow(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(length: int) -> tuple[int, float]:
        time.sleep(0.2)
        return 1_000_000, 100.0

    monkeypatch.setattr(series, "own_step", lambda work: slow)
    short, long = series.rows(Work("last", str(model_dir), "tiny", (16, 64)), 1.0)
    assert short["tokens_per_second"] == 100.0 and long["note"] == "skipped: it would take about 3 s"


def test_a_series_runs_in_a_process_of_its_own(model_dir: Path) -> None:
    (row,) = series.in_own_process(Work("last", str(model_dir), "tiny", (16,), steps=0, dtype="float32"), 100.0)
    assert row["series"] == "last" and row["tokens_per_second"] > 0


def test_a_process_that_is_too_slow_is_ended(model_dir: Path) -> None:
    began = time.monotonic()
    found = list(series.in_own_process(Work("last", str(model_dir), "tiny", (16, 32)), 0.01))
    assert [row["note"] for row in found] == ["skipped: not finished after 0 s"] * 2
    assert time.monotonic() - began < 20


def test_a_process_that_fails_leaves_a_note(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = list(series.in_own_process(Work("last", str(tmp_path / "nowhere"), "tiny", (16, 32)), 100.0))
    assert [row["note"] for row in found] == ["failed with status 1"] * 2
    assert [row["length"] for row in found] == [16, 32]


# ---------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def quick(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    """A small benchmark of a tiny model."""
    own = benchmark.benchmark
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "default_model", lambda progress: model_dir)
    monkeypatch.setattr(checks, "HEAD_SIZES", (16,))
    monkeypatch.setattr(benchmark, "benchmark", lambda *a, **k: own(*a, **k, loss_lengths=(32,), step_lengths=(16,)))


def test_the_command_prints_the_table_and_writes_the_file(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(["--benchmark", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (file,) = tmp_path.glob("benchmark-*.json")
    found = json.loads(file.read_text())
    assert benchmark.table(found)[2] in printed and str(file) in printed
    assert found["versions"]["mlx"] and found["self_test"]["passed"] and len(found["step"]) == 3
    monkeypatch.setattr(command, "examine", lambda machine: found)
    monkeypatch.setattr(benchmark, "benchmark", lambda *a, **k: found)
    assert command.run(["--benchmark", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == found["device"]


def test_a_wrong_folder_is_refused_before_anything_is_measured(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "measure_machine", lambda: MACHINE)
    monkeypatch.setattr(checks, "self_test", None)
    for folder in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"--output .*{folder} is not a folder that can be written"):
            command.run(["--benchmark", "--out", str(tmp_path / folder)])


def test_a_folder_without_a_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output is the folder of a benchmark's file: give --benchmark as well"):
        command.run(["--out", str(tmp_path)])
