"""The command from its flags to its run directory, on a tiny model, and users' mistakes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from forked import Commands
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from tiny import tiny_model

import mlx_linearard
from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.__main__ import run as command
from mlx_linearard.evaluate.__main__ import run as evaluate

FLAGS = [
    "--seq-len", "32", "--grad-accum", "2", "--steps", "4", "--lora-rank", "4", "--learning-rate", "2e-3",
    "--long-weight", "0", "--eval-tokens", "128", "--save-every", "2",
]  # fmt: skip


def flags(model_dir: Path, text_file: Path, output: Path, *more: str) -> list[str]:
    return ["--model", str(model_dir), "--data", str(text_file), "--output", str(output), *FLAGS, *more]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_run_leaves_what_the_contract_says(
    model_dir: Path, text_file: Path, tmp_path: Path, kind: str, capsys
) -> None:
    run = tmp_path / "run"
    rate = "2e-4" if kind == "full" else "2e-3"
    more = ["--fine-tune-type", kind, "--eval-lengths", "32,200", "--learning-rate", rate, "--steps", "8"]
    assert command(flags(model_dir, text_file, run, *more)) == 0
    told = capsys.readouterr().out
    assert "restored" in told and f"mlx_lm.generate --model {run}/model" in told
    report = (run / "report.md").read_text()
    verdict = told.partition("\nNext:")[0].splitlines()
    assert any(len(line) > 60 and line in report for line in verdict)  # the report's own
    results = json.loads((run / "results.json").read_text())
    for name in ("native", "scaled", "restored"):
        assert set(results[name]["perplexity"]) == {"32", "200"}
    assert results["native"]["kl"] == 0 and results["native"]["agreement"] == 1
    assert 0 < results["restored"]["kl"] < results["scaled"]["kl"]
    assert results["export"]["kl"] < 1e-6
    samples = [results[name]["sample"] for name in ("native", "scaled", "restored")]
    assert len({sample["prompt"] for sample in samples}) == 1 and len(samples[0]["prompt"]) == 16  # half a window
    assert all(sample["text"] for sample in samples) and samples[1] != samples[0]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(1, 9)) and metrics[0]["learning_rate"] > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 8
    assert {p.name for p in run.iterdir()} >= {"adapters", "base", "model", "checkpoints", "report.html"}


@pytest.fixture(scope="module")
def finished(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert command(flags(model_dir, text_file, run)) == 0
    return run


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "4-bit"])
def test_stock_mlx_lm_serves_both_exports(tmp_path: Path, text_file: Path, bits: int | None) -> None:
    source = tiny_model(tmp_path / "source", bits=bits)
    run = tmp_path / "run"
    assert command(flags(source, text_file, run)) == 0
    fused, tokenizer = load(str(run / "model"))
    adapted, _ = load(str(run / "base"), adapter_path=str(run / "adapters"))
    base, _ = load(str(run / "base"))
    tokens = mx.array([[(i * 11) % 256 for i in range(300)]])  # beyond the native window of 128
    assert mx.abs(fused(tokens) - adapted(tokens)).max().item() < 1e-4
    assert mx.abs(base(tokens) - adapted(tokens)).max().item() > 1e-3
    assert json.loads((run / "base" / "config.json").read_text())["max_position_embeddings"] == 512
    assert (run / "base" / "model.safetensors").stat().st_ino == (source / "model.safetensors").stat().st_ino
    assert isinstance(generate(fused, tokenizer, prompt="It was", max_tokens=3), str)


def test_adapters_on_some_layers_only_serve_too(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(flags(model_dir, text_file, run, "--objective", "relation", "--layers", "1")) == 0
    adapters = mx.load(str(run / "adapters" / "adapters.safetensors"))
    assert {int(name.split(".")[2]) for name in adapters} == {0, 1}
    fused, _ = load(str(run / "model"))
    adapted, _ = load(str(run / "base"), adapter_path=str(run / "adapters"))
    tokens = mx.array([[(i * 11) % 256 for i in range(100)]])
    assert mx.abs(fused(tokens) - adapted(tokens)).max().item() < 1e-4


def parameters(run: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(mx.load(str(run / "adapters" / "adapters.safetensors"))))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


@pytest.mark.parametrize(
    "asked", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(
    model_dir: Path, text_file: Path, tmp_path: Path, commands: Commands, asked: signal.Signals
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--lora-dropout", "0.1", "--steps", "30", "--keep", "last"]  # the start is the same in any run
    assert command(flags(model_dir, text_file, whole, *more)) == 0
    process = commands.start("distill", flags(model_dir, text_file, broken, *more), tmp_path)
    metrics = broken / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        time.sleep(0.01)
    process.send_signal(asked)
    assert process.wait(60) == 130, process.errors.read_text()
    assert not (broken / "model").exists()
    assert command([*flags(model_dir, text_file, broken, *more), "--resume"]) == 0
    assert same(parameters(whole), parameters(broken))
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 31))


def test_a_checkpoint_of_another_run_is_refused(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path, commands: Commands
) -> None:
    words = flags(model_dir, text_file, finished, "--resume", "--lora-scale", "3")
    status, errors = commands.run("distill", words, tmp_path)
    assert status == 2 and "lora_scale was 2.0 and is 3.0" in errors


def test_a_dry_run_writes_nothing(model_dir: Path, text_file: Path, tmp_path: Path, capsys) -> None:
    assert command(flags(model_dir, text_file, tmp_path / "run", "--dry-run")) == 0
    assert "4 steps of 64 tokens" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_overwrite_takes_the_evaluation_of_the_old_run_with_it(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    more = ["--suite", "ppl", "--data", str(text_file), "--lengths", "64", "--tokens", "256"]
    assert evaluate(["--run", str(run), *more]) == 0
    assert list((run / "results.items").iterdir()) and "ppl" in (run / "results.json").read_text()
    assert command(flags(model_dir, text_file, run, "--overwrite")) == 0
    assert not (run / "results.items").exists() and "ppl" not in (run / "results.json").read_text()


def test_a_busier_machine_resumes_with_the_sizes_it_began_with(
    finished: Path, model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes that a user leaves open depend on the machine's speed, which a resumed run measures again."""
    run = shutil.copytree(finished, tmp_path / "run")
    own = mlx_linearard.distill.plan.size_run

    def smaller(config: DistillConfig, *rest):
        return own(config if config.seq_len else dataclasses.replace(config, seq_len=16, grad_accum=1), *rest)

    monkeypatch.setattr("mlx_linearard.distill.plan.size_run", smaller)
    arguments = ["--model", str(model_dir), "--data", str(text_file), "--output", str(run)]
    assert command([*arguments, "--lora-rank", "4", "--learning-rate", "2e-3", "--resume"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["seq_len"] == 32


@pytest.mark.parametrize("form", ["mlx", "hf", "peft", "adapters"])
def test_a_finished_run_goes_to_every_form(
    finished: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = finished, tmp_path / "out"

    def other_file_system(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    assert mlx_linearard.export(run, out, format=form) == out
    tokens = mx.array([[(i * 11) % 256 for i in range(100)]])
    expected = load(str(run / "model"))[0](tokens)
    if form == "peft":
        assert json.loads((out / "adapter_config.json").read_text())["target_modules"]
        return
    paths = (out / "base", out / "adapters") if form == "adapters" else (out, None)
    found = load(str(paths[0]), adapter_path=str(paths[1]) if paths[1] else None)[0](tokens)
    assert mx.abs(found - expected).max().item() < 1e-4


def test_the_main_path_is_a_function(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    result = mlx_linearard.distill(
        DistillConfig(
            model=str(model_dir),
            data=str(text_file),
            output=str(tmp_path / "run"),
            seq_len=32,
            grad_accum=1,
            steps=2,
            lora_rank=4,
            eval_tokens=64,
            objective="relation+logits",
            layers="all",
        )
    )
    assert result.restored.kl < result.scaled.kl and result.run.model.is_dir()


@pytest.fixture
def broken(tmp_path: Path, model_dir: Path) -> Path:
    """A folder of files for users' mistakes."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "noweights").mkdir()
    (tmp_path / "noweights" / "config.json").write_text((model_dir / "config.json").read_text())
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "word.txt").write_text("Hi")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "typo.yaml").write_text("lora_rnk: 4\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").write_text("steps: 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--model": "nowhere/at-all/there"}, "is not a model directory"),
        ({"--model": "{}/empty"}, "config.json"),
        ({"--model": "{}/noweights"}, "weights"),
        ({"--factor": "1"}, "above 1"),
        ({"--factor": "0.5"}, "above 1"),
        ({"--seq-len": "129"}, "native window of 128"),
        ({"--data": "{}/short.txt"}, "too few"),
        ({"--data": "{}/word.txt"}, "the held-out text has 0 tokens, too few"),
        ({"--data": "{}/empty.txt"}, "is empty: give a file with text"),
        ({"--model": "{}/model.gguf"}, "is a GGUF file, not a model directory: make one with mlx_linearard.convert"),
        ({"--data": "{}/binary.txt"}, "binary|UTF-8"),
        ({"--data": "{}/nowhere"}, "does not exist"),
        ({"--output": "{}/short.txt"}, "is a file"),
        ({"--output": "{}/short.txt/run"}, "not a directory"),
        ({"--output": "/proc/run"}, "cannot be written|not a directory"),
        ({"--output": "{}/held"}, "already holds a run"),
        ({"--config": "{}/typo.yaml"}, "did you mean lora_rank"),
        ({"--resume": None}, "no checkpoint to resume from: leave out --resume"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    broken: Path, model_dir: Path, text_file: Path, commands: Commands, changes: dict, says: str
) -> None:
    before = sorted(broken.rglob("*"))
    arguments = flags(model_dir, text_file, broken / "run")
    for name, value in changes.items():
        arguments += [name] if value is None else [name, value.format(broken)]
    status, errors = commands.run("distill", arguments, broken)
    assert status == 2, errors
    assert len(errors.strip().splitlines()) == 1
    assert re.search(says, errors)
    assert sorted(broken.rglob("*")) == before
