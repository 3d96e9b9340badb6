"""What would make every number wrong is said before the first step: token ids, weights, held-out rows."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from tiny import tiny_model
from tiny_runs import small

import mlx_linearard
from mlx_linearard.distill import run as room
from mlx_linearard.distill.listener import Listener
from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.held_out import Fidelity


class NoStep(Listener):
    def step(self, record, total: int) -> None:
        pytest.fail("a step was made")


def refused(model: Path, text: Path, run: Path, says: str, **more) -> None:
    for dry_run in (False, True):
        with pytest.raises(UserError, match=says) as caught:
            mlx_linearard.distill(small(model, text, run, dry_run=dry_run, **more), NoStep())
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not run.exists()


@pytest.mark.parametrize("number", [258, 5000, 100_000_000, 2**31, 2**32 - 1])
def test_a_token_beyond_the_embedding(text_file: Path, tmp_path: Path, number: int) -> None:
    model = tiny_model(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w"] = number
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(model, text_file, tmp_path / "run", str(number))


def test_a_token_beyond_the_embedding_in_held_out_text_only(text_file: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["#"] = 300
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("#" + text_file.read_text()[:2000])
    refused(model, text_file, tmp_path / "run", "300", valid_data=str(held_out))


@pytest.mark.parametrize("bits", [None, 4], ids=["float32", "4-bit"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_a_weight_that_is_not_finite(text_file: Path, tmp_path: Path, bits: int | None, value: float) -> None:
    model = tiny_model(tmp_path / "model", bits=bits)
    weights = dict(mx.load(str(model / "model.safetensors")))
    name = f"model.layers.2.mlp.down_proj.{'scales' if bits else 'weight'}"
    weights[name][1, 1] = value
    (model / "model.safetensors").unlink()
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    with pytest.raises(UserError, match=rf"not finite: .*{name.replace('.', '[.]')}"):
        mlx_linearard.distill(small(model, text_file, tmp_path / "run"), NoStep())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row",
    [Fidelity({32: float("nan")}, 0.0, 1.0), Fidelity({32: 5.0}, float("nan"), 1.0), Fidelity({32: float("inf")})],
    ids=["perplexity", "kl", "infinite"],
)
@pytest.mark.parametrize("which", [0, 1], ids=["native", "scaled"])
def test_a_held_out_row_that_is_not_finite(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Fidelity, which: int
) -> None:
    good = Fidelity({32: 5.0}, 0.1, 0.9)
    monkeypatch.setattr(room, "measure", lambda *_, **__: (row, good) if which == 0 else (good, row))
    says = f"the {('native', 'scaled')[which]} model computes numbers that are not finite"
    with pytest.raises(UserError, match=says):
        mlx_linearard.distill(small(model_dir, text_file, tmp_path / "run"), NoStep())
    assert not (tmp_path / "run" / "before.json").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_evaluation_that_is_not_finite_is_null_and_never_the_best(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_linearard.distill.prepare import Job

    real, nan = Job.measure, Fidelity({32: float("nan")}, float("nan"), 0.5)
    monkeypatch.setattr(Job, "measure", lambda job, state: nan if state.step == 2 else real(job, state))
    run = tmp_path / "run"
    result = mlx_linearard.distill(small(model_dir, text_file, run, steps=4, eval_every=2))
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["kl"] is None for row in rows] == [True, False] and result.exported_step != 2


@pytest.mark.parametrize("name", ["batch_size", "workspace", "lora_rank", "grad_accum", "steps", "eval_tokens"])
def test_the_largest_sizes_are_planned_in_no_time(model_dir: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    config = small(model_dir, text_file, tmp_path / "run", dry_run=True, **{name: 2**31 - 1})
    try:
        mlx_linearard.distill(config)
    except UserError as error:
        assert "needs about" in str(error) or "too few" in str(error)
