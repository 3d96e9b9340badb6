"""Suite `far` on a tiny model: against plain forward passes, as a command, and on input that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import PROSE, tiny_model

from mlx_linearard.cli import run_command
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate import FarContext, api, far_context, load_subject, open_directory, run_suite
from mlx_linearard.evaluate.__main__ import run
from mlx_linearard.evaluate.model import Subject
from mlx_linearard.rope import scale_rope

NATS = 1e-4  # float32 over three layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native, with a window of 128 tokens, and scaled, the same weights with YaRN and 512."""
    folder = tmp_path_factory.mktemp("far")
    tiny_model(folder / "native")
    tiny_model(folder / "scaled")
    config = json.loads((folder / "native" / "config.json").read_text())
    (folder / "scaled" / "config.json").write_text(json.dumps(scale_rope(config, "yarn", 4.0)))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = np.array(PROSE.split())
    path = tmp_path / "texts.jsonl"
    documents = [" ".join(rng.choice(words, count)) for count in (130, 400, 20, 90)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def nll(subject: Subject, tokens: np.ndarray) -> np.ndarray:
    """Of tokens[1:], from one plain forward pass."""
    logits = np.array(subject.model(mx.array(tokens[:-1])[None])[0].astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -logs[np.arange(len(tokens) - 1), tokens[1:]]


def test_further_texts_overlap_but_no_token_is_scored_twice() -> None:
    documents = [np.arange(size) + 10_000 * i for i, size in enumerate((700, 430))]
    few, many = (FarContext(documents, (200,), near=90, samples=n, last=60)._texts(200) for n in (5, 100))
    assert [int(text[0]) for text in few] == [0, 10_000, 200, 10_200, 400]
    assert [list(text) for text in many[:5]] == [list(text) for text in few] and len(many) > 10
    scored = np.concatenate([text[-60:] for text in many])
    assert len(set(scored)) == len(scored) and all(len(text) == 201 for text in many)


@pytest.mark.parametrize("chunk", [None, 13])
def test_the_gain_is_that_of_two_plain_passes(folder: Path, chunk: int | None) -> None:
    subject = load_subject(open_directory(folder / "scaled"), chunk=chunk)
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 256, size).astype(np.int32) for size in (301, 299, 650)]
    suite = FarContext(documents, (200, 300), near=90, samples=3, last=25)
    entry, records = run_suite(subject, suite)
    starts = {"200/0": (0, 0), "200/1": (1, 0), "200/2": (2, 0), "300/0": (0, 0), "300/1": (2, 0), "300/2": (2, 300)}
    assert [record["id"] for record in records] == list(starts)
    gains = {}
    for record in records:
        (document, start), length = starts[record["id"]], record["length"]
        text = documents[document][start : start + length + 1]
        gains[record["id"]] = nll(subject, text[-91:])[-25:] - nll(subject, text)[-25:]
        assert record["samples"][f"gain@{length}"] == pytest.approx(gains[record["id"]].mean(), abs=NATS)
    value = entry["metrics"]["gain@300"]
    assert value["n"] == 3 and value["stderr"] > 0
    positions = entry["gain_by_position"]["300"]
    assert set(entry["gain_by_position"]) == {"200", "300"}
    assert [(p["start"], p["end"]) for p in positions][:2] == [(275, 278), (278, 281)] and len(positions) == 10
    assert positions[-1]["end"] == 300
    longest = np.array([gains[f"300/{i}"] for i in range(3)])
    for part in positions:
        own = longest[:, part["start"] - 275 : part["end"] - 275].mean(axis=1)
        assert part["gain"] == pytest.approx(own.mean(), abs=NATS)
        assert part["stderr"] == pytest.approx(own.std(ddof=1) / 3**0.5, abs=NATS)


def test_a_model_that_ignores_what_is_far_gains_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first token is all that differs: a text that repeats itself with the length of the near context."""
    subject = load_subject(open_directory(folder / "scaled"))
    own = Subject.nll
    monkeypatch.setattr(Subject, "nll", lambda self, tokens, tick=None, last=None: own(self, tokens[-31:], tick, last))
    entry, _ = run_suite(subject, FarContext([np.arange(300, dtype=np.int32) % 256], (200,), near=30, last=5))
    assert entry["metrics"]["gain@200"]["value"] == 0


def test_models_are_compared_by_their_gain(folder: Path, texts: Path, tmp_path: Path, capsys) -> None:
    """What is near is the native window; the scaled model alone has the same options; lengths add up."""
    out = tmp_path / "r.json"
    scaled = ["--model", f"scaled={folder / 'scaled'}", "--suite", "far", "--data", str(texts), "--out", str(out)]
    assert run([*scaled, "--against", f"native={folder / 'native'}", "--samples", "3", "--last", "20"]) == 0
    results: dict[str, Any] = json.loads(out.read_text())
    assert "gain@512" in capsys.readouterr().out
    options = results["scaled"]["far"]["options"]
    assert options["near"] == 128 and options["lengths"] == [512] and options["last"] == 20
    assert results["scaled"]["far"]["metrics"]["gain@512"]["n"] == 3  # one document holds one text, one holds more
    assert set(results["comparisons"]["far"]["metrics"]) == {"gain@512"}
    assert run([*scaled, "--lengths", "256", "--samples", "3", "--last", "20"]) == 0
    results = json.loads(out.read_text())
    assert set(results["scaled"]["far"]["metrics"]) == {"gain@512", "gain@256"}
    compared = results["comparisons"]["far"]["metrics"]
    assert set(compared["gain@512"]) == {"scaled", "native"} and set(compared["gain@256"]) == {"scaled"}
    assert [len(v) for v in results["scaled"]["far"]["gain_by_position"].values()] == [10, 10]


def test_as_a_function(folder: Path, texts: Path) -> None:
    entry = far_context(folder / "scaled", texts, samples=2)
    assert entry["options"]["near"] == 128 and entry["options"]["last"] == 32 and "gain@512" in entry["metrics"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lengths", "128"], "--lengths 128 holds nothing beyond the near context of 128 tokens"),
        (["--near", "20", "--last", "20"], "--near 20: the last 20 tokens are scored"),
        (["--lengths", "1000"], "--lengths 1000 does not fit"),
        (["--near", "600"], "--lengths 512 holds nothing beyond the near context of 600 tokens"),
        (["--near", "1"], "--near"),
        (["--last", "0"], "--last"),
    ],
)
def test_mistakes(folder: Path, texts: Path, tmp_path: Path, options: list[str], says: str, capsys) -> None:
    arguments = [
        "--model",
        str(folder / "scaled"),
        "--suite",
        "far",
        "--data",
        str(texts),
        "--out",
        str(tmp_path / "r.json"),
        *options,
    ]
    assert run_command(lambda: run(arguments)) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_short_documents_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "It was the age."}) + "\n")
    with pytest.raises(UserError, match=r"longest document .* has 16 tokens, too few for a text of 512"):
        far_context(folder / "scaled", tmp_path / "short.jsonl")


def test_samples_are_sized_to_the_machine(folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an average of five tasks has a standard error below 4 points, even for a share of one half."""
    directory = open_directory(folder / "scaled")
    for gpu, samples in [(False, 3), (True, 32)]:
        monkeypatch.setattr(api, "on_gpu", lambda gpu=gpu: gpu)
        made = [api.ruler_suite(directory, texts), api.passkey_suite(directory, texts), api.far_suite(directory, texts)]
        assert [suite.samples for suite in made] == [samples] * 3
        assert api.ruler_suite(directory, texts, samples=5).samples == 5
    assert 100 * (0.25 / (5 * samples)) ** 0.5 < 4
