"""The self-test of `doctor` passes on this machine and fails if the loss is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_linearard.doctor import __main__ as doctor
from mlx_linearard.doctor import checks
from mlx_linearard.machine import on_gpu


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of these tests' own; attention is measured once, and then read from there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "mlx-linearard"


def test_the_command_prints_machine_and_self_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run([]) == 0
    printed = capsys.readouterr().out
    assert "self-test" in printed and "passed" in printed and "GFLOP/s" in printed


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matmul_gflops"] > 0 and found["versions"]["mlx"] and found["self_test"]["gradient_error"] < 1e-4


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.001, lambda loss: loss + 1.0])
def test_a_wrong_loss_fails_the_self_test(monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    right = checks.relation_kl
    monkeypatch.setattr(checks, "relation_kl", lambda *a, **k: wrong(right(*a, **k)))
    assert doctor.run(["--json"]) == 1


def test_a_user_without_a_home_folder_is_examined_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(checks, "HEAD_SIZES", (16,))  # nothing is kept, so attention is measured again
    monkeypatch.setattr(checks.cache_directory.__globals__["Path"], "home", no_home)
    assert doctor.run([]) == 0
    assert "model cache      none: this user has no home folder: set HOME" in capsys.readouterr().out


@pytest.mark.skipif(on_gpu(), reason="about mlx's attention on a CPU")
def test_the_choice_of_attention_is_shown_with_its_figures_and_kept(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.run([]) == 0
    printed = capsys.readouterr().out
    for dim in (64, 128):
        assert f"attention        float32, heads of {dim}: own tiles (mlx: memory grows as T^" in printed
    assert len(json.loads((cache / "attention.json").read_text())) == 2
