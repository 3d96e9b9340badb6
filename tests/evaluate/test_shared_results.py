"""Several evaluations into one results file: no row is lost, and no item log is written by two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate import runner
from mlx_linearard.evaluate.__main__ import run
from mlx_linearard.results.store import ItemLog, read_results, update_results

ITEMS = [{"query": f"Question {i}:", "choices": ["the best", f"number {i}"], "gold": i % 2} for i in range(4)]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_change_of_results_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row = {"perplexity": {"32": 1.0}, "kl": 0.0, "agreement": 1.0}
    path.write_text(json.dumps({"native": row}))
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            status = 1
            try:
                for step in range(8):
                    native = read_results(path).rows["native"]
                    update_results(path, lambda old, n=f"m{number}-{step}", r=native: old.merged(type(old)({n: r})))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    expected = {"native", *(f"m{number}-{step}" for number in range(4) for step in range(8))}
    assert set(json.loads(path.read_text())) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_log_that_another_process_writes_is_refused(model_dir: Path, items: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results.json"
    arguments = ["--model", str(model_dir), "--suite", "choice", "--data", str(items), "--out", str(out)]
    assert run(arguments) == 0
    before = out.read_bytes()
    log = ItemLog(next((tmp_path / "results.items").glob("*.jsonl")))
    capsys.readouterr()
    with log.held():
        assert run_command(lambda: run(arguments)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "is in use by another process" in lines[0]
        with pytest.raises(UserError, match="in use"), log.held():
            pass
    assert out.read_bytes() == before and run(arguments) == 0


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "[" * 50_000,
        '{"id": "0"}',
        '{"id": 0, "samples": {"acc": 1.0}}',
        '{"id": "0", "samples": {"acc": NaN}}',
        '{"id": "0", "samples": {"acc": "1"}}',
        '{"id": "0", "samples": {"acc": ' + "9" * 5000 + "}}",
        "\udcff",
    ],
)
def test_a_damaged_line_is_measured_again(model_dir: Path, items: Path, tmp_path: Path, line: str) -> None:
    out = tmp_path / "results.json"
    arguments = ["--model", str(model_dir), "--suite", "choice", "--data", str(items), "--out", str(out)]
    assert run(arguments) == 0
    log = next((tmp_path / "results.items").glob("*.jsonl"))
    lines = log.read_text().splitlines()
    log.write_bytes("\n".join([line, *lines[1:]]).encode("utf-8", "surrogateescape") + b"\n")
    assert run(arguments) == 0
    assert sorted(log.read_text().splitlines()) == sorted(lines)


def test_a_record_of_another_suite_is_named(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "results.json"
    arguments = [
        "--model",
        str(model_dir),
        "--suite",
        "ppl",
        "--data",
        str(text_file),
        "--lengths",
        "32",
        "--tokens",
        "64",
        "--out",
        str(out),
    ]
    assert run(arguments) == 0
    log = next((tmp_path / "results.items").glob("*.jsonl"))
    record: dict[str, Any] = json.loads(log.read_text().splitlines()[0])
    del record["positions"]
    log.write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert run_command(lambda: run(arguments)) == 2
    assert f"{log} holds a record that is not valid" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_limit_on_file_sizes_leaves_nothing_behind(model_dir: Path, items: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    log = ItemLog.beside(tmp_path / "results.json", "a", "choice", "1")
    if (child := os.fork()) == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            with pytest.raises(UserError, match=r"cannot write .*File too large"), log.held():
                log.append({"id": "0", "samples": {"acc": 1.0}})
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [items.name]


def test_weights_that_changed_are_measured_again(model_dir: Path, items: Path, tmp_path: Path) -> None:
    """The new weights have the size and the time of the old ones."""
    model, out = shutil.copytree(model_dir, tmp_path / "m"), tmp_path / "results.json"
    arguments = ["--model", str(model), "--suite", "choice", "--data", str(items), "--out", str(out)]
    assert run(arguments) == 0
    weights = model / "model.safetensors"
    state, content = weights.stat(), bytearray(weights.read_bytes())
    content[-2] ^= 1  # of the last number
    weights.write_bytes(content)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run(arguments) == 0
    assert len(list((tmp_path / "results.items").glob("*.jsonl"))) == 2


@pytest.mark.slow
def test_evaluations_side_by_side_keep_all_rows(items: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    models = [tiny_model(tmp_path / f"m{seed}", seed=seed) for seed in range(4)]
    command = [sys.executable, "-m", "mlx_linearard.evaluate", "--suite", "choice", "--data", str(items)]
    processes = [subprocess.Popen([*command, "--model", str(model), "--out", str(out)]) for model in models]
    assert [process.wait() for process in processes] == [0] * 4
    results = json.loads(out.read_text())
    assert set(results) == {"m0", "m1", "m2", "m3", "comparisons"}
    assert set(results["comparisons"]["choice/few"]["metrics"]["acc"]) == {"m0", "m1", "m2", "m3"}


def measured_tokens(arguments: list[str], capsys) -> int:
    """How many tokens an evaluation measures, as its progress says."""
    capsys.readouterr()
    assert run(arguments) == 0
    last = [line.rpartition("/")[2].split()[0] for line in capsys.readouterr().err.splitlines() if "tokens" in line]
    return sum(map(int, last))


def test_a_model_is_measured_once_per_folder(model_dir: Path, items: Path, tmp_path: Path, capsys) -> None:
    """A second candidate with results of its own does not pay for the native model again."""
    candidates = [tiny_model(tmp_path / f"candidate{i}", seed=i) for i in (3, 4)]
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    def arguments(candidate: Path, out: Path, *more: str) -> list[str]:
        return [
            "--model",
            f"c={candidate}",
            "--against",
            f"native={model_dir}",
            "--suite",
            "choice",
            "--data",
            str(items),
            "--out",
            str(out),
            *more,
        ]

    both = measured_tokens(arguments(candidates[0], first), capsys)
    assert measured_tokens(arguments(candidates[1], second), capsys) == both // 2
    one, two = (json.loads(path.read_text()) for path in (first, second))
    assert one["native"] == two["native"] and one["c"]["choice/few"]["items"] != two["c"]["choice/few"]["items"]
    assert set(two["comparisons"]["choice/few"]["metrics"]["acc"]) == {"c", "native"}
    other_label = ["--model", f"n={model_dir}", "--suite", "choice", "--data", str(items), "--out", str(second)]
    assert measured_tokens(other_label, capsys) == 0
    assert measured_tokens(arguments(candidates[1], tmp_path / "third.json", "--dtype", "bfloat16"), capsys) == both
    assert measured_tokens(arguments(candidates[1], tmp_path / "fourth.json", "--limit", "2"), capsys) == both // 2


def test_only_items_that_are_asked_for_are_taken_over(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    arguments = ["--model", str(model_dir), "--suite", "ppl", "--data", str(text_file), "--tokens", "128", "--out"]
    assert measured_tokens([*arguments, str(first), "--lengths", "32,64"], capsys) == 256
    assert measured_tokens([*arguments, str(second), "--lengths", "16,64"], capsys) == 128
    label = next(iter(json.loads(second.read_text())))
    assert set(json.loads(second.read_text())[label]["ppl"]["by_length"]) == {"16", "64"}


def test_another_folder_finds_what_was_measured(
    model_dir: Path, items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is not even loaded; with --no-cache, or with another text, it is."""
    monkeypatch.setenv("MLX_LINEARARD_CACHE", str(tmp_path / "cache"))

    def evaluated(out: str, data: Path, *more: str) -> dict[str, Any]:
        arguments = ["--model", f"native={model_dir}", "--suite", "choice", "--data", str(data), *more]
        assert run([*arguments, "--out", str(tmp_path / out / "results.json")]) == 0
        return json.loads((tmp_path / out / "results.json").read_text())

    for folder in "abcde":
        (tmp_path / folder).mkdir()
    first = evaluated("a", items)
    assert "measured before" not in capsys.readouterr().out
    other = tmp_path / "other" / items.name
    other.parent.mkdir()
    other.write_text(items.read_text().replace("Question", "A question"))

    loads: list[str] = []
    own = runner.load_subject
    monkeypatch.setattr(
        runner, "load_subject", lambda directory, **k: loads.append(directory.label) or own(directory, **k)
    )
    assert evaluated("b", items) == first and not loads
    assert "choice/few, native: 4 of 4 items were measured before\n" in capsys.readouterr().out
    evaluated("c", other)
    assert loads == ["native"] and "measured before" not in capsys.readouterr().out
    assert evaluated("d", items, "--no-cache") == first and loads == ["native"] * 2
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text().replace('"scores"', '"samples"').replace('"id"', '"it"'))
    assert evaluated("e", items) == first and loads == ["native"] * 3  # records that are not valid are not taken
