"""The self-test of `doctor` passes on this machine and fails if the loss is wrong."""

from __future__ import annotations

import json

import pytest

import mlx_linearard.doctor as doctor


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
    right = doctor.relation_kl
    monkeypatch.setattr(doctor, "relation_kl", lambda *a, **k: wrong(right(*a, **k)))
    assert doctor.run(["--json"]) == 1


def test_a_user_without_a_home_folder_is_examined_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(doctor.cache_directory.__globals__["Path"], "home", no_home)
    assert doctor.run([]) == 0
    assert "model cache      none: this user has no home folder: set HOME" in capsys.readouterr().out
