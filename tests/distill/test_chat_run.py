"""Runs on data sets of rows: the held-out split, the masked loss, the words of the report, and resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_linearard.convert.default_model import default_model
from tiny import PROSE, tiny_model
from tiny_runs import Stopped, StopsAt, same_adapters, small

import mlx_linearard
from mlx_linearard.config import DistillConfig
from mlx_linearard.distill.listener import Listener
from mlx_linearard.distill.prepare import load, make_plan
from mlx_linearard.distill.step import TrainState, _target_weights, train
from mlx_linearard.distributed.ranks import Share
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.__main__ import run as evaluate_command
from mlx_linearard.machine import Machine
from mlx_linearard.report.content import notes, provenance
from mlx_linearard.report.load import read_run

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
ROWS = {
    "text": [{"text": f"{i}. {PROSE}"} for i in range(40)],
    "messages": [
        {"messages": [{"role": "user", "content": f"Tell {i}."}, {"role": "assistant", "content": PROSE * (1 + i % 2)}]}
        for i in range(40)
    ],
    "completion": [{"prompt": f"Tell {i}.", "completion": PROSE} for i in range(40)],
}


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in mlx-lm's form for each kind of row."""
    root = tmp_path_factory.mktemp("data")
    for kind, rows in ROWS.items():
        (root / kind).mkdir()
        for name, part in (("train", rows[:30]), ("valid", rows[30:])):
            (root / kind / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


class Lines(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("text", "text rows"), ("messages", "conversations"), ("completion", "prompts with completions")],
)
def test_each_kind_of_row_trains_and_resumes(chat_dir: Path, data: Path, tmp_path: Path, kind: str, words: str) -> None:
    masked = {} if kind == "text" else {"objective": "ce", "mask_prompt": True}
    config = small(chat_dir, data / kind, tmp_path / "whole", steps=4, save_every=2, eval_tokens=64, **masked)
    heard = Lines()
    assert mlx_linearard.distill(config, heard)
    stopped = small(chat_dir, data / kind, tmp_path / "stopped", steps=4, save_every=2, eval_tokens=64, **masked)
    with pytest.raises(Stopped):
        mlx_linearard.distill(stopped, StopsAt(3))
    assert mlx_linearard.distill(DistillConfig(**{**vars(stopped), "resume": True}))
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
    told = json.loads((tmp_path / "whole" / "results.json").read_text())["run"]["text"]
    assert told == {"trained": [words], "held_out": [words], "chat_model": True}
    facts = read_run(tmp_path / "whole")
    assert ("Text", f"Trained on {words}; the held-out text is {words}.") in provenance(facts)
    warned = any("no conversation is trained on" in note.text for note in notes(facts))
    assert warned == (kind == "text") == any("no conversation is trained on" in line for line in heard.lines)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_smollm2_trains_resumes_and_is_evaluated_on_each_kind_of_row(data: Path, tmp_path: Path, kind: str) -> None:
    """The command lines of a user, on the real model; the tokens are those of mlx-lm's own data set classes."""
    from mlx_lm.tuner.datasets import create_dataset

    model, folder = default_model(), data / kind
    (shutil.copytree(folder, tmp_path / "data") / "test.jsonl").write_bytes((folder / "valid.jsonl").read_bytes())
    masked = {} if kind == "text" else {"objective": "ce", "mask_prompt": True}
    options = {"steps": 2, "save_every": 1, "eval_tokens": 64, "learning_rate": 1e-4, "grad_accum": 1, **masked}
    whole = small(model, tmp_path / "data", tmp_path / "whole", **options)
    job = load(make_plan(whole, Machine("one", False, 16 << 30, 100.0)))
    settings = SimpleNamespace(mask_prompt=bool(masked))
    theirs = create_dataset(ROWS[kind][:30], job.pair.tokenizer, settings)
    assert job.text.training.tolist() == [token for row in ROWS[kind][:30] for token in theirs.process(row)[0]]
    del job
    assert mlx_linearard.distill(whole)
    stopped = small(model, tmp_path / "data", tmp_path / "stopped", **options)
    with pytest.raises(Stopped):
        mlx_linearard.distill(stopped, StopsAt(2))
    assert mlx_linearard.distill(DistillConfig(**{**vars(stopped), "resume": True}))
    assert same_adapters(tmp_path / "whole", tmp_path / "stopped")
    flags = ["--suite", "ppl", "--data", str(tmp_path / "data"), "--lengths", "32", "--tokens", "64"]
    assert evaluate_command(["--run", str(tmp_path / "whole"), *flags]) == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    perplexities = [
        results[name]["ppl"]["metrics"]["perplexity@32"]["value"] for name in ("native", "scaled", "restored")
    ]
    assert all(1 < value < 1000 for value in perplexities), perplexities


