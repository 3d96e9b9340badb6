"""A run is resumed only with the weights and text it began with, and its rows are all of one held-out text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import PROSE, tiny_model
from tiny_runs import Stopped, StopsAt, metrics, small

import mlx_linearard
from mlx_linearard.distill.compare import compare_objectives
from mlx_linearard.errors import UserError
from mlx_linearard.models.weights import EDGE, hash_of_model


def change(model: Path, place: int) -> None:
    """Change one byte of a weight file; its name and size stay. The file gets a new inode: others may link to it."""
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.unlink()
    file.write_bytes(data)


def facts(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.mark.parametrize("place", [-1, -5000, 40_000], ids=["last", "near the end", "middle"])
def test_weights_of_the_same_size_are_another_model(text_file: Path, tmp_path: Path, place: int) -> None:
    model, run = tiny_model(tmp_path / "model"), tmp_path / "run"
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model, text_file, run, save_every=1), StopsAt(2))
    change(model, place)
    with pytest.raises(UserError, match="belongs to another run: model was"):
        mlx_linearard.distill(small(model, text_file, run, resume=True))


def test_a_config_is_part_of_a_model(text_file: Path, tmp_path: Path) -> None:
    model, run = tiny_model(tmp_path / "model"), tmp_path / "run"
    mlx_linearard.distill(small(model, text_file, run, steps=2))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(UserError, match="belongs to another run: model was"):
        mlx_linearard.distill(small(model, text_file, run, steps=4, resume=True))


def test_the_hash_reads_both_ends_of_every_file_and_no_names_of_folders(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    weights = {f"w{i}": mx.array(np.full(EDGE // 4, i, np.float32)) for i in range(3)}  # 3 MiB a file
    for number in (1, 2):
        mx.save_safetensors(str(model / f"model-{number:05d}-of-00002.safetensors"), weights)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").unlink(missing_ok=True)
    first = hash_of_model(model)
    assert hash_of_model(shutil.copytree(model, tmp_path / "copy")) == first
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        for place in (-1, 1 << 19):
            other = shutil.copytree(model, tmp_path / f"{name}{place}")
            data = bytearray((other / name).read_bytes())
            data[place] ^= 1
            (other / name).write_bytes(data)
            assert hash_of_model(other) != first


def test_before_the_first_checkpoint_other_weights_are_measured_again(text_file: Path, tmp_path: Path) -> None:
    """before.json alone is left of a run that was stopped early; the weights change before it starts again."""
    model, run, own = tiny_model(tmp_path / "model"), tmp_path / "run", tmp_path / "own"
    with pytest.raises(Stopped):
        mlx_linearard.distill(small(model, text_file, run), StopsAt(1))
    shutil.rmtree(run / "checkpoints")
    other = tiny_model(tmp_path / "other", seed=5)
    mlx_linearard.distill(small(other, text_file, run, resume=True, steps=2))
    mlx_linearard.distill(small(other, text_file, own, steps=2))
    assert {k: facts(run)[k] for k in ("native", "scaled")} == {k: facts(own)[k] for k in ("native", "scaled")}


# ---------------------------------------------------------------------------------------------------
# Held-out text


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two held-out texts that have nothing in common."""
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "a.txt").write_text(PROSE * 20)
    (folder / "b.txt").write_text("Zqx jvk 0918 %$ wpl; " * 200)
    return folder / "a.txt", folder / "b.txt"


def test_resuming_with_other_held_out_text_measures_every_row_on_it(
    texts: tuple[Path, Path], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    a, b = map(str, texts)
    run, own = tmp_path / "run", tmp_path / "own"
    more = {"eval_tokens": 256, "keep": "last", "eval_every": 2, "save_every": 2}
    mlx_linearard.distill(small(model_dir, text_file, run, steps=4, valid_data=a, **more))
    again = small(model_dir, text_file, run, steps=8, valid_data=b, resume=True, **more)
    with pytest.raises(Stopped):
        mlx_linearard.distill(again, StopsAt(6))
    assert not (run / "results.json").exists() and not (run / "report.html").exists()
    mlx_linearard.distill(again)
    mlx_linearard.distill(small(model_dir, text_file, own, steps=8, valid_data=b, **more))
    for name in ("native", "scaled"):
        assert facts(run)[name] == facts(own)[name]
    pieces = [json.loads((path / "held_out.json").read_text()) for path in (run, own)]
    assert pieces[0]["native"] == pieces[1]["native"] and pieces[0]["scaled"] == pieces[1]["scaled"]
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6, 8]  # those of the other text are gone
    assert [m["step"] for m in metrics(run)] == list(range(1, 9))


def test_resuming_with_the_same_text_measures_nothing_again(
    texts: tuple[Path, Path], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The name of the file is not what counts."""
    said: list[str] = []
    listener = StopsAt()
    listener.progress = lambda label, *rest: said.append(label)  # type: ignore[method-assign]
    copy = shutil.copy(texts[0], tmp_path / "copy.txt")
    run = tmp_path / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, steps=2, valid_data=str(texts[0])))
    mlx_linearard.distill(small(model_dir, text_file, run, steps=4, valid_data=str(copy), resume=True), listener)
    assert set(said) == {"measuring restored"}


@pytest.fixture(scope="module")
def two_steps(model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("two-steps") / "run"
    mlx_linearard.distill(small(model_dir, text_file, run, steps=2))
    return run


DAMAGED = ["", "{", "[]", '{"native": 3}', '{"native": {}, "scaled": {}, "measured_on": 1}']


@pytest.mark.parametrize("body", DAMAGED)
def test_damaged_measurements_are_made_again(
    two_steps: Path, model_dir: Path, text_file: Path, tmp_path: Path, body: str
) -> None:
    run = shutil.copytree(two_steps, tmp_path / "run")
    before = facts(run)
    (run / "before.json").write_text(body)
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b"\xff\xfe[1]\n" + b"9" * 5000 + b"\n")
    mlx_linearard.distill(small(model_dir, text_file, run, steps=4, resume=True))
    assert facts(run)["native"] == before["native"] and facts(run)["scaled"] == before["scaled"]
    assert [m["step"] for m in metrics(run)] == [1, 2, 3, 4]


def test_a_comparison_takes_no_rows_of_another_text(
    texts: tuple[Path, Path], model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    config = {"compare": "relation,ce", "steps": 2, "eval_tokens": 256}
    compare_objectives(small(model_dir, text_file, root, valid_data=str(texts[0]), **config))
    with pytest.raises(UserError, match="the runs of this comparison would differ: held_out was"):
        compare_objectives(
            small(model_dir, text_file, root, valid_data=str(texts[1]), resume=True, **{**config, "steps": 4})
        )
