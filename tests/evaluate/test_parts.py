"""Evaluations of several directories, lengths and tasks add up; every suite is a function of a model and data."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from forked import Commands
from tiny import PROSE, tiny_model

from mlx_linearard import evaluate as room
from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run
from mlx_linearard.evaluate.model import load_subject, open_directory
from mlx_linearard.results.statistics import DECISION, Metric, compare
from mlx_linearard.results.store import ItemLog

ITEMS = [{"query": f"Question {i}:", "choices": ["the best", f"number {i}"], "gold": i % 2} for i in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one tokenizer, with room for pass keys."""
    root = tmp_path_factory.mktemp("models")
    return [tiny_model(root / f"m{seed}", seed=seed, max_position_embeddings=1024) for seed in range(3)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results.json"


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())


def go(models: list[str], out: Path, *more: str) -> dict[str, Any]:
    """Run the command on NAME=DIR models, the first of them with --model; returns the content of results.json."""
    first, *others = models
    against = [part for other in others for part in ("--against", other)]
    assert run(["--model", first, *against, "--out", str(out), *more]) == 0
    return read(out)


def test_against_may_be_given_several_times(models: list[Path], text_file: Path, out: Path) -> None:
    a, b, c = (f"{name}={path}" for name, path in zip("abc", models, strict=True))
    more = ["--suite", "ppl", "--data", str(text_file), "--lengths", "64", "--tokens", "640"]
    apart = go([a, b, c], out, *more)
    assert {"a", "b", "c"} <= apart.keys()
    assert apart["comparisons"]["ppl"]["against"] == "b"  # the first that was given
    together = out.with_name("together.json")
    assert run(["--model", a, "--against", b, c, "--out", str(together), *more]) == 0
    assert read(together)["comparisons"] == apart["comparisons"]


def test_lengths_and_tasks_measured_later_are_added(models: list[Path], text_file: Path, out: Path) -> None:
    data = ["--data", str(text_file), "--samples", "1"]
    model = [f"a={models[0]}"]
    go(model, out, "--suite", "ppl", "--lengths", "300", "--tokens", "600", *data)
    found = go(model, out, "--suite", "ppl", "--lengths", "50", "--tokens", "600", *data)["a"]["ppl"]
    assert set(found["metrics"]) == {"perplexity@50", "perplexity@300"} and set(found["by_length"]) == {"50", "300"}
    assert found["by_position"][-1]["end"] == 300 and found["options"]["lengths"] == [300, 50]
    go(model, out, "--suite", "passkey", "--lengths", "500", "--depths", "0", *data)
    grid = go(model, out, "--suite", "passkey", "--lengths", "700", "--depths", "50,100", *data)["a"]["passkey"]["grid"]
    assert {length: set(cells) for length, cells in grid.items()} == {"500": {"0"}, "700": {"50", "100"}}
    go(model, out, "--suite", "ruler", "--tasks", "niah_single_1", "--lengths", "900", *data)
    ruler = go(model, out, "--suite", "ruler", "--tasks", "fwe", "--lengths", "900", *data)["a"]["ruler"]["metrics"]
    assert set(ruler) == {"niah_single_1@900", "fwe@900", "average@900"} and ruler["average@900"]["n"] == 2


def test_a_measurement_on_other_text_replaces_the_first(models: list[Path], text_file: Path, out: Path) -> None:
    other = out.with_name("other.txt")
    other.write_text(text_file.read_text()[::-1])
    more = ["--suite", "ppl", "--tokens", "600"]
    go([f"a={models[0]}"], out, *more, "--lengths", "300", "--data", str(text_file))
    found = go([f"a={models[0]}"], out, *more, "--lengths", "50", "--data", str(other))
    assert set(found["a"]["ppl"]["metrics"]) == {"perplexity@50"}


def test_models_measured_one_at_a_time_are_compared(models: list[Path], text_file: Path, out: Path) -> None:
    more = ["--suite", "ppl", "--data", str(text_file), "--lengths", "64", "--tokens", "640"]
    names = ["restored", "native", "scaled"]
    for name, path in zip(names, models, strict=True):
        found = go([f"{name}={path}"], out, *more)
    together = out.with_name("together.json")
    go([f"{name}={path}" for name, path in zip(names, models, strict=True)], together, *more)
    assert found["comparisons"]["ppl"]["metrics"] == read(together)["comparisons"]["ppl"]["metrics"]
    assert "recovered" in found["comparisons"]["ppl"]["metrics"]["perplexity@64"]["restored"]
    # Two of them again: nothing is lost of the third.
    again = go([f"{name}={path}" for name, path in zip(names[:2], models, strict=False)], out, *more)
    assert again["comparisons"] == found["comparisons"]