def job_of(model: Path, data: Path, output: Path, **changes: object):
    machine = Machine("tiny", False, 1 << 34, 10.0)
    config = small(model, data, output, objective="ce", mask_prompt=True, **changes)
    return load(make_plan(config, machine))


def test_the_masked_loss_is_the_mean_over_the_answers(chat_dir: Path, data: Path, tmp_path: Path) -> None:
    """Of a step of three passes of two blocks, against the stock loss of the model's own logits in float64."""
    job = job_of(chat_dir, data / "messages", tmp_path / "run", grad_accum=3, batch_size=2)
    rows = np.concatenate([job.blocks.batch(i, 2) for i in range(3)])
    counted = np.concatenate([job.blocks.counted(i, 2) for i in range(3)])
    logits = job.pair.student(mx.array(rows[:, :-1]))
    each = nn.losses.cross_entropy(logits, mx.array(rows[:, 1:]))
    wanted = np.asarray(each, np.float64)[counted].mean()
    assert counted.any() and not counted.all()
    state = TrainState.start(job.pair, job.schedule)
    record = next(train(job.pair, job.objective, job.schedule, job.blocks, state))
    assert record.loss == pytest.approx(wanted, rel=1e-5)
    assert abs(np.asarray(each, np.float64).mean() - wanted) > 1e-3  # the mean over all tokens is another number


def test_ranks_share_the_answers_of_a_step(chat_dir: Path, data: Path, tmp_path: Path) -> None:
    """The mean over ranks, of means over their passes, gives every answer of the step the same weight."""
    job = job_of(chat_dir, data / "messages", tmp_path / "run", grad_accum=2, batch_size=2)
    whole = _target_weights(job.blocks, 0, job.schedule, Share())
    assert whole is not None
    total = sum(float(weights.sum().item()) for weights in whole) / 2
    assert total == pytest.approx(1.0)
    shares = [Share(group, 2, part, 2) for group in range(2) for part in range(2)]
    parts = [_target_weights(job.blocks, 0, job.schedule, share) for share in shares]
    means = [np.asarray(part[0], np.float64) for part in parts if part is not None]
    halves = [np.concatenate(means[2 * group : 2 * group + 2]) / 4 for group in range(2)]
    for half, weights in zip(halves, whole, strict=True):
        assert half == pytest.approx(np.asarray(weights, np.float64) / 2)


def test_valid_jsonl_is_the_held_out_text(chat_dir: Path, data: Path, tmp_path: Path) -> None:
    job = job_of(chat_dir, data / "messages", tmp_path / "a")
    folder = tmp_path / "data"
    shutil.copytree(data / "messages", folder)
    (folder / "valid.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    other = job_of(chat_dir, folder, tmp_path / "b")
    assert np.array_equal(job.text.training, other.text.training)
    assert not np.array_equal(job.text.held_out[32], other.text.held_out[32])
    (folder / "valid.jsonl").unlink()
    shorter = job_of(chat_dir, folder, tmp_path / "c")
    assert len(shorter.text.training) < len(job.text.training)
    assert shorter.text.answers is not None and len(shorter.text.answers) == len(shorter.text.training)


def test_prompts_are_masked_in_cross_entropy_only() -> None:
    with pytest.raises(UserError, match="--mask-prompt is for next-token cross-entropy, and --objective logits"):
        DistillConfig(objective="logits", mask_prompt=True)
    assert DistillConfig(compare="relation,ce", mask_prompt=True).mask_prompt
