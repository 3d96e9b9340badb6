"""The check of a written model: real differences, and computations that are wrong once."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model
from tiny import tiny_model

from mlx_linearard.distill.__main__ import run as distill
from mlx_linearard.errors import UserError
from mlx_linearard.export import verify
from mlx_linearard.export.verify import EXPORT, STUDENT, student_logits, verify_export

TOKENS = np.arange(64) * 11 % 256


def wrong_row(logits: np.ndarray) -> np.ndarray:
    """One position is wrong, as was seen on a GPU."""
    logits = logits.copy()
    middle = len(logits) // 2
    logits[middle] = logits[middle][::-1] * 8
    return logits


@pytest.fixture
def wrong_at(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the computations of the given numbers wrong; 0 is the first."""

    def arrange(*numbers: int) -> None:
        compute, count = verify._logits, iter(range(100))
        monkeypatch.setattr(
            verify, "_logits", lambda *a: wrong_row(compute(*a)) if next(count) in numbers else compute(*a)
        )

    return arrange


def verified(folder: Path, loaded: Path | None = None) -> verify.Verified:
    student, _ = load_model(folder)
    return verify_export(loaded or folder, TOKENS, student_logits(student, TOKENS))


def test_the_same_model_verifies(model_dir: Path) -> None:
    result = verified(model_dir)
    assert result.ok and result.note is None and result.tokens == 64
    result.check(model_dir)


@pytest.mark.parametrize(
    ("numbers", "unstable"),
    [
        ((0,), (STUDENT,)),  # then 1 and 2 agree
        ((1,), (STUDENT,)),
        ((2,), (EXPORT,)),  # 0 and 1 are the student's
        ((2, 3), (EXPORT,)),
        ((0, 3), (STUDENT, EXPORT)),
    ],
)
def test_a_result_that_is_wrong_once_is_named_and_does_not_count(
    model_dir: Path, wrong_at, numbers: tuple[int, ...], unstable: tuple[str, ...]
) -> None:
    wrong_at(*numbers)
    result = verified(model_dir)
    if numbers == (2, 3):  # the same wrong logits twice cannot be told from a wrong export
        assert not result.ok and result.unstable == ()
        return
    assert result.ok and result.unstable == unstable
    assert all(name in (result.note or "") for name in unstable)


def test_a_side_that_never_settles_is_named(model_dir: Path, wrong_at) -> None:
    wrong_at(3, 5)  # the last of the export's four is wrong, and no two in succession agree
    student, _ = load_model(model_dir)
    other = student_logits(student, TOKENS).values[::-1]
    result = verify_export(model_dir, TOKENS, verify.Logits(other))
    assert not result.ok and result.unstable == (EXPORT,)
    with pytest.raises(UserError, match=f"{EXPORT} gave different logits"):
        result.check(model_dir)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_model_is_found_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    one, other = (tiny_model(tmp_path / str(seed), seed=seed, dtype=dtype) for seed in (0, 1))
    assert verified(one).ok
    result = verified(one, other)
    assert not result.ok and result.unstable == ()
    with pytest.raises(UserError, match=r"does not compute what was trained.*both sides gave the same.*--resume"):
        result.check(other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wrong", [1, 4, 5, 32])
def test_wrong_positions_are_found_in_every_dtype(tmp_path: Path, dtype: str, wrong: int) -> None:
    folder = tiny_model(tmp_path / "m", dtype=dtype)
    student, _ = load_model(folder)
    values = student_logits(student, TOKENS).values.copy()
    values[:wrong] = values[:wrong, ::-1] * 8
    result = verify_export(folder, TOKENS, verify.Logits(values))
    assert result.max_difference > 5 and result.unstable == ()
    assert not result.ok


def test_logits_that_are_not_numbers_do_not_verify(model_dir: Path) -> None:
    result = verify_export(model_dir, TOKENS, verify.Logits(np.full((64, 258), np.nan, np.float32)))
    assert not result.ok
    with pytest.raises(UserError, match="does not compute"):
        result.check(model_dir)


FLAGS = ["--seq-len", "32", "--grad-accum", "1", "--steps", "2", "--lora-rank", "4", "--eval-tokens", "64"]


def test_results_and_report_are_written_whatever_verification_finds(
    model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends in one line after the table is written; resumed, it exports again and ends well."""
    run = tmp_path / "run"
    flags = ["--model", str(model_dir), "--data", str(text_file), "--output", str(run), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(verify, "load_model", lambda path: load_model(model_dir))  # the base model, not the export
        with pytest.raises(UserError, match="does not compute what was trained") as caught:
            distill(flags)
    assert "\n" not in str(caught.value)
    results = json.loads((run / "results.json").read_text())
    assert set(results) >= {"native", "scaled", "restored"} and results["export"]["kl"] > 1e-6
    assert (run / "report.html").exists() and (run / "model").is_dir()
    assert distill([*flags, "--resume"]) == 0
    assert json.loads((run / "results.json").read_text())["export"]["kl"] < 1e-6


def test_an_unstable_side_is_reported_and_the_run_ends_well(
    model_dir: Path, text_file: Path, tmp_path: Path, wrong_at, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_at(2)
    run = tmp_path / "run"
    assert distill(["--model", str(model_dir), "--data", str(text_file), "--output", str(run), *FLAGS]) == 0
    assert f"{EXPORT} gave different logits" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["export"]["unstable"] == [EXPORT]


def test_logits_are_float32_numbers_of_every_position(model_dir: Path) -> None:
    model, _ = load_model(model_dir)
    values = student_logits(model, TOKENS).values
    assert values.shape == (64, 258) and values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array(model(mx.array(TOKENS)[None])[0]))