def test_shares_are_of_the_items_that_both_have() -> None:
    rows = {"native": {"a": 1.0, "b": 1.0, "c": 0.0}, "scaled": {"a": 0.0, "b": 1.0, "c": 0.0}, "restored": {"a": 1.0}}
    table = compare(rows, Metric(DECISION))
    assert table["restored"].percent_of_native == 100 and table["restored"].recovered == 100
    assert table["scaled"].percent_of_native == pytest.approx(50) and table["native"].value.n == 3


def test_a_log_holds_any_text(tmp_path: Path) -> None:
    """Characters that split lines elsewhere (U+2028, U+0085, form feeds) may be part of an answer."""
    log = ItemLog.beside(tmp_path / "r.json", "a", "ruler", "1")
    records = [{"id": str(i), "samples": {"x": 1.0}, "answer": f"a{c}b"} for i, c in enumerate("\u2028\x85\x0c\n\r")]
    for record in records:
        log.append(record)
    assert list(log.read().values()) == records
    log.path.write_text(log.path.read_text() + '{"id": "9", "sam')
    assert list(log.read().values()) == records
    with log.held():
        assert list(log.read().values()) == records and log.path.read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("sent", "status"), [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_stopped_process_measures_nothing_twice(
    models: list[Path], tmp_path: Path, commands: Commands, sent: signal.Signals, status: int
) -> None:
    """The numbers are those of a run that was not stopped, and each item is measured once."""
    items = tmp_path / "few.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS * 10))
    arguments = ["--model", f"a={models[0]}", "--suite", "choice", "--data", str(items), "--out"]
    broken, whole = tmp_path / "broken.json", tmp_path / "whole" / "whole.json"  # a folder of its own: no shared log
    process = commands.start("evaluate", [*arguments, str(broken)], tmp_path)
    while process.poll() is None and len(measured := _lines(tmp_path)) < 20:
        time.sleep(0.005)
    process.send_signal(sent)
    assert process.wait() == status and not broken.exists()
    if sent == signal.SIGINT:
        printed = process.errors.read_text()
        assert "resumes from them" in printed and printed.endswith("stopped\n") and "Traceback" not in printed
    assert run([*arguments, str(broken)]) == 0
    lines = _lines(tmp_path)
    assert lines[: len(measured) - 1] == measured[:-1]  # the last line may have been cut
    assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(120)]
    assert run([*arguments, str(whole)]) == 0
    assert read(whole)["a"]["choice/few"]["metrics"] == read(broken)["a"]["choice/few"]["metrics"]


def _lines(folder: Path) -> list[str]:
    """The lines of the log of broken.json."""
    return [line for log in folder.glob("broken.items/*") for line in log.read_text().split("\n") if line]


# ---------------------------------------------------------------------------------------------------
# As functions


def test_each_suite_is_a_function(models: list[Path], text_file: Path, out: Path, tmp_path: Path) -> None:
    subject = load_subject(open_directory(models[0]))
    items = tmp_path / "few.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "It was the best of times"}\n{"text": "the age of wisdom"}\n')
    found = go(
        [f"a={models[0]}"],
        out,
        "--suite",
        "ppl,fidelity,choice,lambada,passkey,ruler",
        "--reference",
        str(models[1]),
        "--tasks",
        "niah_single_1",
        "--data",
        str(text_file),
        "--data",
        f"choice={items}",
        "--data",
        f"lambada={passages}",
        "--lengths",
        "700",
        "--tokens",
        "1400",
        "--samples",
        "1",
        "--depths",
        "50",
    )["a"]
    text = {"lengths": (700,), "tokens": 1400}
    made = {
        "ppl": room.perplexity(subject, text_file, **text),
        "fidelity": room.fidelity_to(models[1], models[0], str(text_file), **text),
        "choice/few": room.multiple_choice(models[0], ITEMS),
        "lambada": room.last_word(subject, passages),
        "passkey": room.passkeys(subject, [text_file], lengths=[700], samples=1, depths=[50]),
        "ruler": room.ruler_tasks(subject, text_file, lengths=[700], samples=1, tasks=["niah_single_1"]),
    }
    for name, entry in made.items():
        assert entry == {key: value for key, value in found[name].items() if key != "items"}, name
    assert set(room.__all__) <= {name for name in room.__all__ if getattr(room, name)}
    with pytest.raises(AttributeError, match="no attribute 'perplexities'"):
        room.perplexities  # noqa: B018
    with pytest.raises(UserError, match="item 1 has no `gold`"):
        room.multiple_choice(subject, [ITEMS[0], {"query": "q", "choices": ["a", "b"]}])
    with pytest.raises(UserError, match="there are no items"):
        room.last_word(subject, [])
    with pytest.raises(UserError, match="does not exist"):
        room.perplexity(subject, tmp_path / "nowhere.txt")
    with pytest.raises(TypeError, match="'qa_3'"):
        room.ruler_tasks(subject, text_file, qa_3=("a", "b"))


def test_fidelity_at_several_native_lengths(models: list[Path], text_file: Path, out: Path) -> None:
    short = tiny_model(out.parent / "short", seed=5, max_position_embeddings=128)
    more = ["--suite", "fidelity", "--data", str(text_file), "--lengths", "60,120,500", "--tokens", "480"]
    found = go([f"restored={models[0]}", f"native={short}"], out, *more)["restored"]["fidelity"]["metrics"]
    assert set(found) == {f"{name}{at}" for name in ("kl", "top1", "top5") for at in ("", "@60", "@120")}
    assert found["kl@60"]["n"] == 8 and found["kl@120"]["n"] == 4  # 500 is beyond the native window
    mean = (8 * found["kl@60"]["value"] + 4 * found["kl@120"]["value"]) / 12
    assert found["kl"]["value"] == pytest.approx(mean) and found["kl"]["value"] > 0


def test_compressed_items_and_any_line_ends(models: list[Path], tmp_path: Path, out: Path) -> None:
    rows = [{"query": "a\u2028b\x85c", "choices": ["x\x0cy", "z"], "gold": 0}, ITEMS[1]]
    text = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    plain, packed, other = (tmp_path / name for name in ("s.jsonl", "s.jsonl.gz", "s.jsonl.xz"))
    plain.write_text(text, newline="")
    packed.write_bytes(gzip.compress(text.encode(), mtime=0))
    other.write_bytes(lzma.compress(text.encode()))
    scores = []
    for path in (plain, packed, other):
        found = go([f"a={models[0]}"], out, "--suite", "choice", "--data", str(path))["a"]
        assert found["choice/s"]["metrics"]["acc"]["n"] == 2
        scores.append(found["choice/s"]["options"]["data"])
    assert len(set(scores)) == 1
    packed.write_bytes(packed.read_bytes()[:-9])
    assert run_command(lambda: run(["--model", str(models[0]), "--suite", "choice", "--data", str(packed)])) == 2


def test_a_model_that_overflows_is_named(models: list[Path], text_file: Path, tmp_path: Path, capsys) -> None:
    broken = shutil.copytree(models[0], tmp_path / "broken")
    weights = dict(mx.load(str(broken / "model.safetensors")))
    name = next(key for key in weights if "down_proj" in key)
    mx.save_safetensors(str(broken / "model.safetensors"), {**weights, name: weights[name] * math.nan})
    for suite in ("ppl", "passkey", "choice"):
        items = tmp_path / "few.jsonl"
        items.write_text(json.dumps(ITEMS[0]) + "\n")
        arguments = [
            "--model",
            str(broken),
            "--suite",
            suite,
            "--lengths",
            "500",
            "--data",
            str(items if suite == "choice" else text_file),
            "--out",
            str(tmp_path / "r.json"),
        ]
        assert run_command(lambda given=arguments: run(given)) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "logits that are not finite" in line and str(broken) in line
    assert not (tmp_path / "r.json").exists()


def test_a_sliding_window_has_positions_too(models: list[Path]) -> None:
    subject = load_subject(open_directory(models[0]))
    tokens = subject.directory.encode(PROSE * 20)
    kept, _ = room.run_suite(subject, room.Perplexity(np.array(tokens, np.int32), (400,), budget=400, stride=200))
    assert [(b["start"], b["end"]) for b in kept["by_position"]] == [(200, 256), (256, 400)]
    nats = sum((b["end"] - b["start"]) * math.log(b["perplexity"]) for b in kept["by_position"]) / 200
    assert nats == pytest.approx(math.log(kept["by_length"]["400"]), rel=1e-6)


def test_generation_stops_when_the_answer_is_there(models: list[Path]) -> None:
    subject = load_subject(open_directory(models[0]))
    prompt = subject.directory.encode(PROSE)
    whole = subject.greedy(prompt, 8)
    assert (
        subject.greedy(prompt, 8, enough=lambda text: len(text) >= len(subject.directory.decode(whole[:3])))
        == whole[:3]
    )
    assert subject.greedy(prompt, 8, enough=lambda text: False) == whole
